from __future__ import annotations

import numpy as np
import pytest

from sae_ray.evidence.statistics import FiringStatistics


def fed(rng: np.random.Generator, distinct: int) -> tuple[FiringStatistics, np.ndarray, np.ndarray]:
    """Two latents: one fires on few ids, one on very many, most of them rare."""
    statistics = FiringStatistics(2, distinct)
    tokens, latents = [], []
    for _ in range(20):
        token_T = np.where(rng.random(500) < 0.5, rng.integers(0, 8, 500), rng.integers(0, 3000, 500)).astype(np.int32)
        fires_TN = np.stack([token_T < 8, rng.random(500) < 0.9], axis=1)
        row_P, latent_P = np.nonzero(fires_TN)
        statistics.add(row_P, latent_P, token_T)
        statistics.settle()
        tokens.append(token_T[row_P])
        latents.append(latent_P)
    return statistics, np.concatenate(tokens), np.concatenate(latents)


def exact(tokens: np.ndarray) -> tuple[float, dict[int, float]]:
    ids, counts = np.unique(tokens, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum()), dict(zip(ids.tolist(), share.tolist(), strict=True))


def test_profiles_are_exact_while_the_table_holds_every_id():
    statistics, tokens, latents = fed(np.random.default_rng(0), 4000)
    for column in range(2):
        entropy, shares = exact(tokens[latents == column])
        profile = statistics.profile(column)
        assert profile.entropy == pytest.approx(entropy)
        assert profile.lost_share == 0
        assert profile.unigram_share == pytest.approx(max(shares.values()))
        assert all(share == pytest.approx(shares[token]) for token, share in profile.top)


def test_a_full_table_states_its_error_and_keeps_to_it():
    statistics, tokens, latents = fed(np.random.default_rng(0), 64)
    assert statistics.profile(0).lost_share == 0
    entropy, shares = exact(tokens[latents == 1])
    profile = statistics.profile(1)
    assert 0.2 < profile.lost_share < 0.6
    assert {token for token, _ in profile.top[:8]} == set(range(8))
    for token, share in profile.top:
        assert shares[token] - profile.lost_share <= share <= shares[token] + 1e-12
    p = profile.lost_share
    assert abs(profile.entropy - entropy) < p * np.log(3000) - p * np.log(p) - (1 - p) * np.log(1 - p)
    assert profile.entropy == pytest.approx(entropy, rel=0.1)
    assert statistics.nbytes < 8000


def test_a_latent_that_never_fires_has_no_entropy():
    profile = FiringStatistics(1).profile(0)
    assert np.isnan(profile.entropy)
    assert np.isnan(profile.unigram_share)
    assert profile.top == ()
