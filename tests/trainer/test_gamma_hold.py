"""What holds FVU and L0 during RLAIF: on simulated plants, on a real trainer, and on a rank that resumes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCH, D_IN, batches, configs, sharded_run

from sae_ray.config import RunConfig
from sae_ray.config.judging import RLAIFConfig
from sae_ray.reward.credit import RewardBatch
from sae_ray.trainer import checkpoint
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.gamma_hold import FVU_START, L0_START, LEAST, GammaHold, hold_of
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.rank import TrainerRank
from sae_ray.trainer.sharded_sae import ShardedTrainer

START_FVU, START_L0 = 0.25, 8.0
DATA = batches(60)


def simulated(
    rise: float, lag: float, harm: float, steps: int = 1500, noise: float = 0.01, of_l0: bool = False, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Levels and weights of a plant that follows `harm * weight` (a share of its start) with a first-order lag."""
    rng = np.random.default_rng(seed)
    hold = GammaHold(None, rise) if of_l0 else GammaHold(rise, None)
    change, levels, weights = 0.0, [], []
    for step in range(-100, steps):
        if step == 0:
            hold.begin()
        weight = float(hold.weight)
        change += ((harm * weight if step >= 0 else 0.0) - change) / lag
        fvu, l0 = (START_FVU, START_L0 * (1 - change)) if of_l0 else (START_FVU * (1 + change), START_L0)
        jitter = 1 + noise * rng.normal(size=2)
        hold.observe(torch.tensor(fvu * jitter[0]), torch.tensor(l0 * jitter[1]))
        levels.append(change)
        weights.append(weight)
    return np.array(levels[100:]), np.array(weights[100:])


@pytest.mark.parametrize("lag", [20, 400])
@pytest.mark.parametrize("harm", [0.1, 1.0])
def test_fvu_settles_at_its_set_point_however_slow_or_harmful_the_credit_is(lag, harm):
    levels, weights = simulated(0.02, lag, harm)
    assert levels[-400:].mean() == pytest.approx(0.02, abs=0.004)
    assert levels[-400:].max() < 0.03
    assert weights[-400:].mean() == pytest.approx(0.02 / harm, rel=0.4)
    assert (weights[-400:] > 0.3 * 0.02 / harm).all()  # it holds, and does not switch on and off


def test_an_l0_that_falls_is_held_in_the_same_way():
    levels, _ = simulated(0.02, 100, 0.12, steps=800, of_l0=True)
    assert levels[-400:].mean() == pytest.approx(0.02, abs=0.004)


def test_a_credit_that_does_no_harm_keeps_its_whole_weight():
    levels, weights = simulated(0.02, 100, 0.01, steps=500)
    assert weights[20:].min() > 0.99
    assert levels[-1] == pytest.approx(0.01, rel=0.01)


def test_the_integral_does_not_wind_up_while_the_weight_is_at_its_end():
    hold = GammaHold(0.02, None)
    fvu, l0 = torch.tensor(START_FVU), torch.tensor(START_L0)
    for _ in range(100):
        hold.observe(fvu, l0)
    hold.begin()
    for _ in range(600):  # far beyond, for long: whatever the weight
        hold.observe(fvu * 2, l0)
    assert float(hold.weight) == pytest.approx(np.exp(LEAST))
    steps = 0
    while float(hold.weight) < 0.5:
        hold.observe(fvu, l0)
        steps += 1
    assert steps < 450
    for _ in range(600):  # far within, for long
        hold.observe(fvu, l0)
    while float(hold.weight) > 0.5:
        hold.observe(fvu * 1.06, l0)
        steps -= 1
    assert steps > -450


def test_before_rewards_come_nothing_is_held_and_set_points_are_of_when_they_first_came():
    hold = GammaHold(0.1, 0.1)
    for step in range(50):
        hold.observe(torch.tensor(1.0 - 0.01 * step), torch.tensor(8.0))
    assert float(hold.weight) == 1
    hold.begin()
    start = hold.state.clone()
    for _ in range(50):
        hold.observe(torch.tensor(0.9), torch.tensor(8.0))
    hold.begin()  # the second round's rewards
    assert hold.state[5:7].tolist() == start[5:7].tolist()
    assert float(hold.weight) < 1


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_set_point_is_of_the_level_when_rewards_came_though_fvu_was_falling(noise):
    """By a seventh in 60 steps: a running mean says what it was a while ago."""
    found = []
    for seed in range(8):
        rng, hold = np.random.default_rng(seed), GammaHold(0.1, 0.1)
        for step in range(300):
            fvu = 0.25 * 0.9975 ** (step - 299) * (1 + noise * rng.normal())
            hold.observe(torch.tensor(fvu), torch.tensor(START_L0))
        hold.begin()
        assert float(hold.state[L0_START]) == pytest.approx(START_L0)
        found.append(float(hold.state[FVU_START]) / 0.25)
    assert np.mean(found) == pytest.approx(1, abs=0.01)
    assert np.std(found) < 0.3 * noise + 1e-9


def test_a_first_step_far_off_leaves_no_set_point_below_0():
    hold = GammaHold(0.1, 0.1)
    for step in range(6):
        hold.observe(torch.tensor(0.1 if step else 10.0), torch.tensor(START_L0))
        if step:
            again = GammaHold(0.1, 0.1)
            again.load(hold.state)
            again.begin()
            assert 0 < float(again.state[FVU_START]) < 10


@pytest.mark.parametrize("of_l0", [False, True])
def test_rewards_that_come_before_any_step_are_held_to_the_first_step(of_l0):
    """On-policy fine-tuning: the second round must not take the damage of the first as its set point."""
    hold = GammaHold(None, 0.1) if of_l0 else GammaHold(0.1, None)
    hold.begin()
    resumed = GammaHold(None, 0.1) if of_l0 else GammaHold(0.1, None)
    resumed.load(hold.state)  # a checkpoint before the first step
    for each in (hold, resumed):
        each.begin()  # or a round that was judged again
        each.observe(torch.tensor(START_FVU), torch.tensor(START_L0))
        assert each.state[5:7].tolist() == [START_FVU, START_L0]
        assert float(each.weight) == 1
        for _ in range(50):
            each.observe(torch.tensor(START_FVU * 2), torch.tensor(START_L0 / 2))
        assert float(each.weight) < 0.1
        each.begin()  # the second round's rewards
        assert each.state[5:7].tolist() == [START_FVU, START_L0]


def test_nothing_is_held_unless_asked_for():
    assert hold_of(RLAIFConfig(), "cpu") is None
    assert hold_of(RLAIFConfig(enabled=False, max_fvu_rise=0.1), "cpu") is None
    assert hold_of(RLAIFConfig(max_l0_fall=0.1), "cpu") is not None


# ---------------------------------------------------------------------------------------------- a real trainer


class PullAllDown:
    """A credit that closes every gate: strong enough to ruin FVU."""

    def __init__(self, strength: float):
        self._strength = strength

    def loss(self, x_BD, params, threshold):
        pre_BM = torch.addmm(params.b_enc_m, x_BD - params.b_dec_D, params.W_enc_mD.T)
        return self._strength * torch.nn.functional.softplus(pre_BM).sum(1).mean()

    def state_dict(self):
        return {}


@cache
def learning() -> tuple[ShardedTrainer, list[list[float]], np.ndarray]:
    """A trainer whose FVU still falls by a seventh in 60 steps, the levels of its steps, and what they are at its end:
    of all batches, at weights that stand still."""
    sae, cfg = configs("batchtopk")
    cfg = cfg.model_copy(update={"lr_final": cfg.lr})
    trainer = ShardedTrainer(sae, cfg, D_IN, 0, Collectives(Mesh.alone()))
    trainer.initialise(batches(1)[0])
    seen = steps(trainer, 300)
    still = trainer.fork()
    still.cfg = cfg.model_copy(update={"lr": 1e-12, "lr_final": 1e-12})
    return trainer, seen, np.mean(steps(still, len(DATA)), axis=0)


def steps(trainer: ShardedTrainer, n: int, credit: Any = None, hold: GammaHold | None = None) -> list[list[float]]:
    """FVU and L0 of each."""
    seen = []
    for step in range(n):
        raw = DATA[step % len(DATA)]
        trainer.step(raw, len(raw), credit)
        if hold is not None:
            hold.observe(*trainer.levels)
        seen.append([float(level) for level in trainer.levels])
    return seen


def tuned(max_fvu_rise: float | None, max_l0_fall: float | None, strength: float) -> tuple[np.ndarray, GammaHold]:
    """(FVU, L0) over what they were, means of the last two times through the batches, and the hold, after six."""
    trainer, before, start = learning()
    hold = GammaHold(max_fvu_rise, max_l0_fall)
    for levels in before:
        hold.observe(*torch.tensor(levels))
    hold.begin()
    seen = steps(trainer.fork(), 6 * len(DATA), hold.held(PullAllDown(strength)), hold)
    return np.mean(seen[-2 * len(DATA) :], axis=0) / start, hold


def test_what_a_credit_that_nothing_holds_does_to_a_real_trainer():
    trainer, _, start = learning()
    fvu, l0 = np.mean(steps(trainer.fork(), 120, PullAllDown(3.0))[-60:], axis=0) / start
    assert fvu > 3
    assert l0 < 0.8


@pytest.mark.parametrize("strength", [0.3, 3.0])
def test_a_real_trainers_fvu_is_held_at_its_set_point(strength):
    held, hold = tuned(0.1, None, strength)
    assert held[0] == pytest.approx(1.1, abs=0.25 * 0.1)
    assert 0 < float(hold.weight) < 0.95


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_a_real_trainers_l0_is_held_at_its_set_point(strength):
    held, _ = tuned(None, 0.05, strength)
    assert held[1] == pytest.approx(0.95, abs=0.25 * 0.05)


def test_where_both_are_held_the_nearer_set_point_decides_and_the_other_is_kept():
    held, _ = tuned(0.1, 0.05, 3.0)
    assert held[0] == pytest.approx(1.1, abs=0.25 * 0.1)
    assert held[1] > 0.95
    held, _ = tuned(20.0, 0.05, 3.0)
    assert held[0] < 21
    assert held[1] == pytest.approx(0.95, abs=0.25 * 0.05)


def test_a_weight_of_one_changes_no_bit():
    plain, held = (sharded_run(Mesh.alone(), "batchtopk", steps=5) for _ in range(2))
    hold = GammaHold(0.5, None)
    for raw in batches(5):
        plain.step(raw[:BATCH], BATCH, PullAllDown(0.01))
        held.step(raw[:BATCH], BATCH, hold.held(PullAllDown(0.01)))
    for key, tensor in plain.state().items():
        assert torch.equal(tensor, held.state()[key]), key


# ---------------------------------------------------------------------------------------------- a rank

HOOK, WIDTH = "blocks.0.hook_resid_post", 16


def block(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    basis = np.random.default_rng(99).normal(size=(12, WIDTH))
    hidden = np.where(rng.random((256, 12)) < 0.15, rng.random((256, 12)) + 1, 0)
    place = np.arange(256, dtype=np.int32)
    return {
        "block_id": number, "tokens_SL": np.zeros((4, 64), dtype=np.int32), "seq_T": place // 64, "pos_T": place % 64,
        "acts": (hidden @ basis).astype(np.float32), "columns": {HOOK: (0, WIDTH)},
    }  # fmt: skip


BLOCKS = [block(i) for i in range(4)]


def rank_of(**rlaif: Any) -> TrainerRank:
    config = RunConfig.model_validate(
        {
            "name": "hold", "hook": {"layer": 0}, "corpus": {"context_length": 64}, "judge": {"context_tokens": 8},
            "sae": {"d_sae": 24, "k": 2, "aux_k": 0}, "rlaif": {"gamma": 5.0, **rlaif},
            "trainer": {"tp": 1, "batch_tokens": 128, "steps": 20, "lr": 3e-3, "lr_final": 3e-3, "log_every": 2},
        }
    )  # fmt: skip
    threads = torch.get_num_threads()
    rank = TrainerRank(config.model_dump_json(), {HOOK: WIDTH})
    torch.set_num_threads(threads)
    rank.join("127.0.0.1", 0, 0, 1, 0)
    return rank


def rewards(rank: TrainerRank) -> RewardBatch:
    """Verdicts that deny whatever three latents fire on."""
    scan = rank.scan(BLOCKS, 8, list(range(24)))
    latents = np.sort(np.argsort(-(scan.act_CN > 0).sum(0))[:3])
    context = np.arange(len(scan.act_CN))
    n = len(context)
    active = (scan.act_CN[:, latents] > 0).T.ravel()
    return RewardBatch(
        0, 20, latents, np.full(3, 1 / 3, dtype=np.float32), np.repeat(latents, n), np.tile(context, 3),
        (~active).astype(np.float32), active, np.ones(3 * n, dtype=np.float32),
        scan.token_CN[:, latents].T.ravel().astype(np.int64), 0.0, 0.0,
    )  # fmt: skip


def windows(rank: TrainerRank, numbers: range) -> list[dict[str, float]]:
    rows = [row for number in numbers for row in rank.train_window(number, 0, BLOCKS).metrics]
    return [{key: value for key, value in row.items() if key != "step_seconds"} for row in rows]


def test_a_resumed_rank_holds_on_as_if_it_had_never_stopped(tmp_path: Path):
    rank = rank_of(max_fvu_rise=0.01)
    rank.build(BLOCKS)
    windows(rank, range(2))
    rank.apply_rewards([rewards(rank)], BLOCKS)
    assert rank._hold is not None
    rank._hold.state[FVU_START] *= 0.5  # as if FVU had been half as large when rewards came
    begun = windows(rank, range(2, 5))
    assert begun[-1]["gamma_weight"] < 1
    path = tmp_path / "step-64"
    checkpoint.begin(path)
    report = rank.save(str(path))
    written = rank.written(60)
    assert written is not None
    about = {"step": 64, "cursor": [8, 0], "pin": None, "extra": {}}
    checkpoint.commit(path, checkpoint.manifest_of(rank.cfg, WIDTH, [{**report, **written}], about))
    resumed = rank_of(max_fvu_rise=0.01)
    resumed.load(str(path))
    assert windows(resumed, range(8, 10)) == windows(rank, range(8, 10))
    tensors, _ = checkpoint.load_full(path)
    assert tensors["gamma_hold"].shape == (11,)
    off = rank_of()  # a run that holds nothing reads it all the same
    off.load(str(path))
    assert "gamma_weight" not in windows(off, range(8, 9))[0]


def test_a_rank_answers_how_its_latents_lie():
    rank = rank_of()
    rank.build(BLOCKS)
    ids, encoder, decoder = rank.unit_rows([3, 20, 99])
    assert ids.tolist() == [3, 20]
    main = rank.copies["main"]
    for rows, W_mD in ((encoder, main.W_enc_mD), (decoder, main.W_dec_mD)):
        expected = torch.nn.functional.normalize(W_mD[[3, 20]], dim=1).numpy()
        assert np.allclose(rows.astype(np.float32), expected, atol=1e-3)
