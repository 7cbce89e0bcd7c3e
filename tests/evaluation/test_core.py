"""Metrics against plain float64 references, and limits whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sae_ray.activations.block import Block
from sae_ray.config import HookConfig, ModelConfig
from sae_ray.corpus.reader import TokenBlock
from sae_ray.evaluation.core import PlacedSAE, ce_recovered, core_metrics, splice_losses
from sae_ray.sae.inference import TrainedSAE

D, M = 8, 24


def random_sae(scale=0.7, dtype=torch.float32) -> TrainedSAE:
    g = torch.Generator().manual_seed(1)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return TrainedSAE(r(M, D), r(M, D), r(M) * 0.1, r(D), r(M).abs(), "batchtopk", 1, scale)


def at(sae: TrainedSAE, layer: int = 1, site: str = "resid_post") -> PlacedSAE:
    return PlacedSAE(sae, HookConfig.model_validate({"layer": layer, "site": site}))


def identity_sae(d=D) -> TrainedSAE:
    eye, zero = torch.eye(d), torch.zeros(d)
    return TrainedSAE(
        torch.cat([eye, -eye]), torch.cat([eye, -eye]), torch.zeros(2 * d), zero, torch.zeros(2 * d), "batchtopk", 1
    )


def blocks_of(x_TD: torch.Tensor, n: int = 3, hooks: tuple[HookConfig, ...] = (HookConfig(layer=1),)) -> list[Block]:
    columns = {hook.name: (i * D, (i + 1) * D) for i, hook in enumerate(hooks)}
    return [
        Block(i, np.zeros((1, 1), np.int32), part.numpy(), np.zeros(len(part)), np.zeros(len(part)), columns)
        for i, part in enumerate(x_TD.chunk(n))
    ]


def test_core_metrics_equal_a_float64_reference():
    x_TD = torch.randn(100, D, generator=torch.Generator().manual_seed(0)) * 3 + 5
    sae = random_sae()
    got = core_metrics(blocks_of(x_TD), at(sae), batch_tokens=7)
    x = x_TD.double() * sae.input_scale
    pre = (x - sae.b_dec_D) @ sae.W_enc_MD.double().T + sae.b_enc_M
    f = pre.relu() * (pre >= sae.threshold)
    x_hat = f @ sae.W_dec_MD.double() + sae.b_dec_D
    assert got.fvu == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert got.l0 == pytest.approx(float((f > 0).sum(1).double().mean()))
    assert got.dead_fraction == pytest.approx(float((~(f > 0).any(0)).double().mean()))
    assert got.tokens == 100


def test_a_perfect_sae_has_no_unexplained_variance():
    got = core_metrics(blocks_of(torch.randn(50, D)), at(identity_sae()))
    assert got.fvu < 1e-10
    assert got.l0 == pytest.approx(D)
    assert got.dead_fraction == 0


def test_a_dead_sae_that_predicts_the_mean_has_fvu_one():
    x_TD = torch.randn(60, D) + 4
    sae = TrainedSAE(torch.zeros(M, D), torch.zeros(M, D), torch.zeros(M), x_TD.mean(0), torch.ones(M), "batchtopk", 1)
    got = core_metrics(blocks_of(x_TD), at(sae))
    assert got.fvu == pytest.approx(1, rel=1e-5)
    assert (got.l0, got.dead_fraction) == (0, 1)


def test_no_tokens_or_no_variance_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        core_metrics([], at(identity_sae()))
    with pytest.raises(ValueError, match="no variance"):
        core_metrics(blocks_of(torch.zeros(9, D)), at(identity_sae()))


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=D, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.mul_(15)  # random weights this size make losses that differ visibly
    folder = tmp_path_factory.mktemp("lm")
    model.save_pretrained(folder)
    return ModelConfig(name=str(folder), dtype="float32"), model


@pytest.fixture
def sequences() -> TokenBlock:
    tokens_SL = torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(3)).numpy().astype(np.int32)
    tokens_SL[4, 6:] = -1
    keep_SL = tokens_SL >= 0
    keep_SL[:, 0] = False
    return TokenBlock(tokens_SL, keep_SL)


def reference_loss(model, sequences, replacement_D=None, layer=1) -> float:
    """One sequence at a time, without padding, with the layers called by hand."""
    losses = []
    for tokens_L, keep_L in zip(sequences.tokens_SL, sequences.keep_SL, strict=True):
        ids = torch.from_numpy(tokens_L[tokens_L >= 0]).long()
        keep = torch.from_numpy(keep_L[tokens_L >= 0])

        def replace(_m, _a, out, keep=keep):
            out = out.clone()
            out[0, keep] = replacement_D
            return out

        handle = model.model.layers[layer].register_forward_hook(replace) if replacement_D is not None else None
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        if handle:
            handle.remove()
        losses.append(F.cross_entropy(logits[:-1].double(), ids[1:], reduction="none"))
    return float(torch.cat(losses).mean())


def test_losses_equal_those_of_hand_made_forward_passes(lm, sequences):
    cfg, model = lm
    got = ce_recovered(cfg, sequences, {"sae": at(identity_sae())}, batch_sequences=2, device="cpu")["sae"]
    assert got.clean == pytest.approx(reference_loss(model, sequences), rel=1e-5)
    assert got.zero_ablation == pytest.approx(reference_loss(model, sequences, torch.zeros(D)), rel=1e-5)
    with torch.no_grad():
        ids = torch.from_numpy(sequences.tokens_SL).long().clamp(min=0)
        acts = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    mean_D = acts[torch.from_numpy(sequences.keep_SL)].mean(0)
    assert got.mean_ablation == pytest.approx(reference_loss(model, sequences, mean_D), rel=1e-4)
    assert got.tokens == 4 * 11 + 5


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "resid_mid", "attn_out", "mlp_in", "mlp_out"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_perfect_sae_recovers_everything_at_every_site(lm, sequences, site, layer):
    _, model = lm
    got = splice_losses(model, sequences, {"sae": at(identity_sae(), layer, site)})["sae"]
    assert got.sae == pytest.approx(got.clean, abs=1e-4)
    assert got.zero_ablation != pytest.approx(got.clean, abs=1e-3)


def test_an_sae_that_outputs_zero_recovers_nothing_against_zero_ablation(lm, sequences):
    _, model = lm
    zero = TrainedSAE(
        torch.zeros(M, D), torch.zeros(M, D), torch.zeros(M), torch.zeros(D), torch.ones(M), "batchtopk", 1
    )
    got = splice_losses(model, sequences, {"sae": at(zero)})["sae"]
    assert got.sae == got.zero_ablation
    assert got.recovered_vs_zero in (None, 0)


def test_masked_positions_go_through_unchanged(lm, sequences):
    _, model = lm
    nothing = TokenBlock(sequences.tokens_SL, np.zeros_like(sequences.keep_SL))
    got = splice_losses(model, nothing, {"sae": at(random_sae())})["sae"]
    assert got.sae == got.clean == got.zero_ablation == got.mean_ablation
    assert got.recovered_vs_zero is None


def test_several_saes_at_several_points_score_as_each_does_alone(lm, sequences):
    _, model = lm
    saes = {"a": at(random_sae(0.1)), "b": at(random_sae(0.2), 1), "c": at(random_sae(0.1), 0, "mlp_out")}
    together = splice_losses(model, sequences, saes)
    for name, placed in saes.items():
        assert together[name] == splice_losses(model, sequences, {name: placed})[name]
    assert together["a"].sae != together["b"].sae
    assert together["a"].mean_ablation == together["b"].mean_ablation != together["c"].mean_ablation


def test_a_transcoder_is_measured_on_what_it_reconstructs():
    """An identity is perfect where target and input are equal, and misses exactly what separates them elsewhere."""
    hooks = HookConfig(layer=1, site="mlp_in"), HookConfig(layer=1, site="mlp_out")
    x_TD = torch.randn(60, D)
    noise_TD = 0.1 * torch.randn(60, D)
    blocks = blocks_of(torch.cat([x_TD, x_TD + noise_TD], dim=1), hooks=hooks)
    got = core_metrics(blocks, PlacedSAE(identity_sae(), *hooks))
    y_TD = (x_TD + noise_TD).double()
    expected = noise_TD.double().square().sum() / (y_TD - y_TD.mean(0)).square().sum()
    assert got.fvu == pytest.approx(float(expected), rel=1e-4)


def test_a_transcoder_replaces_its_target_by_what_it_reads_in_the_same_pass(lm, sequences):
    """An identity from the MLP's input to its output makes the MLP the identity: so does a model without one."""
    _, model = lm
    hooks = HookConfig(layer=1, site="mlp_in"), HookConfig(layer=1, site="mlp_out")
    got = splice_losses(model, sequences, {"t": PlacedSAE(identity_sae(), *hooks)})["t"]
    everything = TokenBlock(sequences.tokens_SL, sequences.tokens_SL >= 0)
    all_kept = splice_losses(model, everything, {"t": PlacedSAE(identity_sae(), *hooks)})["t"]
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = torch.nn.Identity()
    try:
        expected = reference_loss(model, sequences)
    finally:
        model.model.layers[1].mlp = mlp
    assert all_kept.sae == pytest.approx(expected, rel=1e-5)
    assert got.sae != pytest.approx(expected, rel=1e-5)  # masked positions keep their MLP
    assert got.clean == pytest.approx(reference_loss(model, sequences), rel=1e-5)
