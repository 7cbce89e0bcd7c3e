"""Which latents to judge next: those whose verdicts are expected to lower the error of the rewards most.

What a round is for: rewards r_j whose errors, weighted by how often the latent fires, are small. A reward acts where
its latent fires, so with f_j the share of contexts in which latent j is active, u_j the variance of what is not yet
known of r_j, and errors of different latents independent,

    error = sum_j f_j E[(estimate_j - r_j)^2] = sum_j f_j u_j

A round's verdicts on latent j measure r_j with variance e_j^2. By Bayes (Gaussian) they leave 1 / (1 / u + 1 / e^2), so

    gain_j = f_j u_j^2 / (u_j + e_j^2)

is by how much judging j lowers the error. The gains add up, so the n largest are the best n latents.

What u_j is. The rewards of all latents vary with variance V around their mean: that is all that is known of a latent
that was never judged, u = V (explored in order of frequency, before any that is known well). The reward of a latent
that turns is a stationary process over its directions, with correlation c = the cosine between them: known to v when it
was last judged, it is now known to

    u = c^2 v + (1 - c^2) V

(the posterior of a Gaussian process with kernel V c). A latent that stays where it is stays known: u = v; one that has
turned away is as if it had never been judged. V is estimated by moments: the variance of the measured rewards less the
mean of their errors' squares.

Suffixes: M all latents, N judged ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Where fewer than three rewards are known: the variance of a reward that is anywhere between none and the best (0.5).
UNKNOWN_VARIANCE = 0.5**2 / 12
# Of the mean squared error: rewards always differ a little, also where their errors alone explain what is seen.
LEAST_VARIANCE = 0.1


@dataclass(frozen=True)
class Known:
    """What earlier rounds have told, one entry for each latent that was ever judged."""

    latents: np.ndarray  # int64 [N], ascending
    reward: np.ndarray  # float64 [N]: as last measured
    error: np.ndarray  # float64 [N]: standard error of that measurement alone
    variance: np.ndarray  # float64 [N]: of what was unknown of the reward after it
    cosine: np.ndarray  # float64 [N]: of the latent's direction now and then

    @classmethod
    def nothing(cls) -> Known:
        return cls(np.empty(0, dtype=np.int64), *(np.empty(0) for _ in range(4)))


def spread_of(reward_N: np.ndarray, error_N: np.ndarray) -> float:
    """V: the variance of rewards between latents, without that of their measurement."""
    if len(reward_N) < 3:
        return UNKNOWN_VARIANCE
    noise = float(np.mean(error_N**2))
    return max(float(np.var(reward_N, ddof=1)) - noise, LEAST_VARIANCE * noise, 1e-12)


def variance_now(variance: np.ndarray, cosine: np.ndarray, spread: float) -> np.ndarray:
    """u: after a turn by `cosine` (one of 90 degrees or more forgets everything)."""
    kept = np.clip(cosine, 0, 1) ** 2
    return kept * np.minimum(variance, spread) + (1 - kept) * spread


def variance_after(variance: np.ndarray, error: np.ndarray) -> np.ndarray:
    """What a measurement with this standard error leaves of a variance."""
    return variance * error**2 / (variance + error**2)


def expected_gains(density_M: np.ndarray, known: Known) -> np.ndarray:
    """float64 [M]: by how much judging each latent is expected to lower the weighted error of the rewards.

    Args:
        density_M: share of contexts in which each latent is active.
    """
    spread = spread_of(known.reward, known.error)
    noise = float(np.mean(known.error**2)) if len(known.error) else spread
    unknown_M = np.full(len(density_M), spread)
    noise_M = np.full(len(density_M), noise)
    unknown_M[known.latents] = variance_now(known.variance, known.cosine, spread)
    noise_M[known.latents] = known.error**2
    return np.asarray(density_M * unknown_M**2 / (unknown_M + noise_M))


def choose_by_value(
    counts_M: np.ndarray,
    n_contexts: int,
    n: int,
    need: int,
    max_share: float,
    known: Known,
    rng: np.random.Generator,
) -> np.ndarray:
    """The `n` latents of the largest expected gain among those that can be judged; ties are drawn by `rng`.

    Args:
        counts_M, need, max_share: as in `evidence.choose_latents`.
    Returns:
        Sorted global latent ids, at most `n`.
    """
    gain_M = expected_gains(counts_M / n_contexts, known)
    tie_M = rng.random(len(gain_M))
    eligible = np.flatnonzero((counts_M >= need) & (counts_M <= max_share * n_contexts))
    best = eligible[np.lexsort((tie_M[eligible], -gain_M[eligible]))]
    return np.sort(best[:n])
