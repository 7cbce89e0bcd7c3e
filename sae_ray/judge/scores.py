"""How well verdicts separate what should be separated, and how sure that is. Pure numpy.

Shapes: P positives, N negatives. Verdicts are any real numbers, higher meaning "shows it more"; NaN is refused, because
missing is missing and the caller has to say what it dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and confidence interval."""

    value: float
    stderr: float
    low: float
    high: float
    n: int


def auroc(positives: Sequence[float] | Array, negatives: Sequence[float] | Array, level: float = 0.95) -> Estimate:
    """Soft AUROC: P(positive verdict > negative verdict) + half the ties, with DeLong's standard error.

    The interval is taken on the logit scale and so stays inside (0, 1); where separation is perfect (DeLong's error is
    then 0) the rule of three bounds it from below. `n` counts both classes.

    Raises:
        ValueError: a class is empty or holds NaN.
    Reference: DeLong, DeLong & Clarke-Pearson, Biometrics 44 (1988).
    """
    pos, neg = _checked(positives, "positives"), _checked(negatives, "negatives")
    n_pos, n_neg = len(pos), len(neg)
    neg_sorted, pos_sorted = np.sort(neg), np.sort(pos)
    # Structural components: share of the other class that each item beats.
    wins_P = (np.searchsorted(neg_sorted, pos, "left") + np.searchsorted(neg_sorted, pos, "right")) / (2 * n_neg)
    wins_N = 1 - (np.searchsorted(pos_sorted, neg, "left") + np.searchsorted(pos_sorted, neg, "right")) / (2 * n_pos)
    value = float(wins_P.mean())
    variance = sum(float(w.var(ddof=1)) / len(w) if len(w) > 1 else 0.25 for w in (wins_P, wins_N))
    stderr = variance**0.5
    low, high = logit_interval(value, stderr, min(n_pos, n_neg), level)
    return Estimate(value, stderr, low, high, n_pos + n_neg)


def balanced_accuracy(
    positives: Sequence[float] | Array, negatives: Sequence[float] | Array, threshold: float
) -> tuple[float, float, float]:
    """(balanced accuracy, false positive rate, false negative rate) when verdicts >= threshold mean "shows it"."""
    pos, neg = _checked(positives, "positives"), _checked(negatives, "negatives")
    false_negative, false_positive = float((pos < threshold).mean()), float((neg >= threshold).mean())
    return 1 - (false_negative + false_positive) / 2, false_positive, false_negative


def best_threshold(positives: Sequence[float] | Array, negatives: Sequence[float] | Array) -> float:
    """Threshold of the highest balanced accuracy: the middle of the best gap between neighbouring verdicts."""
    pos, neg = np.sort(_checked(positives, "positives")), np.sort(_checked(negatives, "negatives"))
    values = np.unique(np.concatenate([pos, neg]))
    cuts = np.concatenate([[values[0] - 1.0], (values[1:] + values[:-1]) / 2, [values[-1] + 1.0]])
    missed = np.searchsorted(pos, cuts, "left") / len(pos)
    fooled = 1 - np.searchsorted(neg, cuts, "left") / len(neg)
    return float(cuts[np.argmin(missed + fooled)])


def soft_f1(probability: Array, active: Array, weight: Array) -> float:
    """F1 of graded verdicts at the natural prior.

    Args:
        probability: judged probability that the explanation holds for each text.
        active: whether the latent was active there.
        weight: inverse sampling propensities, so that rare strata do not count as common ones.
    """
    hit = float((weight * probability * active).sum())
    claimed, present = float((weight * probability).sum()), float((weight * active).sum())
    return 2 * hit / (claimed + present) if claimed + present > 0 else 0.0


def platt(
    positives: Sequence[float] | Array, negatives: Sequence[float] | Array, steps: int = 50
) -> tuple[float, float]:
    """(a, b) of P(shows it | verdict v) = 1 / (1 + exp(-(a v + b))), each class weighing one half.

    Targets are Platt's smoothed ones, so that a perfect separation does not send `a` to infinity. Newton's method.
    Reference: Platt 1999; Lin, Lin & Weng 2007.
    """
    pos, neg = _checked(positives, "positives"), _checked(negatives, "negatives")
    v = np.concatenate([pos, neg])
    centre, spread = float(v.mean()), float(v.std()) or 1.0
    x = np.stack([(v - centre) / spread, np.ones_like(v)], axis=1)
    y = np.concatenate([np.full(len(pos), (len(pos) + 1) / (len(pos) + 2)), np.full(len(neg), 1 / (len(neg) + 2))])
    w = np.concatenate([np.full(len(pos), 0.5 / len(pos)), np.full(len(neg), 0.5 / len(neg))])
    theta = np.zeros(2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -60, 60)))
        gradient = x.T @ (w * (p - y))
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        theta -= step / max(1.0, float(np.abs(step).max()) / 2)
        if np.abs(step).max() < 1e-10:
            break
    return float(theta[0] / spread), float(theta[1] - theta[0] * centre / spread)


def mean_estimate(
    values: Sequence[float] | Array, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over latents with a percentile bootstrap interval over latents; needs at least one value."""
    data = _checked(values, "values")
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(resamples, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    stderr = float(data.std(ddof=1) / len(data) ** 0.5) if len(data) > 1 else float("inf")
    if len(data) == 1:
        low, high = -np.inf, np.inf
    return Estimate(float(data.mean()), stderr, float(low), float(high), len(data))


def derangement(n: int, seed: int) -> npt.NDArray[np.int64]:
    """A random permutation [n] without fixed points: the shuffled null gives no latent its own explanation.

    Raises:
        ValueError: n < 2, for which there is none.
    """
    if n < 2:
        raise ValueError(f"a shuffled null needs at least 2 explanations, got {n}")
    rng = np.random.default_rng(seed)
    # A share of 1/e of all permutations qualifies, so this ends after about three draws.
    while True:
        order = rng.permutation(n)
        if not (order == np.arange(n)).any():
            return order


def shuffled_explanations(explanations: Sequence[str], seed: int) -> list[str]:
    """Explanations dealt to other latents; where equal texts allow it, nobody gets the same text back.

    Raises:
        ValueError: fewer than two explanations.
    """
    best: list[str] = []
    for attempt in range(20):
        dealt = [explanations[i] for i in derangement(len(explanations), seed + 7919 * attempt)]
        same = sum(a == b for a, b in zip(dealt, explanations, strict=True))
        if not best or same < sum(a == b for a, b in zip(best, explanations, strict=True)):
            best = dealt
        if not same:
            break
    return best


def _checked(values: Sequence[float] | Array, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: at least one verdict is needed")
    if np.isnan(array).any():
        raise ValueError(f"{name}: {int(np.isnan(array).sum())} verdicts are NaN; leave missing ones out")
    return array


def logit_interval(value: float, stderr: float, n_least: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    # Rule of three (in general -ln(alpha) / n): what zero observed errors in n still leave possible.
    unseen = min(0.5, -np.log(1 - level) / n_least)
    if value >= 1 or value <= 0:
        return (1 - unseen, 1.0) if value >= 1 else (0.0, unseen)
    centre, width = np.log(value / (1 - value)), z * stderr / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-(centre - width))), 1 / (1 + np.exp(-(centre + width)))
    return float(low), float(high)
