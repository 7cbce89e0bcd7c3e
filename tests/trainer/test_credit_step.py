"""What a credit does to the trainer's step: loss, discounts at selection, deltas; on every mesh the same."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import BATCH, D_IN, batches, sharded_run

from sae_ray.reward.credit import (
    ESTIMATORS,
    CreditEstimator,
    CreditSettings,
    Deltas,
    LatentState,
    RewardBatch,
    Rollouts,
    gate_units,
)
from sae_ray.reward.evidence import ContextLayout, scan_contexts
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.credit_step import add_credit
from sae_ray.trainer.gamma_hold import GammaHold
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

SETTINGS = CreditSettings(gamma=0.5, slope=5.0, shrink=0.5, half_life_steps=50, bonus=0.5)
START = 8  # steps before rewards arrive


class Silent(CreditEstimator):
    """Has every part and gives nothing."""


class Parts(CreditEstimator):
    """Gives what it is told to; counts how often it is asked."""

    def __init__(self, discount_m=None, deltas=None):
        self.discount_m, self.to_give = discount_m, deltas

    def deltas(self, params, threshold):
        given, self.to_give = self.to_give, None
        return given

    def selection(self, params):
        return self.discount_m


def next_batch() -> torch.Tensor:
    return batches()[START]


@pytest.mark.parametrize("name", ["batchtopk", "topk", "jumprelu", "relu-l1", "gated"])
def test_a_credit_that_gives_nothing_changes_nothing(name):
    plain, silent = (sharded_run(Mesh.alone(), name, steps=START) for _ in range(2))
    plain.step(next_batch(), BATCH)
    silent.step(next_batch(), BATCH, Silent(SETTINGS, {}))
    for key, tensor in plain.state().items():
        assert torch.equal(tensor, silent.state()[key]), key


def test_deltas_are_added_right_after_the_step():
    plain, moved = (sharded_run(Mesh.alone(), "batchtopk", steps=START) for _ in range(2))
    rows, change_nD, change_n = torch.tensor([3, 11]), torch.randn(2, D_IN).double(), torch.tensor([0.5, -2.0]).double()
    plain.step(next_batch(), BATCH)
    moved.step(next_batch(), BATCH, Parts(deltas=Deltas(rows, change_nD, change_n)))
    plain.W_enc_mD[rows] += change_nD
    plain.b_enc_m[rows] += change_n
    for key, tensor in plain.state().items():
        assert torch.equal(tensor, moved.state()[key]), key


def discounts(m: int) -> torch.Tensor:
    return torch.linspace(-0.6, 0.6, m, dtype=torch.float64)


@pytest.mark.parametrize("name", ["batchtopk", "topk"])
def test_a_bonus_decides_what_is_selected_and_not_its_value(name):
    """Gradients and L0 against plain autograd on dense pre-activations."""
    trainer = sharded_run(Mesh.alone(), name, steps=START)
    trainer.n_dead = 0  # without AuxK
    raw, k = next_batch()[:BATCH], trainer.sae.k
    discount_m, context = discounts(len(trainer.b_enc_m)), trainer._context(BATCH)
    x_BD = trainer.scaled(raw)
    grads, _, numbers, _ = trainer._loss_and_gradients(x_BD, x_BD, context, discount_m)
    W_enc, b_enc, W_dec = (t.clone().requires_grad_() for t in (trainer.W_enc_mD, trainer.b_enc_m, trainer.W_dec_mD))
    pre = (x_BD - trainer.b_dec_D) @ W_enc.T + b_enc
    bonus_m = (discount_m * trainer.threshold.double()).masked_fill(trainer.dead_m, 0)
    rank = (pre + bonus_m).detach()
    if name == "topk":
        chosen = torch.zeros_like(rank).scatter_(1, rank.topk(k, dim=1).indices, 1.0)
    else:
        chosen = torch.zeros(rank.numel(), dtype=rank.dtype).index_fill_(0, rank.flatten().topk(k * BATCH).indices, 1.0)
        chosen = chosen.view_as(rank)
    chosen = chosen * (rank > 0)
    f = pre.relu() * chosen
    error = f @ W_dec + trainer.b_dec_D - x_BD
    power = (x_BD - x_BD.mean(0)).square().sum()
    (error.square().sum() / power).backward()
    torch.testing.assert_close(grads.W_enc_mD, W_enc.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads.b_enc_m, b_enc.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads.W_dec_mO, W_dec.grad, rtol=1e-9, atol=1e-12)
    assert int(numbers[4]) == int((f > 0).sum())
    without, *_ = trainer._loss_and_gradients(x_BD, x_BD, context, None)
    assert not torch.allclose(without.W_enc_mD, grads.W_enc_mD)


def test_a_discount_scales_the_price_of_jumprelu_latents():
    trainer = sharded_run(Mesh.alone(), "jumprelu", steps=START)
    trainer.n_dead = 0
    x_BD, context = trainer.scaled(next_batch()[:BATCH]), trainer._context(BATCH)
    context = context._replace(l0_price=torch.tensor(0.05, dtype=torch.float64))
    discount_m = 2 * discounts(len(trainer.b_enc_m))
    grads, *_ = trainer._loss_and_gradients(x_BD, x_BD, context, discount_m)
    # Each latent by itself, at its own price: the price enters its own threshold's gradient only.
    expected = []
    for latent, discount in enumerate(discount_m.tolist()):
        own = context._replace(l0_price=context.l0_price * max(0.0, 1 - discount))
        expected.append(trainer._loss_and_gradients(x_BD, x_BD, own, None)[0].own["theta"][latent])
    torch.testing.assert_close(grads.own["theta"], torch.stack(expected), rtol=1e-9, atol=1e-12)
    plain, *_ = trainer._loss_and_gradients(x_BD, x_BD, context, None)
    assert not torch.allclose(plain.own["theta"], grads.own["theta"])
    torch.testing.assert_close(plain.W_enc_mD, grads.W_enc_mD, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- meshes

LATENTS = np.array([2, 5, 17, 23, 24, 30, 41])
EVIDENCE = torch.cat(batches(30))
LAYOUT = ContextLayout(torch.arange(len(EVIDENCE)) // 4, torch.arange(len(EVIDENCE)) % 4, -(-len(EVIDENCE) // 4), 4)


def rewards(trainer: ShardedTrainer) -> RewardBatch:
    """A judge with errors, asked about latents of a whole SAE."""
    x_TD, rows = trainer.scaled(EVIDENCE), torch.from_numpy(LATENTS)
    scan = scan_contexts(
        x_TD,
        LAYOUT,
        LATENTS,
        trainer.W_enc_mD[rows],
        trainer.b_enc_m[rows],
        trainer.b_dec_D,
        trainer.thresholds_m()[rows],
    )
    rng = np.random.default_rng(0)
    parts = []
    for column, latent in enumerate(LATENTS):
        contexts = rng.choice(len(scan.act_CN), 60, replace=False)
        # Its concept is what it responds to, but for a gate of its own and another direction; one in ten is misjudged.
        direction_D = torch.randn(D_IN, generator=torch.Generator().manual_seed(int(latent))).double()
        token_V = torch.from_numpy(scan.token_CN[contexts, column]).long()
        score_V = scan.margin_CN[contexts, column] + 0.1 * (x_TD @ direction_D)[token_V].numpy()
        shows = (score_V > 0.4 * (column - 3)) ^ (rng.random(60) < 0.1)
        parts.append((np.full(60, latent), contexts, shows, scan.act_CN[contexts, column] > 0,
                      scan.token_CN[contexts, column], scan.margin_CN[contexts, column]))  # fmt: skip
    latent, context, shows, active, token, margin = (np.concatenate(part) for part in zip(*parts, strict=True))
    u_RD = rng.normal(size=(6 * len(LATENTS), D_IN))
    rollouts = Rollouts(np.repeat(LATENTS, 6), u_RD / np.linalg.norm(u_RD, axis=1, keepdims=True), np.ones(len(u_RD)),
                        rng.random(len(u_RD)), 0.5)  # fmt: skip
    return RewardBatch(
        0, START, LATENTS, np.full(len(LATENTS), 1 / len(LATENTS), dtype=np.float32), latent, context,
        shows.astype(np.float32), active, np.ones(len(latent), dtype=np.float32), token.astype(np.int64), 0.05, 0.1,
        row_margin=margin, rollouts=rollouts, reward=rng.random(len(LATENTS)).astype(np.float32),
    )  # fmt: skip


def credited_run(mesh: Mesh, name: str, estimator: str, batch: RewardBatch) -> ShardedTrainer:
    trainer = sharded_run(mesh, name, steps=START)
    own = batch.for_shard(trainer.first_latent, trainer.last_latent)
    rows = torch.from_numpy(own.latents - trainer.first_latent)
    W_ND, b_N, x_TD = trainer.W_enc_mD[rows], trainer.b_enc_m[rows], trainer.scaled(EVIDENCE)
    unit_N = None
    if name in ("relu-l1", "gated"):  # as the rank does where gates lie at 0
        unit_N = gate_units(trainer.thresholds_m()[rows], torch.addmm(b_N, x_TD - trainer.b_dec_D, W_ND.T))
    latent = LatentState(W_ND, b_N, trainer.b_dec_D.clone(), unit_N, trainer.W_dec_mD[rows])
    credit = ESTIMATORS[estimator].fit(SETTINGS, own, latent, x_TD, LAYOUT)
    for raw in batches()[START : START + 5]:  # of 40 and 41 tokens
        low, high = mesh.rows(len(raw))
        trainer.step(raw[low:high], len(raw), credit)
    return trainer


class Whole:
    """A credit that does not say which rows it touches."""

    def __init__(self, credit):
        self._credit, self.of_decoder = credit, credit.of_decoder

    def loss(self, x_BD, params, threshold):
        return self._credit.loss(x_BD, params, threshold)


class Counting(Collectives):
    """Counts what would go over dp."""

    sent = 0

    def sum_dp(self, tensor):
        self.sent += tensor.numel()
        return super().sum_dp(tensor)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    "estimator", ["teacher_gate", "bank_gate", "reward_model", "preference", "teacher_gate+policy_gradient"]
)
def test_only_judged_rows_are_exchanged_and_no_bit_of_the_gradient_is_lost(estimator, held):
    trainer = sharded_run(Mesh.alone(), "batchtopk", steps=START)
    x_BD, rows = trainer.scaled(next_batch()), torch.from_numpy(LATENTS)
    own = rewards(trainer).for_shard(0, 48)
    centre_D, W_dec_ND = trainer.b_dec_D.clone(), trainer.W_dec_mD[rows]
    latent = LatentState(trainer.W_enc_mD[rows], trainer.b_enc_m[rows], centre_D, W_dec_ND=W_dec_ND)
    credit = ESTIMATORS[estimator].fit(SETTINGS, own, latent, trainer.scaled(EVIDENCE), LAYOUT)
    params, context = trainer._credit_params(len(x_BD)), trainer._context(len(x_BD))
    counted, found = [], []
    for asked in (GammaHold(0.1, None).held(credit) if held else credit, Whole(credit)):
        grads, *_ = trainer._loss_and_gradients(x_BD, x_BD, context, None)
        before = [grad.clone() for grad in (grads.W_enc_mD, grads.b_enc_m, grads.W_dec_mO, grads.along_m)]
        collectives = Counting(Mesh.alone())
        add_credit(asked, params, trainer._gate_threshold(), x_BD, grads, collectives)
        counted.append(collectives.sent)
        found.append([grads.W_enc_mD, grads.b_enc_m, grads.W_dec_mO, grads.along_m])
    assert counted[0] == counted[1] * len(LATENTS) / len(trainer.b_enc_m) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], before[0])


MESH_RUNS = [(estimator, "batchtopk") for estimator in ESTIMATORS] + [
    ("selection_bonus", "jumprelu"),
    ("threshold", "topk"),
]


def rank_process(rank: int, world: int, meshes: list[tuple[int, int]], port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    grid = [Mesh.connect(dp, tp) for dp, tp in meshes]
    for estimator, name in MESH_RUNS:
        batch = rewards(sharded_run(Mesh.alone(), name, steps=START))
        alone = credited_run(Mesh.alone(), name, estimator, batch)
        plain = sharded_run(Mesh.alone(), name, steps=START + 5)
        assert any((alone.state()[key] - plain.state()[key]).abs().max() > 1e-4 for key in ("W_enc", "b_enc")), (
            estimator
        )
        shown = alone.read_metrics()
        for mesh in grid:
            sharded = credited_run(mesh, name, estimator, batch)
            rows = slice(sharded.first_latent, sharded.last_latent)
            for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
                expected = alone.state()[key] if key == "b_dec" else alone.state()[key][rows]
                # The running threshold, which gates are relative to, is float32.
                torch.testing.assert_close(
                    sharded.state()[key], expected, rtol=0, atol=1e-6, msg=lambda m, e=estimator, k=key: f"{e} {k}: {m}"
                )
            for found, row in zip(sharded.read_metrics(), shown, strict=True):
                assert found["credit_loss"] == pytest.approx(row["credit_loss"], rel=1e-5, abs=1e-9), estimator
    dist.destroy_process_group()


@pytest.mark.parametrize("meshes", [[(1, 2), (2, 1)]])
def test_every_estimator_trains_the_same_on_every_mesh(meshes, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_process, (2, meshes, port), nprocs=2)


def test_a_decoder_gradient_leaves_unit_rows_unit_and_moves_them():
    batch = rewards(sharded_run(Mesh.alone(), "batchtopk", steps=START))
    moved = credited_run(Mesh.alone(), "batchtopk", "policy_gradient", batch)
    plain = sharded_run(Mesh.alone(), "batchtopk", steps=START + 5)
    torch.testing.assert_close(moved.W_dec_mD.norm(dim=1), torch.ones(len(moved.W_dec_mD)).double())
    own = torch.from_numpy(LATENTS)
    assert (moved.W_dec_mD - plain.W_dec_mD)[own].norm() > 3e-3


@pytest.mark.parametrize("name", ["relu-l1", "gated"])
def test_where_gates_lie_at_0_credit_is_counted_in_activations_and_does_not_explode(name):
    trainer = sharded_run(Mesh.alone(), name, steps=START)
    rows, x_TD = torch.from_numpy(LATENTS), trainer.scaled(EVIDENCE)
    pre_TN = (x_TD - trainer.b_dec_D) @ trainer.W_enc_mD[rows].T + trainer.b_enc_m[rows]
    unit_N = gate_units(trainer.thresholds_m()[rows], pre_TN)
    expected = [float(column[column > 0].mean()) if bool((column > 0).any()) else 0.0 for column in pre_TN.T]
    assert unit_N.tolist() == pytest.approx(expected)
    credited = credited_run(Mesh.alone(), name, "teacher_gate", rewards(trainer))
    paid = [row["credit_loss"] for row in credited.read_metrics() if row["credit_loss"]]
    assert paid
    assert (
        max(paid) < 20 * SETTINGS.gamma
    )  # in units of 1e-3, where a threshold of 0 is cut off, it is in the thousands


def test_a_threshold_above_0_is_the_unit_itself():
    pre_TN = torch.tensor([[1.0, 3.0], [-1.0, 5.0]])
    assert gate_units(torch.tensor([0.5, 0.0]), pre_TN).tolist() == [0.5, 4.0]
    assert gate_units(torch.tensor(0.7), pre_TN).tolist() == pytest.approx([0.7, 0.7])
