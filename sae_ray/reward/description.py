"""Simplicity, first part: how short a latent can be described, at equal score.

Of one latent (`description_length`), in bits under the judge's prior reading, with s the candidates' scores:

    L = min over the candidates i with s_i >= s_chosen - error of s_chosen  of  -log2 p(explanation_i | no text)

so a lengthy explainer is not the latent's fault, and an empty phrase that scores less does not count. Between the N
latents of a round (`at_equal_score`), with s_j the score of the candidate that L_j is of:

    L_j at equal score = L_j - b (s_j - mean s),    b = max(0, cov(L, s) / var(s))

This is the length that is left at the round's mean score: what more bits usually buy in score excuses them. Bits may
buy score and not the reverse: with a slope below 0 an empty phrase would be worth more than a good one of that length.
Noise of the scores pulls b to 0, and of fewer than MIN_LATENTS it would be noise alone: there b is 0. The mean of the
round stays in, for the combiner's running baseline to take off, so that a few latents are held against earlier rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_LATENTS = 8


@dataclass(frozen=True)
class Description:
    """length: of the shortest candidate that is as good as the chosen one; score: its own. unit: bits, or words where a
    candidate has no prior reading."""

    length: float
    score: float
    unit: str


def description_length(
    texts: Sequence[str],
    scores: Sequence[float],
    errors: Sequence[float],
    chosen: int,
    prior_nats: Sequence[float | None] | None = None,
) -> Description | None:
    """Of one latent; None if the chosen candidate's score is missing (NaN).

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
    return Description(lengths[index], scores[index], "bits" if read else "words")


def at_equal_score(described: Sequence[Description]) -> np.ndarray:
    """float64 [N]: each latent's length as it would be at the mean score of all; lengths must be of one unit."""
    length_N = np.array([each.length for each in described], dtype=np.float64)
    score_N = np.array([each.score for each in described], dtype=np.float64)
    spread = float(score_N.var()) if len(described) >= MIN_LATENTS else 0.0
    if spread < 1e-12:
        return length_N
    beyond_N = score_N - score_N.mean()
    slope = max(0.0, float((beyond_N * length_N).mean()) / spread)
    return np.asarray(length_N - slope * beyond_N)
