"""Whether an imported SAE can start a training, and that the form it starts in computes the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_saes import OUT, D, M, raw_activations, small_sae

from sae_ray.config import SAEConfig
from sae_ray.errors import UserError
from sae_ray.sae.architectures import REGISTRY
from sae_ray.sae.formats import check_fits


def config(architecture: str = "batchtopk", **changes) -> SAEConfig:
    coef = {"sparsity_coef": 1e-3} if architecture in ("relu_l1", "gated") else {}
    return SAEConfig(architecture=architecture, **{"d_sae": M, "k": 5, "init_from": "there/sae", **coef, **changes})


def uneven(sae):
    return replace(sae, W_dec_MD=sae.W_dec_MD * torch.linspace(0.5, 3, M)[:, None])


@pytest.mark.parametrize(
    ("sae", "cfg", "widths", "said"),
    [
        (small_sae("jumprelu"), config(), (D,), "is a jumprelu, .* write sae.architecture: jumprelu"),
        (small_sae(), config(d_sae=80), (D,), "has 40 latents, sae.d_sae is 80; write sae.d_sae: 40"),
        (small_sae("topk"), config("topk", k=6), (D,), "has k 5, sae.k is 6; write sae.k: 5"),
        (small_sae(), config(), (13,), "reads activations of width 12, the hook point's is 13"),
        (small_sae(d_out=OUT), config(), (D, 8), "reconstructs activations of width 7, the hook point's is 8"),
        (small_sae(d_out=OUT), config(), (None,), "is a transcoder; name the hook point .* under hook_out"),
        (small_sae(d_out=D), config(), (D,), "is a transcoder; name the hook point .* under hook_out"),
        (uneven(small_sae()), config(), (D,), "norms .* from 0.5 to 3, .* write sae.decoder_norm: free"),
    ],
)
def test_an_sae_that_does_not_fit_says_what_to_write(sae, cfg, widths, said):
    with pytest.raises(UserError, match=r"^sae\.init_from there/sae: .*" + said):
        check_fits(sae, cfg, *widths)


@pytest.mark.parametrize("architecture", REGISTRY)
@pytest.mark.parametrize("centred", [True, False])
def test_the_form_it_starts_in_computes_the_same(architecture, centred):
    raw = raw_activations()
    sae = small_sae(architecture, subtract_b_dec=not centred)
    if architecture in ("relu_l1", "jumprelu", "gated"):
        sae = uneven(sae)
    ready = check_fits(sae, config(architecture, subtract_b_dec=centred), D)
    torch.testing.assert_close(ready.W_dec_MD.norm(dim=1), torch.ones(M))
    assert ready.subtract_b_dec is centred
    assert torch.equal(ready.encode(raw) > 0, sae.encode(raw) > 0)
    torch.testing.assert_close(ready.reconstruct(raw), sae.reconstruct(raw), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d_out", [None, OUT])
def test_rows_of_one_norm_become_unit_by_another_scale_and_keep_every_activation(d_out):
    sae, raw = small_sae(d_out=d_out), raw_activations()
    sae = replace(sae, W_dec_MD=sae.W_dec_MD * 2.5)
    ready = check_fits(sae, config(), D, d_out)
    torch.testing.assert_close(ready.W_dec_MD.norm(dim=1), torch.ones(M))
    assert torch.equal(ready.threshold, sae.threshold)
    torch.testing.assert_close(ready.encode(raw), sae.encode(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ready.reconstruct(raw), sae.reconstruct(raw), rtol=1e-4, atol=1e-4)


def test_a_free_decoder_stays_as_it_is():
    sae = uneven(small_sae())
    assert torch.equal(check_fits(sae, config(decoder_norm="free"), D).W_dec_MD, sae.W_dec_MD)
