"""Simplicity, first part: how short an explanation is, at equal score.

Bits of an explanation under the judge's prior reading, -log2 p(explanation | no text), against the shortest candidate
that is as good: whose score is within one standard error of the chosen one's. So length is only compared at equal
score, and an empty phrase gains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """length: of the chosen explanation; shortest: of the shortest that is as good (at `index`); excess: what the
    chosen one could do without. unit: bits, or words where a candidate has no prior reading."""

    length: float
    shortest: float
    excess: float
    index: int
    unit: str


def description_length(
    texts: Sequence[str],
    scores: Sequence[float],
    errors: Sequence[float],
    chosen: int,
    prior_nats: Sequence[float | None] | None = None,
) -> Description | None:
    """Of the chosen candidate at equal score; None if its score is missing (NaN).

    Args:
        scores, errors: of every candidate with their standard errors, any measure; NaN is missing and competes not.
        prior_nats: log p of every explanation as the judge reads it without a text; None: no reading.
    """
    if not math.isfinite(scores[chosen]):
        return None
    prior = [None] * len(texts) if prior_nats is None else prior_nats
    read = all(value is not None and math.isfinite(value) for value in prior)
    lengths = [
        -value / math.log(2) if read and value is not None else float(len(text.split()))
        for text, value in zip(texts, prior, strict=True)
    ]
    error = errors[chosen] if math.isfinite(errors[chosen]) else 0.0
    as_good = [i for i, score in enumerate(scores) if i == chosen or score >= scores[chosen] - error]
    index = min(as_good, key=lambda i: (lengths[i], i != chosen, i))
    return Description(
        lengths[chosen], lengths[index], lengths[chosen] - lengths[index], index, "bits" if read else "words"
    )
