from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_ray.evidence import siblings
from sae_ray.evidence.siblings import TextSample, jaccard, nearest_by_cooccurrence, nearest_by_decoder
from sae_ray.evidence.slots import BestTexts


def samples_of(active_TN: np.ndarray, slots: int, seed: int) -> TextSample:
    """Of texts in which latents are active, as the collector fills it."""
    keys = np.random.default_rng(seed).integers(0, 1 << 62, len(active_TN)) * 2 + 1
    sample = BestTexts(active_TN.shape[1], slots, np.int64)
    for text, key in enumerate(keys.tolist()):
        who = np.flatnonzero(active_TN[text])
        sample.offer(who, np.full(len(who), -key), key, text, seen=False)
    return TextSample.of(sample)


def correlated(texts: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    active_TN = rng.random((texts, 6)) < np.array([0.3, 0.3, 0.05, 0.2, 0.1, 0.02])
    active_TN[:, 1] = np.where(rng.random(texts) < 0.8, active_TN[:, 0], active_TN[:, 1])
    active_TN[:, 4] = active_TN[:, 3] & (rng.random(texts) < 0.5)
    return active_TN


def true_jaccard(active_TN: np.ndarray, one: int, other: int) -> float:
    both = (active_TN[:, one] & active_TN[:, other]).sum()
    return float(both / (active_TN[:, one] | active_TN[:, other]).sum())


def test_the_jaccard_index_is_exact_while_no_text_was_turned_away():
    active_TN = correlated(300)
    sample = samples_of(active_TN, 200, 1)
    for one in range(6):
        got = jaccard([sample], one, np.arange(6))
        assert got == pytest.approx([true_jaccard(active_TN, one, other) for other in range(6)])


def test_the_jaccard_index_is_estimated_without_bias_from_full_samples():
    active_TN = correlated(2000)
    got = np.array([jaccard([samples_of(active_TN, 60, seed)], 0, np.array([1, 2, 3])) for seed in range(30)])
    wanted = [true_jaccard(active_TN, 0, other) for other in (1, 2, 3)]
    assert np.abs(got.mean(0) - wanted).max() < 0.04
    assert got.std(0).max() < 0.12


@pytest.mark.parametrize("budget", [50_000_000, 3000])
def test_the_latents_that_co_occur_most_are_found(monkeypatch, budget):
    monkeypatch.setattr(siblings, "_BLOCK_ROWS", 4)
    monkeypatch.setattr(siblings, "_PAIR_BUDGET", budget)
    found = nearest_by_cooccurrence([samples_of(correlated(1500), 80, seed) for seed in (1, 2)], 2)
    assert found[0][0] == 1
    assert found[1][0] == 0
    assert found[3][0] == 4
    assert found[4][0] == 3
    assert all(latent not in near for latent, near in enumerate(found))


def test_the_nearest_rows_are_those_of_the_whole_cosine_matrix():
    W_ND = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.rand(50, 1)
    columns, cosines = nearest_by_decoder(W_ND, 4, block=7)
    unit = (W_ND / W_ND.norm(dim=1, keepdim=True)).double()
    cosine = (unit @ unit.T).fill_diagonal_(-9)
    best = cosine.topk(4, dim=1)
    assert (columns == best.indices.numpy()).all()
    assert cosines == pytest.approx(best.values.numpy(), abs=1e-5)
    assert nearest_by_decoder(W_ND[:3], 9)[0].shape == (3, 2)
