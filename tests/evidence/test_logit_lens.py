"""The lens against a real model: what a direction does to the logits it has."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae_ray.activations.subject import load_full_model, load_tokenizer
from sae_ray.config import ModelConfig
from sae_ray.errors import UserError
from sae_ray.evidence import logit_lens
from sae_ray.evidence.logit_lens import (
    Unembedding,
    output_effects,
    output_logits,
    output_tokens,
    promoted,
    suppressed,
)


class Letters:
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def decode(self, ids: list[int]) -> str:
        return f"t{ids[0]}"


def test_tokens_are_those_of_the_largest_and_smallest_centred_logits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    W_ND, U_VD, norm_D = (torch.randn(*shape, generator=generator) for shape in ((9, 5), (30, 5), (5,)))
    effect = (W_ND.double() * norm_D) @ U_VD.double().T
    effect -= effect.mean(1, keepdim=True)
    lens = Unembedding(U_VD, norm_D)
    assert output_effects(W_ND, lens).numpy() == pytest.approx(effect.numpy(), abs=1e-4)
    monkeypatch.setattr(logit_lens, "_BLOCK_ELEMENTS", 70)
    up, down = promoted(W_ND, lens, Letters(30), 3), suppressed(W_ND, lens, Letters(30), 3)
    for latent in range(9):
        order = np.argsort(-effect[latent].numpy())
        assert [text for text, _ in up[latent]] == [f"t{token}" for token in order[:3]]
        assert [text for text, _ in down[latent]] == [f"t{token}" for token in order[::-1][:3]]
        assert [value for _, value in up[latent]] == pytest.approx(effect[latent][order[:3].copy()].numpy(), abs=1e-4)


def test_a_decoder_of_another_width_is_refused():
    with pytest.raises(UserError, match="width 4, the output layer reads 5"):
        output_effects(torch.ones(1, 4), Unembedding(torch.ones(7, 5), torch.ones(5)))


@pytest.fixture(scope="module")
def smollm():
    cfg = ModelConfig()
    return load_full_model(cfg, torch.float32, "cpu"), load_tokenizer(cfg)


def test_the_lens_is_the_slope_of_a_tied_models_own_logits(smollm):
    model, tokenizer = smollm
    lens = output_logits(model, tokenizer)
    assert lens.weight_VD.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    generator = torch.Generator().manual_seed(1)
    residual_D = torch.randn(model.config.hidden_size, generator=generator)
    # A direction at right angles to the residual leaves the norm's divisor as it is, to first order.
    direction_D = torch.randn(model.config.hidden_size, generator=generator)
    direction_D -= (direction_D @ residual_D) / residual_D.square().sum() * residual_D
    with torch.no_grad():
        step = 1e-2
        ends = [model.lm_head(model.model.norm(residual_D + sign * step * direction_D)) for sign in (1, -1)]
    slope_V = (ends[0] - ends[1]) / (2 * step) * residual_D.square().mean().sqrt()
    slope_V = slope_V[: len(tokenizer)] - slope_V[: len(tokenizer)].mean()
    effect_V = output_effects(direction_D[None], lens)[0]
    assert float(torch.corrcoef(torch.stack([slope_V, effect_V]))[0, 1]) > 0.9999
    assert effect_V.numpy() == pytest.approx(slope_V.numpy(), abs=0.02 * float(effect_V.abs().max()))


def test_the_direction_that_tells_a_token_apart_promotes_it(smollm):
    model, tokenizer = smollm
    lens = output_logits(model, tokenizer)
    token = tokenizer.encode(" Paris", add_special_tokens=False)[0]
    weight_VD = lens.weight_VD.double()
    apart_D = torch.linalg.solve(weight_VD.T.cov(), weight_VD[token] - weight_VD.mean(0)) / lens.norm_D
    ((up, down),) = output_tokens(apart_D[None], lens, tokenizer, 5)
    assert up[0][0] == " Paris"
    assert all(value > 0 for _, value in up)
    assert all(value < 0 for _, value in down)


def test_a_layer_norm_takes_the_mean_off():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    model = GPT2LMHeadModel(config).eval()
    lens = output_logits(model, Letters(20))
    assert lens.centred
    assert torch.allclose(output_effects(torch.ones(1, 8), lens), torch.zeros(1, 20), atol=1e-6)


def test_a_model_without_a_known_norm_is_refused():
    head = torch.nn.Linear(3, 5)
    model = SimpleNamespace(get_output_embeddings=lambda: head, base_model_prefix="model", model=SimpleNamespace())
    with pytest.raises(UserError, match="final norm"):
        output_logits(model, Letters(5))
