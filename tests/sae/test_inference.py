"""A trained SAE of each architecture computes its definition, written out here in float64 and token by token."""

from __future__ import annotations

import math

import pytest
import torch
from small_saes import OUT, D, M, as_double, raw_activations, small_sae

from sae_ray.errors import UserError
from sae_ray.sae.architectures import REGISTRY
from sae_ray.sae.inference import TrainedSAE

CASES = [
    *((name, {}) for name in REGISTRY),
    *((name, {"d_out": OUT}) for name in REGISTRY),
    *((name, {"subtract_b_dec": False}) for name in REGISTRY),
    ("topk", {"margin": 0.4}),
]


def activations_of_token(sae: TrainedSAE, raw: list[float]) -> list[float]:
    x = [value * sae.input_scale for value in raw]
    if sae.subtract_b_dec:
        x = [value - bias for value, bias in zip(x, sae.b_dec_D.tolist(), strict=True)]
    rows, bias = sae.W_enc_MD.tolist(), sae.b_enc_M.tolist()
    dots = [sum(w * value for w, value in zip(row, x, strict=True)) for row in rows]
    pre = [dot + b for dot, b in zip(dots, bias, strict=True)]
    if sae.architecture == "gated":
        r_mag, b_mag = sae.own["r_mag"].tolist(), sae.own["b_mag"].tolist()
        mag = [d * math.exp(r) + b for d, r, b in zip(dots, r_mag, b_mag, strict=True)]
        return [max(m, 0.0) if p > 0 else 0.0 for p, m in zip(pre, mag, strict=True)]
    threshold = sae.threshold.expand(len(pre)).tolist()
    if sae.architecture == "topk":
        cut = sorted(pre)[-sae.k] - sae.margin
        return [p if p >= cut and p > 0 else 0.0 for p in pre]
    if sae.architecture == "relu_l1":
        return [max(p, 0.0) for p in pre]
    if sae.architecture == "jumprelu":
        return [p if p > t else 0.0 for p, t in zip(pre, threshold, strict=True)]
    return [p if p >= t else 0.0 for p, t in zip(pre, threshold, strict=True)]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_encode_and_decode_are_the_definition(architecture, options):
    sae, raw_TD = as_double(small_sae(architecture, **options)), raw_activations(8).double()
    expected = torch.tensor([activations_of_token(sae, raw) for raw in raw_TD.tolist()], dtype=torch.float64)
    f_TM = sae.encode(raw_TD)
    assert 0 < f_TM.count_nonzero() < f_TM.numel()
    assert torch.equal(f_TM > 0, expected > 0)
    torch.testing.assert_close(f_TM, expected, rtol=1e-11, atol=1e-11)
    scale = sae.input_scale if sae.output_scale is None else sae.output_scale
    by_latent = sum(expected[:, i, None] * sae.W_dec_MD[i] for i in range(M)) + sae.b_dec_D
    torch.testing.assert_close(sae.decode(f_TM), by_latent / scale, rtol=1e-11, atol=1e-11)
    assert sae.reconstruct(raw_TD).shape == (8, options.get("d_out") or D)


@pytest.mark.parametrize("architecture", REGISTRY)
def test_one_latent_alone_is_its_column(architecture):
    sae, raw_TD = small_sae(architecture), raw_activations()
    f_TM = sae.encode(raw_TD)
    for latent in (0, 17, M - 1):
        alone_T = sae.encode_latent(raw_TD, latent)
        if architecture == "topk":  # gated by the running threshold: no other latent is looked at
            pre_T = sae.pre_activations(raw_TD)[:, latent]
            torch.testing.assert_close(alone_T, torch.where(pre_T >= 0.7, pre_T, 0))
        else:
            torch.testing.assert_close(alone_T, f_TM[:, latent])


def test_a_pre_activation_equal_to_its_threshold_passes_batchtopk_and_not_jumprelu():
    eye, zeros = torch.eye(2), torch.zeros(2)
    at_threshold = torch.tensor([[0.7, 0.8]])
    batchtopk = TrainedSAE(eye, eye, zeros, zeros, torch.tensor(0.7), "batchtopk", 1)
    jumprelu = TrainedSAE(eye, eye, zeros, zeros, torch.full((2,), 0.7), "jumprelu", 1)
    assert batchtopk.encode(at_threshold).count_nonzero() == 2
    assert jumprelu.encode(at_threshold).count_nonzero() == 1
    assert jumprelu.encode_latent(at_threshold, 0).count_nonzero() == 0


def test_ties_of_a_topk_go_to_the_first_latents():
    sae = TrainedSAE(torch.ones(4, 1), torch.ones(4, 1), torch.zeros(4), torch.zeros(1), torch.zeros(()), "topk", 2)
    assert sae.encode(torch.ones(1, 1)).tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("architecture", REGISTRY)
def test_a_checkpoint_of_each_architecture_is_read(architecture):
    sae = small_sae(architecture, d_out=OUT)
    tensors = {
        "W_enc": sae.W_enc_MD,
        "W_dec": sae.W_dec_MD,
        "b_enc": sae.b_enc_M,
        "b_dec": sae.b_dec_D,
        "threshold": torch.tensor(0.7),
    }
    if architecture == "jumprelu":
        tensors |= {"theta": sae.threshold}
    if architecture == "gated":
        tensors |= sae.own
    manifest = {"architecture": architecture, "k": 5, "input_scale": 0.31, "output_scale": 0.83}
    manifest |= {"subtract_b_dec": False, "margin": 0.0, "input_norm": "sqrt_d"}
    again = TrainedSAE.from_checkpoint(tensors, manifest)
    raw_TD = raw_activations()
    assert torch.equal(again.encode(raw_TD), sae.encode(raw_TD))
    assert torch.equal(again.reconstruct(raw_TD), sae.reconstruct(raw_TD))
    assert again.is_transcoder
    assert (again.input_norm, again.k) == ("sqrt_d", 5)


def test_an_unknown_architecture_is_an_error_and_not_a_guess():
    with pytest.raises(UserError, match=r"'wavelet' is unknown; known: batchtopk"):
        TrainedSAE(*[torch.ones(1, 1)] * 2, *[torch.zeros(1)] * 2, torch.zeros(()), "wavelet", 1).encode(
            torch.ones(1, 1)
        )
