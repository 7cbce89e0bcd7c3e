"""What alarms have cooled: a round's credit counts by its factor in the trainer, and a checkpoint keeps that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_ray.config import RunConfig
from sae_ray.reward.credit import ESTIMATORS, CreditSettings, RewardBatch, Rollouts
from sae_ray.trainer.rank import TrainerRank

D_IN, HOOK = 24, "blocks.0.hook_resid_post"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def block(block_id: int) -> dict[str, Any]:
    rng = np.random.default_rng(block_id)
    basis = np.random.default_rng(99).normal(size=(16, D_IN))
    hidden = np.maximum(rng.normal(size=(256, 16)), 0)
    acts = (hidden @ basis + 0.1 * rng.normal(size=(256, D_IN))).astype(np.float32)
    seq, pos = np.nonzero(np.ones((4, 64), dtype=bool))
    return {
        "block_id": block_id, "tokens_SL": rng.integers(0, 50, (4, 64)).astype(np.int32), "acts": acts,
        "seq_T": seq.astype(np.int32), "pos_T": pos.astype(np.int32), "columns": {HOOK: (0, D_IN)},
    }  # fmt: skip


BLOCKS = [block(i) for i in range(6)]


def make_rank(estimator: str = "teacher_gate", **rlaif: Any) -> TrainerRank:
    if ESTIMATORS[estimator].uses_rollouts:
        rlaif["rewards"] = {"weights": {"causality": 1}}
    config = RunConfig.model_validate(
        {
            "name": "factor",
            "hook": {"layer": 0},
            "corpus": {"context_length": 64},
            "judge": {"context_tokens": 8},
            "sae": {"d_sae": 48, "k": 4, "aux_k": 0},
            "trainer": {"tp": 1, "batch_tokens": 128, "steps": 60, "warmup_steps": 2, "log_every": 1},
            "rlaif": {"estimator": estimator, "bonus": 0.5, **rlaif},
        }
    )
    rank = TrainerRank(config.model_dump_json(), {HOOK: D_IN})
    rank.join("127.0.0.1", 0, 0, 1, 0)
    return rank


def rewards(rank: TrainerRank, factor: float) -> RewardBatch:
    counts = rank.count_contexts(BLOCKS[4:], 8)
    latents = np.flatnonzero((counts > 5) & (counts < 55))[:4]
    scan = rank.scan(BLOCKS[4:], 8, latents.tolist())
    latent, context = (each.ravel() for each in np.meshgrid(latents, np.arange(len(scan.act_CN)), indexing="ij"))
    act = scan.act_CN.T.ravel()
    ones = np.ones(len(latent), dtype=np.float32)
    return RewardBatch(
        round=0, sae_step=rank.copies["main"].steps_done, latents=latents, credit_weight=np.full(4, 0.25, np.float32),
        row_latent=latent, row_context=context, row_verdict=(act > np.median(act[act > 0])).astype(np.float32),
        row_active=act > 0, row_weight=ones, row_token=scan.token_CN.T.ravel().astype(np.int64),
        false_positive_rate=0.05, false_negative_rate=0.05, reward=np.linspace(-1, 1, 4, dtype=np.float32),
        row_margin=scan.margin_CN.T.ravel(), gamma_factor=factor,
    )  # fmt: skip


def trained(factor: float, estimator: str = "teacher_gate") -> tuple[TrainerRank, list[float]]:
    """A rank after eight steps and one more with credit, whose credit loss is returned."""
    rank = make_rank(estimator)
    rank.build(BLOCKS[:2])
    for window in range(2):
        rank.train_window(window, 0, BLOCKS[:2])
    rank.apply_rewards([rewards(rank, factor)], BLOCKS[4:])
    result = rank.train_window(2, 0, BLOCKS[2:4], 1)
    return rank, [row["credit_loss"] for row in result.metrics]


def test_the_credit_loss_is_multiplied_by_the_factor():
    whole, half = trained(1.0)[1], trained(0.5)[1]
    assert whole[0] > 0
    assert half[0] == pytest.approx(0.5 * whole[0], rel=1e-6)


def test_a_stop_leaves_nothing_of_the_credit():
    rank, losses = trained(0.0)
    assert rank.credit is None
    assert losses == [0.0]
    plain = make_rank()
    plain.build(BLOCKS[:2])
    for window, blocks in enumerate([BLOCKS[:2], BLOCKS[:2]]):
        plain.train_window(window, 0, blocks)
    plain.train_window(2, 0, BLOCKS[2:4], 1)
    assert torch.equal(plain.copies["main"].W_enc_mD, rank.copies["main"].W_enc_mD)


@pytest.mark.parametrize("estimator", ["threshold", "selection_bonus"])
def test_estimators_without_a_loss_are_cooled_too(estimator):
    """Their moves and discounts shrink with the factor as a loss does."""

    def effect(factor: float) -> torch.Tensor:
        rank = make_rank(estimator)
        rank.build(BLOCKS[:2])
        rank.train_window(0, 0, BLOCKS[:2])
        rank.apply_rewards([rewards(rank, factor)], BLOCKS[4:])
        main = rank.copies["main"]
        params = main._credit_params(128)
        if estimator == "selection_bonus":
            return rank.credit.selection(params)
        return rank.credit.deltas(params, main.threshold).b_enc_n

    whole, part = effect(1.0), effect(0.25)
    assert whole.abs().max() > 0
    torch.testing.assert_close(part, 0.25 * whole)


def test_a_checkpoint_keeps_the_factor_and_says_nothing_of_a_factor_of_one(tmp_path):
    for factor in (1.0, 0.5):
        rank, _ = trained(factor)
        folder = tmp_path / str(factor)
        commit(rank, folder)
        expected = [row["loss"] for row in rank.train_window(3, 0, BLOCKS[:2]).metrics]
        resumed = make_rank()
        resumed.load(str(folder))
        assert resumed.credit_factor == factor
        assert [row["loss"] for row in resumed.train_window(3, 0, BLOCKS[:2]).metrics] == expected
    from safetensors import safe_open

    names = {}
    for factor in ("1.0", "0.5"):
        with safe_open(tmp_path / factor / "rank-0.main.safetensors", "numpy") as file:
            names[factor] = set(file.keys())
    assert names["0.5"] - names["1.0"] == {"credit.factor"}
    assert names["1.0"] < names["0.5"]


def commit(rank: TrainerRank, folder: Path) -> None:
    from sae_ray.trainer import checkpoint

    folder.mkdir()
    saved = rank.save(str(folder))
    while (written := rank.written(1.0)) is None:
        pass
    about = {"step": rank.copies["main"].steps_done, "cursor": [2, 1], "pin": None, "extra": {}}
    checkpoint.commit(folder, checkpoint.manifest_of(rank.cfg, D_IN, [saved | written], about))


def test_a_ranks_decoder_is_turned_by_the_rounds_rollouts_with_a_gamma_of_their_own():
    losses, rows = [], []
    for gamma in (None, 0.6, 0.0):
        rank = make_rank("policy_gradient", gamma=0.3, rollout_gamma=gamma)
        rank.build(BLOCKS[:2])
        rank.train_window(0, 0, BLOCKS[:2])
        batch = rewards(rank, 1.0)
        latent, some = np.repeat(batch.latents, 8), np.random.default_rng(0)
        rollouts = Rollouts(latent, None, np.ones(32), some.random(32), 0.0, some.normal(size=(32, D_IN)))
        rank.apply_rewards([dataclasses.replace(batch, rollouts=rollouts)], BLOCKS[4:])
        losses.append(rank.train_window(1, 0, BLOCKS[2:4], 1).metrics[0]["credit_loss"])
        rows.append(rank.copies["main"].W_dec_mD[torch.from_numpy(batch.latents)].clone())
    assert losses[0] != 0
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)
    assert losses[2] == 0
    assert (rows[0] - rows[2]).abs().max() > 1e-5


@pytest.mark.parametrize("estimator", ["policy_gradient", "teacher_gate+policy_gradient"])
def test_rollouts_alone_teach_where_only_their_gamma_is_above_0(estimator):
    def step(gamma: float, rollout_gamma: float) -> tuple[bool, float]:
        rank = make_rank(estimator, gamma=gamma, rollout_gamma=rollout_gamma)
        rank.build(BLOCKS[:2])
        rank.train_window(0, 0, BLOCKS[:2])
        batch = rewards(rank, 1.0)
        latent, some = np.repeat(batch.latents, 8), np.random.default_rng(0)
        rollouts = Rollouts(latent, None, np.ones(32), some.random(32), 0.0, some.normal(size=(32, D_IN)))
        told = rank.apply_rewards([dataclasses.replace(batch, rollouts=rollouts)], BLOCKS[4:])
        return told["installed"], rank.train_window(1, 0, BLOCKS[2:4], 1).metrics[0]["credit_loss"]

    installed, loss = step(0.0, 0.6)
    assert installed
    assert loss != 0
    assert step(0.0, 0.3)[1] == pytest.approx(loss / 2, rel=1e-5)  # nothing of it is the teacher's
    assert step(0.0, 0.0) == (False, 0.0)


@pytest.mark.parametrize("estimator", ["policy_gradient", "teacher_gate"])
def test_a_part_whose_weight_is_0_does_no_work_in_a_step(estimator):
    state = {"g_ND": torch.ones(1, D_IN)}
    credit = ESTIMATORS[estimator](CreditSettings(0.0, 5.0, 0.5, 50), state)
    assert credit.loss(torch.ones(2, D_IN), None, torch.ones(())) is None


def test_every_estimator_says_whether_it_uses_rewards(tmp_path):
    """selection_bonus alone; the flag is what a config with further rewards is checked by."""
    assert [name for name, kind in ESTIMATORS.items() if kind.uses_reward] == ["selection_bonus"]
    rank = make_rank()
    rank.build(BLOCKS[:2])
    rank.train_window(0, 0, BLOCKS[:2])
    batch = rewards(rank, 1.0)
    for name in ESTIMATORS:
        states = []
        for reward in (batch.reward, batch.reward[::-1].copy()):
            other = make_rank(name)
            other.copies = rank.copies
            other.apply_rewards([dataclasses.replace(batch, reward=reward)], BLOCKS[4:])
            states.append(other.credit.state_dict())
        same = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert same != ESTIMATORS[name].uses_reward, name
