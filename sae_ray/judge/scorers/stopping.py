"""How many verdicts a score needs, and when it has had enough. Pure.

A latent is judged in looks of doubling size. Stopping once the standard error is small favours samples that look well
separated, so a 95% interval taken at the stop holds the truth less than 95 times in 100. Here each of the K planned
looks spends 0.05 / K: whatever made the latent stop, the interval at the stop then errs at most as often as K intervals
together, which is 0.05 (Bonferroni). Looks overlap, so it errs less: in simulations with normal verdicts, AUROCs of .50
to .96, up to 40 + 40 texts and targets of .05 to .10 it held the truth 98.4 to 99.8 times in 100, a plain 95% interval
at the same stops 93.5 to 98.7 times. That rests on DeLong's interval being right at its level, which it is only roughly
for the five texts a class of the first look. The score itself is a little too high after a stop, by up to .03 at a
target of .10 and .01 at .05; the interval does not remove that, it covers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sae_ray.judge.scores import Estimate, mean_estimate

_FIRST_LOOK = 5
_MOST_TEXTS = 1_000_000


@dataclass(frozen=True)
class Looks:
    """sizes: (positives, negatives) judged by the end of each look. level: of the interval taken at any one of them.
    target: standard error that suffices; 0: none does."""

    sizes: tuple[tuple[int, int], ...]
    level: float
    target: float

    def enough(self, look: int, stderr: float) -> bool:
        """Whether a latent with this standard error after `look` looks (1: the first) is judged no further."""
        return look >= len(self.sizes) or (self.target > 0 and stderr <= self.target)


def plan_looks(positives: int, negatives: int, target: float, level: float = 0.95, first: int = _FIRST_LOOK) -> Looks:
    """Looks at `first`, twice, four times... of the smaller class and as large a share of the other.

    A last look that would add less than a half joins the one before. `target` 0 plans one look at everything.
    """
    least = min(positives, negatives)
    shares: list[float] = []
    size = first
    while target > 0 and size * 1.5 <= least:
        shares.append(size / least)
        size *= 2
    sizes = [(round(share * positives), round(share * negatives)) for share in shares] + [(positives, negatives)]
    return Looks(tuple(sizes), 1 - (1 - level) / len(sizes), target)


def power(n_pos: int, n_neg: int, auroc: float) -> float:
    """Standard error to expect of an AUROC from so many texts.

    Reference: Hanley & McNeil, Radiology 143 (1982), whose verdicts are exponentially distributed.
    """
    if n_pos < 1 or n_neg < 1:
        return float("nan")
    beats_two, beaten_by_two = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc) + (n_pos - 1) * (beats_two - auroc**2) + (n_neg - 1) * (beaten_by_two - auroc**2)
    ) / (n_pos * n_neg)
    return float(max(0.0, variance) ** 0.5)


def needed(auroc: float, stderr: float, negatives_per_positive: float = 1.0) -> tuple[int, int]:
    """Fewest (positives, negatives) at which `power` is at most `stderr`.

    Raises:
        ValueError: `stderr` is not positive, or a million texts do not reach it.
    """
    if not stderr > 0:
        raise ValueError(f"a standard error of {stderr} needs infinitely many texts")

    def texts(n: int) -> tuple[int, int]:
        return n, max(1, round(n * negatives_per_positive))

    low, high = 0, 1
    while power(*texts(high), auroc) > stderr:
        low, high = high, 2 * high
        if high > _MOST_TEXTS:
            raise ValueError(f"a standard error of {stderr} needs more than {_MOST_TEXTS} texts")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(*texts(middle), auroc) > stderr else (low, middle)
    return texts(high)


def error_of(estimate: Estimate, n_pos: int, n_neg: int) -> float:
    """Standard error of an AUROC that a stop may rest on.

    DeLong's is 0 where few texts happen to separate perfectly. So it is at least Hanley and McNeil's at the AUROC drawn
    towards one half by one text's worth of doubt.
    """
    least = min(n_pos, n_neg)
    doubted = (estimate.value * least + 0.5) / (least + 1)
    # Their formula is for AUROCs above one half; verdicts turned round have the same error.
    return max(estimate.stderr, power(n_pos, n_neg, max(doubted, 1 - doubted)))


def set_interval(
    values: Sequence[float], stderrs: Sequence[float], population: bool = True, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean score of a set of latents; latents whose score is missing are left out, and `n` says how many were not.

    population: the interval for the mean of the latents that these were drawn from (bootstrap over latents; it holds
    the noise of each score as well). False: for the mean of exactly these latents, from their own errors, as though
    their verdicts were independent; texts that several latents share make that a little too narrow.
    """
    value_N, stderr_N = np.asarray(values, dtype=np.float64), np.asarray(stderrs, dtype=np.float64)
    known = np.isfinite(value_N) & (population | np.isfinite(stderr_N))
    if not known.any():
        return Estimate(float("nan"), float("nan"), float("nan"), float("nan"), 0)
    if population:
        return mean_estimate(value_N[known], level, seed=seed)
    n = int(known.sum())
    mean, stderr = float(value_N[known].mean()), float((stderr_N[known] ** 2).sum() ** 0.5 / n)
    z = NormalDist().inv_cdf((1 + level) / 2)
    return Estimate(mean, stderr, mean - z * stderr, mean + z * stderr, n)
