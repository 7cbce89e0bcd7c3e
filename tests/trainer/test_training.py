"""What training does over many steps: dead latents come back, L0 reaches its target, precision is enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.errors import UserError
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer
from sae_ray.trainer.warm_start import warm_start

D_IN, D_SAE, BATCH = 48, 192, 256


def stream(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of sums of a few of 96 directions, off centre: what an SAE is made for."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(96, D_IN, generator=torch.Generator().manual_seed(99)), dim=1
    )
    out = []
    for _ in range(n):
        on = torch.rand(BATCH, 96, generator=generator) < 0.05
        out.append((on * (1 + torch.rand(BATCH, 96, generator=generator))) @ directions * 3 + 2)
    return out


def new_trainer(architecture: str = "batchtopk", trainer: dict[str, Any] | None = None, **sae: Any) -> ShardedTrainer:
    sae_cfg = SAEConfig(**{"architecture": architecture, "d_sae": D_SAE, "k": 6, "aux_k": 0, **sae})
    settings = {"lr": 3e-3, "steps": 300, "warmup_steps": 10, "log_every": 5, "tp": 1, **(trainer or {})}
    return ShardedTrainer(sae_cfg, TrainerConfig(**settings), D_IN, 7, Collectives(Mesh.alone()))


def train(trained: ShardedTrainer, steps: int) -> list[dict[str, float]]:
    data = stream(steps)
    trained.initialise(data[0])
    for raw in data:
        trained.step(raw, len(raw))
    return trained.read_metrics()


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("relu_l1", {"sparsity_coef": 0.02}),
        ("gated", {"sparsity_coef": 0.02}),
        ("topk", {}),
        ("batchtopk", {}),
        ("matryoshka", {}),
        ("jumprelu", {}),
    ],
)
def test_every_architecture_learns(architecture, extra):
    rows = train(new_trainer(architecture, **extra), 120)
    assert rows[-1]["fvu"] < 0.7 * rows[0]["fvu"]
    assert rows[-1]["fvu"] < 0.5


@pytest.mark.parametrize("target", [3, 12])
def test_jumprelu_reaches_its_target_l0_within_five_percent(target):
    rows = train(new_trainer("jumprelu", k=target), 300)
    last = [row["l0"] for row in rows[-10:]]
    assert sum(last) / len(last) == pytest.approx(target, rel=0.05)
    assert rows[-1]["fvu"] < rows[0]["fvu"]


@pytest.mark.parametrize("kind", ["l1", "l2", "hoyer", "p_norm", "cross"])
def test_every_penalty_makes_relu_sparser(kind):
    weak = train(new_trainer("relu_l1", sparsity=kind, sparsity_coef=1e-6), 120)[-1]
    coef = 1.0 if kind == "l2" else 0.1
    strong = train(new_trainer("relu_l1", sparsity=kind, sparsity_coef=coef), 120)[-1]
    assert strong["l0"] < 0.9 * weak["l0"]
    assert strong["penalty"] > weak["penalty"]


def moved_by_one_step(trained: ShardedTrainer) -> torch.Tensor:
    """Which dead latents' encoders one step moves, momentum aside, though they did not fire in it: [m] bool."""
    for moments in trained.optimiser.torch.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name].zero_()
    before, dead = trained.W_enc_mD.clone(), trained.dead_m.clone()
    assert 0 < trained.n_dead < D_SAE
    raw = stream(1, seed=5)[0]
    trained.step(raw, len(raw))
    return (trained.W_enc_mD != before).any(1) & dead & (trained.silent_m > 0)


def test_aux_k_gives_gradient_to_the_encoders_of_dead_latents():
    settings = {"k": 1, "dead_after_tokens": 600}
    with_aux, without = new_trainer(**settings, aux_k=8), new_trainer(**settings, aux_k=0)
    train(with_aux, 40)
    train(without, 40)
    assert moved_by_one_step(with_aux).any()
    assert not moved_by_one_step(without).any()


def test_aux_k_keeps_more_latents_alive():
    settings = {"k": 1, "dead_after_tokens": 2000}
    with_aux = train(new_trainer(**settings, aux_k=32, aux_coef=1), 160)[-1]
    without = train(new_trainer(**settings, aux_k=0), 160)[-1]
    assert with_aux["dead_fraction"] < 0.7 * without["dead_fraction"]


@pytest.mark.parametrize("architecture", ["relu_l1", "batchtopk", "gated"])
def test_resampling_revives_dead_latents(architecture):
    extra = {"sparsity_coef": 0.02} if architecture != "batchtopk" else {"k": 20}
    dead = torch.arange(40, 60)
    after = {}
    for every in (0, 12):
        trained = new_trainer(architecture, **extra, dead_after_tokens=1000, resample_every=every)
        trained.initialise(stream(1)[0])
        trained.b_enc_m[dead] = -100.0
        for raw in stream(16):
            trained.step(raw, len(raw))
        after[every] = trained.dead_m[dead].double().mean()
        torch.testing.assert_close(trained.W_dec_mD.norm(dim=1), torch.ones(D_SAE))
    assert after[0] == 1
    assert after[12] == 0


def test_bfloat16_autocast_ends_at_the_fvu_of_float32():
    full = train(new_trainer("topk"), 200)[-1]["fvu"]
    low = train(new_trainer("topk", trainer={"autocast": "bfloat16"}), 200)[-1]["fvu"]
    assert low == pytest.approx(full, rel=0.03)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "signum"])
def test_every_optimiser_learns_and_resumes_exactly(optimizer):
    lr = 3e-4 if optimizer == "signum" else 3e-3
    trained = new_trainer(trainer={"optimizer": optimizer, "lr": lr, "weight_decay": 0.01})
    rows = train(trained, 60)
    assert rows[-1]["fvu"] < rows[0]["fvu"]
    twin = trained.fork()
    for raw in stream(3, seed=8):
        trained.step(raw, len(raw))
        twin.step(raw, len(raw))
    assert torch.equal(trained.W_dec_mD, twin.W_dec_mD)


def test_bfloat16_inputs_train():
    trained = new_trainer()
    raw = stream(1)[0].bfloat16()
    trained.initialise(raw)
    for _ in range(40):
        trained.step(raw, len(raw))
    fvu = [row["fvu"] for row in trained.read_metrics()]
    assert trained.W_enc_mD.dtype == torch.float32
    assert fvu[-1] < 0.7 * fvu[0]


# ---------------------------------------------------------------------------------------------- warm starts


def as_trained(trained: ShardedTrainer, **changes: Any) -> TrainedSAE:
    tensors, manifest = trained.state(), trained.meta()
    return TrainedSAE.from_checkpoint({key: value.clone() for key, value in tensors.items()}, {**manifest, **changes})


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "gated", "relu_l1"])
def test_a_warm_start_is_the_same_function_in_another_input_scale(architecture):
    extra = {"sparsity_coef": 0.02} if architecture in ("gated", "relu_l1") else {}
    first = new_trainer(architecture, **extra, input_norm="none")
    train(first, 40)
    sae = as_trained(first)
    second = new_trainer(architecture, **extra, input_norm="sqrt_d")
    raw = stream(1, seed=3)[0]
    second.load_weights(sae, raw)
    assert second.input_scale != first.input_scale
    torch.testing.assert_close(second.W_dec_mD.norm(dim=1), torch.ones(D_SAE))
    again = as_trained(second)
    torch.testing.assert_close(again.reconstruct(raw), sae.reconstruct(raw), rtol=1e-4, atol=1e-4)


def test_a_warm_start_of_another_shape_is_refused_by_name():
    sae = as_trained(new_trainer())
    other = new_trainer(d_sae=64, init_from="somewhere/sae")
    with pytest.raises(UserError, match=r"init_from somewhere/sae: has \(d_in, d_out, d_sae\) = \(48, 48, 192\)"):
        warm_start(other, sae)


def test_unequal_decoder_norms_need_the_free_constraint():
    first = new_trainer("topk")
    train(first, 5)
    first.W_dec_mD.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    sae = as_trained(first)
    with pytest.raises(UserError, match="decoder_norm: free"):
        warm_start(new_trainer("topk", init_from="x"), sae)
    free = new_trainer("topk", init_from="x", decoder_norm="free", input_norm="none")
    raw = stream(1, seed=4)[0]
    free.load_weights(sae, raw)
    torch.testing.assert_close(as_trained(free).reconstruct(raw), sae.reconstruct(raw), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_start_without_a_threshold_gets_the_one_of_its_first_activations(architecture):
    first = new_trainer(architecture)
    train(first, 40)
    sae = replace(as_trained(first), threshold=torch.zeros(()))
    second = new_trainer(architecture, init_from="x", trainer={"batch_tokens": BATCH})
    raw = stream(1, seed=5)[0]
    second.load_weights(sae, raw)
    pre_BM = second.pre_activations(raw)
    kept = pre_BM.flatten().topk(6 * BATCH).values if architecture == "batchtopk" else pre_BM.topk(6, dim=1).values
    wanted = kept.min() if architecture == "batchtopk" else kept[:, -1].mean()
    assert float(second.threshold) == pytest.approx(float(wanted), rel=1e-4)


def test_a_start_with_a_threshold_keeps_it_through_its_first_steps():
    first = new_trainer()
    train(first, 60)
    sae = as_trained(first)
    second = new_trainer(init_from="x", trainer={"lr": 1e-6})
    raw = stream(1, seed=6)[0]
    second.load_weights(sae, raw)
    brought = float(second.threshold)
    assert brought == pytest.approx(float(sae.threshold) * second.input_scale / sae.input_scale, rel=1e-5)
    second.step(3 * raw[: BATCH // 2], BATCH // 2)  # a batch whose own cut lies elsewhere
    assert float(second.threshold) == pytest.approx(brought, rel=0.15)
    new = new_trainer(trainer={"lr": 1e-6})
    new.initialise(raw)
    new.load_weights(sae, raw)
    new.step(3 * raw[: BATCH // 2], BATCH // 2)
    assert float(new.threshold) > 1.5 * brought  # without `init_from` it is the batch's own
