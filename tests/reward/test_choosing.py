"""Which latents are judged next, against Gaussian algebra and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from sae_ray.reward.choosing import (
    UNKNOWN_VARIANCE,
    Known,
    choose_by_value,
    expected_gains,
    spread_of,
    variance_after,
    variance_now,
)


def conditional_variance(covariance: np.ndarray, noise: np.ndarray) -> float:
    """Of the last of jointly Gaussian numbers, given the others as measured with these variances of noise."""
    seen, across = covariance[:-1, :-1] + np.diag(noise), covariance[:-1, -1]
    return float(covariance[-1, -1] - across @ np.linalg.solve(seen, across))


@pytest.mark.parametrize("cosine", [1.0, 0.9, 0.3, 0.0])
def test_what_is_unknown_of_a_latent_that_has_turned_is_a_gaussian_process_conditional(cosine):
    spread, error = 0.04, 0.1
    covariance = spread * np.array([[1, cosine], [cosine, 1]])
    then = variance_after(np.array(spread), np.array(error))
    assert float(variance_now(then, np.array(cosine), spread)) == pytest.approx(
        conditional_variance(covariance, np.array([error**2]))
    )


def some_known(n: int = 6, seed: int = 0) -> Known:
    rng = np.random.default_rng(seed)
    error = rng.uniform(0.05, 0.15, n)
    reward = rng.normal(0.25, 0.2, n)
    spread = spread_of(reward, error)
    cosine = rng.uniform(0.2, 1, n)
    return Known(np.arange(n) * 2, reward, error, variance_after(np.full(n, spread), error), cosine)


def test_a_gain_is_the_fall_of_the_weighted_error_when_the_latent_is_judged_once_more():
    known = some_known()
    density = np.random.default_rng(1).uniform(0.01, 0.3, 12)
    spread = spread_of(known.reward, known.error)
    gain = expected_gains(density, known)
    for place, latent in enumerate(known.latents):
        c, e2 = known.cosine[place], known.error[place] ** 2
        # r then, measured; r now, measured by the next round; r now.
        covariance = spread * np.array([[1, c, c], [c, 1, 1], [c, 1, 1]])
        before = conditional_variance(covariance[np.ix_([0, 2], [0, 2])], np.array([e2]))
        after = conditional_variance(covariance, np.array([e2, e2]))
        assert gain[latent] == pytest.approx(density[latent] * (before - after))
    noise = np.mean(known.error**2)
    assert gain[1] == pytest.approx(density[1] * spread**2 / (spread + noise))


def test_the_chosen_latents_lower_the_error_more_than_any_others():
    known = some_known()
    counts = np.random.default_rng(2).integers(20, 300, 12)
    gain = expected_gains(counts / 1000, known)
    chosen = choose_by_value(counts, 1000, 4, 20, 0.5, known, np.random.default_rng(0))
    best = max(itertools.combinations(range(12), 4), key=lambda subset: gain[list(subset)].sum())
    assert chosen.tolist() == sorted(best)


def test_a_latent_that_is_never_judged_or_has_turned_comes_before_one_that_is_known():
    known = replace(some_known(), cosine=np.array([1, 1, 1, 1, 1, 0.0]))
    counts = np.full(12, 100)
    chosen = choose_by_value(counts, 1000, 7, 20, 0.5, known, np.random.default_rng(0))
    assert set(chosen.tolist()) >= {1, 3, 5, 7, 9, 11}
    assert len(set(chosen.tolist()) & {0, 2, 4, 6, 8}) <= 1
    quiet = replace(known, error=np.full(6, 0.1))
    gain = expected_gains(counts / 1000, quiet)
    assert gain[10] == pytest.approx(gain[1])  # turned by 90 degrees: as if never judged
    assert (gain[[0, 2, 4, 6, 8]] < gain[1]).all()


def test_latents_that_cannot_be_judged_are_not_chosen_and_ties_are_the_seeds():
    counts = np.array([5, 30, 30, 30, 30, 30, 600])
    nothing = Known.nothing()
    drawn = {
        tuple(choose_by_value(counts, 1000, 3, 20, 0.5, nothing, np.random.default_rng(s)).tolist()) for s in range(20)
    }
    assert len(drawn) > 1
    assert {latent for some in drawn for latent in some} == {1, 2, 3, 4, 5}
    again = [choose_by_value(counts, 1000, 3, 20, 0.5, nothing, np.random.default_rng(7)).tolist() for _ in range(2)]
    assert again[0] == again[1]
    assert len(choose_by_value(counts, 1000, 9, 20, 0.5, nothing, np.random.default_rng(0))) == 5


def test_the_spread_of_rewards_is_without_their_noise():
    rng = np.random.default_rng(0)
    error = rng.uniform(0.05, 0.15, 20_000)
    reward = rng.normal(0.2, 0.1, len(error)) + error * rng.normal(size=len(error))
    assert spread_of(reward, error) == pytest.approx(0.01, rel=0.05)
    alike = error * rng.normal(size=len(error))
    assert 0 < spread_of(alike, error) < 0.15 * np.mean(error**2)
    assert spread_of(np.array([0.1, 0.4]), np.array([0.1, 0.1])) == UNKNOWN_VARIANCE


def weighted_error(by_value: bool, seed: int) -> float:
    """Mean over rounds of sum f (estimate - r)^2 in a world that is as assumed: Zipf densities, drifting rewards."""
    rng = np.random.default_rng(seed)
    n, per_round, spread, error = 200, 25, 0.02, 0.08
    counts = np.clip(8000 / (1 + np.arange(n)), 40, 4000).astype(int)
    stays = rng.uniform(0.8, 1, n)  # cosine from round to round
    r = rng.normal(0, spread**0.5, n)
    estimate, variance, cosine, measured = np.zeros(n), np.full(n, spread), np.ones(n), np.zeros(n)
    judged = np.zeros(n, dtype=bool)
    total = 0.0
    for _ in range(8):
        latents = np.flatnonzero(judged)
        known = Known(latents, measured[latents], np.full(len(latents), error), variance[latents], cosine[latents])
        if by_value:
            chosen = choose_by_value(counts, 10_000, per_round, 30, 0.5, known, rng)
        else:
            chosen = rng.choice(n, per_round, replace=False)
        prior, now = variance_now(variance, cosine, spread), cosine * estimate
        measured[chosen] = r[chosen] + error * rng.normal(size=per_round)
        now[chosen] += prior[chosen] / (prior[chosen] + error**2) * (measured[chosen] - now[chosen])
        total += float((counts / counts.sum() * (now - r) ** 2).sum()) / 8
        variance[chosen] = variance_after(prior[chosen], np.full(per_round, error))
        estimate[chosen], cosine[chosen], judged[chosen] = now[chosen], 1.0, True
        r = stays * r + np.sqrt(1 - stays**2) * rng.normal(0, spread**0.5, n)
        cosine = cosine * stays
    return total


def test_judging_by_value_leaves_less_error_than_judging_at_random():
    value, random = (np.mean([weighted_error(kind, seed) for seed in range(10)]) for kind in (True, False))
    assert value < 0.75 * random
