"""Where a judge's score becomes a yes.

`planted`: where its calibrated probability is a half. That was measured on planted items, which show their concept
plainly; a latent's texts often show theirs less, and then every verdict is no although the scores rank the texts well
(measured: docs/results.md).

`own`: where the explanation's own scores best tell the latent's active texts from random ones. This takes one number
from where the latent fires, not which texts are held to show the explanation. Texts are in two halves, those that chose
the explanation and those that scored it; the cut of each half is found on the other, so that no verdict is drawn to
agree with its own text. The error rates are those of the same verdicts, over all trusted latents:

    false positive = share of yes among random texts        false negative = share of no among active texts

Both are too high, by the random texts that do show the concept and the active ones that do not: estimators trust such
verdicts a little less than they might.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sae_ray.reward.evidence import POSITIVE, RANDOM

LEAST_RATE = 0.02  # nothing is that sure on a few dozen texts


class CutVerdicts(NamedTuple):
    """verdict: float32 [V], 1 or 0, of the rows in order; the judge's two error rates."""

    verdict: np.ndarray
    false_positive_rate: float
    false_negative_rate: float


def at_own_cuts(rows: Sequence[Mapping[str, Any]], trusted: Collection[int], planted: Sequence[float]) -> CutVerdicts:
    """Cuts every latent's verdicts where its explanation's own scores say.

    Args:
        rows: of the bank, one explanation a latent; purpose select and score are the two halves.
        trusted: latents that teach; the rates are theirs.
        planted: rates that stand where no trusted latent has random or active texts.
    """
    score = np.array([row["score"] for row in rows], dtype=np.float64)
    latent = np.array([row["latent"] for row in rows], dtype=np.int64)
    half = np.array([row["purpose"] == "select" for row in rows])
    kind = np.array([row["kind"] for row in rows], dtype=str)
    verdict = np.array([row["probability"] >= 0.5 for row in rows])
    for one in np.unique(latent):
        for side in (False, True):
            other = (latent == one) & (half != side)
            cut = best_cut(score[other & (kind == POSITIVE)], _against(score, kind, other))
            if cut is not None:
                mine = (latent == one) & (half == side)
                verdict[mine] = score[mine] >= cut
    of_trusted = np.isin(latent, list(trusted))
    rates = [
        float(np.clip(wrong.mean(), LEAST_RATE, 1 - LEAST_RATE)) if len(wrong) else usual
        for wrong, usual in (
            (verdict[of_trusted & (kind == RANDOM)], planted[0]),
            (~verdict[of_trusted & (kind == POSITIVE)], planted[1]),
        )
    ]
    return CutVerdicts(verdict.astype(np.float32), rates[0], rates[1])


def best_cut(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """The score from which on yes is right most often, both sides counting the same; the highest such. None: a side is
    empty."""
    if not len(positive) or not len(negative):
        return None
    ordered = np.unique(np.concatenate([positive, negative]))
    cuts = np.append((ordered[:-1] + ordered[1:]) / 2, np.inf)
    right = (positive[:, None] >= cuts).mean(0) - (negative[:, None] >= cuts).mean(0)
    return float(cuts[len(cuts) - 1 - int(right[::-1].argmax())])


def _against(score: np.ndarray, kind: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Random texts' scores; where a round asks about none, those of all that are not active."""
    random = score[of & (kind == RANDOM)]
    return random if len(random) else score[of & (kind != POSITIVE)]
