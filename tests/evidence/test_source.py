"""Activations and margins against the SAE itself, for every architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_saes import D, K, M, raw_activations, small_sae

from sae_ray.errors import UserError
from sae_ray.evidence import source as source_module
from sae_ray.evidence.source import RandomDirections, SAELatents
from sae_ray.sae.architectures import REGISTRY


@pytest.mark.parametrize("architecture", list(REGISTRY))
@pytest.mark.parametrize("latents", [None, [31, 2, 7]])
def test_activations_are_the_saes_and_the_margins_sign_says_which_are_active(architecture, latents):
    sae, raw_TD = small_sae(architecture), raw_activations()
    source = SAELatents(sae, latents)
    f_TN, margin_TN = source.activations(raw_TD)
    wanted = sae.encode(raw_TD)[:, source.latents]
    torch.testing.assert_close(f_TN, wanted)
    assert f_TN.dtype == margin_TN.dtype == torch.float32
    assert (f_TN > 0).any()
    assert (margin_TN[f_TN > 0] >= 0).all()
    assert (margin_TN[f_TN == 0] <= 0).all()


def test_a_topk_margin_is_the_distance_to_the_tokens_own_kth_latent():
    raw_TD = raw_activations()
    for slack in (0.0, 0.2):
        sae = replace(small_sae("topk"), margin=slack)
        _, margin_TN = SAELatents(sae, [3, 9]).activations(raw_TD)
        pre_TM = sae.pre_activations(raw_TD)
        for token in range(len(raw_TD)):
            kth = sorted(pre_TM[token].clamp(min=0).tolist(), reverse=True)[K - 1]
            expected = pre_TM[token, [3, 9]] - max(kth - slack, 0)
            torch.testing.assert_close(margin_TN[token], expected)


def test_chunks_change_nothing(monkeypatch):
    raw_TD = raw_activations(300)
    for architecture in ("topk", "jumprelu"):
        source = SAELatents(small_sae(architecture))
        whole = source.activations(raw_TD)
        monkeypatch.setattr(source_module, "CHUNK_ELEMENTS", 1)
        for one, other in zip(whole, source.activations(raw_TD), strict=True):
            torch.testing.assert_close(one, other)
        monkeypatch.undo()


def test_the_sae_is_not_changed():
    sae, raw_TD = small_sae("batchtopk"), raw_activations()
    before = sae.encode(raw_TD)
    SAELatents(sae).activations(raw_TD)
    assert torch.equal(sae.encode(raw_TD), before)


@pytest.mark.parametrize(("latents", "says"), [([M], "0 to 39"), ([-1], "-1"), ([1, 1], "twice"), ([], "none")])
def test_latents_that_are_not_there_are_refused(latents, says):
    with pytest.raises(UserError, match=says):
        SAELatents(small_sae(), latents)


def test_random_directions_fire_as_often_as_they_are_told_to():
    raw_TD = raw_activations(4000) + 3
    densities = np.array([0.3, 0.01, 0.6, 0.1, 0.00025])
    source = RandomDirections(raw_TD[:2000], densities, seed=3)
    f_TN, margin_TN = source.activations(raw_TD[:2000])
    assert (f_TN > 0).sum(0).tolist() == [600, 20, 1200, 200, 1]
    assert ((f_TN > 0) == (margin_TN > 0)).all()
    f_TN, _ = source.activations(raw_TD[2000:])
    assert (f_TN > 0).double().mean(0).numpy()[[0, 2, 3]] == pytest.approx(densities[[0, 2, 3]], abs=0.05)
    assert source.latents.tolist() == [0, 1, 2, 3, 4]
    assert source.directions_ND.norm(dim=1).numpy() == pytest.approx(1)
    again = RandomDirections(raw_TD[:2000], densities, seed=3)
    assert torch.equal(again.directions_ND, source.directions_ND)
    assert (source.directions_ND @ source.directions_ND.T).fill_diagonal_(0).abs().max() < 0.95
    assert source.directions_ND.shape == (5, D)


def test_a_density_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="above 0 and below 1"):
        RandomDirections(raw_activations(), [0.1, 0.0])
