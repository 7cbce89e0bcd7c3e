from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.reward.applied import AppliedRound, AppliedRounds
from sae_ray.reward.credit import RewardBatch, Rollouts
from sae_ray.reward.replay import check_replay
from sae_ray.storage import LocalStorage
from sae_ray.trainer import checkpoint


def batch(number: int = 0, **changes: Any) -> RewardBatch:
    rng = np.random.default_rng(number)
    columns: dict[str, Any] = {
        "latents": np.array([3, 70_000_000_000]), "credit_weight": rng.random(2).astype(np.float32),
        "row_latent": np.array([3, 3, 70_000_000_000]), "row_context": np.array([9, 0, 4]),
        "row_verdict": np.array([1, 0, 1], dtype=np.float32), "row_active": np.array([True, False, True]),
        "row_weight": rng.random(3).astype(np.float32), "row_token": np.array([5, 6, 7]),
        "row_margin": np.array([0.1, -np.inf, 3.0], dtype=np.float32), "reward": np.array([np.nan, 1], np.float32),
    }  # fmt: skip
    return RewardBatch(
        number, 12 + number, **columns, false_positive_rate=0.1 + 0.2, false_negative_rate=0.0, **changes
    )


def test_a_round_comes_back_bit_for_bit_with_its_step_and_what_the_next_needs(tmp_path):
    rounds = AppliedRounds(LocalStorage(tmp_path))
    summary, memory = {"rewards": 2, "usage": {"busy_share": math.nan}}, {"parts": {"causality": [0.1, 0.2, 0.3]}}
    encoder_ND, decoder_ND = np.random.default_rng(1).normal(size=(2, 2, 5)).astype(np.float16)
    whole = batch(0, gamma_factor=1 / 3, judged_ND=encoder_ND, judged_decoder_ND=decoder_ND)
    rounds.write(AppliedRound(whole, 17, summary, memory))
    rounds.write(AppliedRound(dataclasses.replace(batch(1), reward=None), 20, {}))
    found = rounds.read(0)
    for each in dataclasses.fields(RewardBatch):
        a, b = getattr(whole, each.name), getattr(found.batch, each.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()), each.name
        else:
            assert a == b, each.name
    assert (found.at_step, found.memory, found.summary["rewards"]) == (17, memory, 2)
    assert rounds.read(1).batch.reward is None
    # As in files of before there were such fields.
    assert rounds.read(1).batch.judged_ND is None
    assert rounds.read(1).batch.judged_decoder_ND is None
    assert rounds.numbers() == [0, 1]
    assert rounds.memory_before(0) == {}
    assert rounds.memory_before(1) == memory
    assert rounds.memory_before(7) == {}


def test_a_round_that_is_applied_again_replaces_the_first(tmp_path):
    rounds = AppliedRounds(LocalStorage(tmp_path))
    for step in (4, 6):
        rounds.write(AppliedRound(batch(), step, {}))
    assert rounds.read(0).at_step == 6
    assert [path.name for path in (tmp_path / "rewards").iterdir()] == ["round-0000.safetensors"]


def test_what_is_torn_or_no_round_is_named(tmp_path):
    rounds = AppliedRounds(LocalStorage(tmp_path))
    rounds.write(AppliedRound(batch(), 4, {}))
    path = tmp_path / "rewards" / "round-0000.safetensors"
    whole = path.read_bytes()
    for torn in (whole[:20], whole[:-5], b""):
        path.write_bytes(torn)
        with pytest.raises(UserError, match=r"round-0000\.safetensors: is not a round's rewards"):
            rounds.read(0)


def test_what_cannot_be_kept_whole_is_refused(tmp_path):
    rounds = AppliedRounds(LocalStorage(tmp_path))
    with pytest.raises(ValueError, match="only whole batches are kept"):
        rounds.write(AppliedRound(batch().for_shard(0, 9), 4, {}))


@pytest.mark.parametrize("perturbed", [False, True])
def test_rollouts_come_back_bit_for_bit(tmp_path, perturbed):
    rounds = AppliedRounds(LocalStorage(tmp_path))
    made = rollouts(perturbed)
    rounds.write(AppliedRound(batch(rollouts=made), 4, {}))
    found = rounds.read(0).batch.rollouts
    assert found.sigma == made.sigma
    for name in ("latent", "perturbation", "strength", "reward", "log_prob_grad"):
        a, b = getattr(made, name), getattr(found, name)
        assert (a is b is None) or (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()), name


def rollouts(perturbed: bool = False) -> Rollouts:
    rng = np.random.default_rng(0)
    latent, reward = np.array([3, 3, 70_000_000_000]), np.array([0.1, np.nan, -0.2], np.float32)
    some = rng.random((3, 4)).astype(np.float32)
    return Rollouts(latent, some if perturbed else None, np.ones(3, np.float32), reward, 0.5 if perturbed else 0.0,
                    None if perturbed else some)  # fmt: skip


# ---------------------------------------------------------------------- may a run be replayed?


def run_config(folder: Path, name: str, **sections: Any) -> RunConfig:
    tree = {
        "name": name, "runs_dir": str(folder), "hook": {"layer": 2}, "sae": {"d_sae": 64, "k": 4},
        "trainer": {"steps": 40}, "rlaif": {"steps": 20, "rounds": 2},
    }  # fmt: skip
    for key, value in sections.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    return RunConfig.model_validate(tree)


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder of a run that has ended."""
    config = run_config(tmp_path, "first")
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    checkpoint.commit(checkpoint.step_dir(checkpoint.home(config), 60), {"step": 60})
    rounds = AppliedRounds(LocalStorage(config.run_dir))
    for number in range(2):
        rounds.write(AppliedRound(batch(number), 41 + 10 * number, {}))
    return config.run_dir


def replay_of(folder: Path, **sections: Any) -> RunConfig:
    rlaif = {"replay_rewards": str(folder), **sections.pop("rlaif", {})}
    return run_config(folder.parent, sections.pop("name", "second"), rlaif=rlaif, **sections)


def test_a_finished_run_may_be_replayed_with_another_credit_judge_and_place(finished):
    check_replay(run_config(finished.parent, "second"))
    check_replay(replay_of(finished))
    check_replay(replay_of(finished, rlaif={"gamma": 0.1, "estimator": "bank_gate", "control": True, "latents": 5}))
    check_replay(replay_of(finished, judge={"model": "/no/such/model"}, trainer={"tp": 1, "keep_checkpoints": 9}))
    moved = finished.rename(finished.parent / "elsewhere")
    check_replay(replay_of(moved))


def test_rewards_without_rollouts_are_no_replay_for_an_estimator_that_learns_from_them(finished):
    config = replay_of(finished, rlaif={"estimator": "teacher_gate+policy_gradient"})
    with pytest.raises(
        UserError, match=r"rlaif\.estimator = teacher_gate\+policy_gradient: .* round 1 of .* holds none"
    ):
        check_replay(config)
    rounds = AppliedRounds(LocalStorage(finished))
    for number in range(2):
        rounds.write(AppliedRound(batch(number, rollouts=rollouts()), 41 + 10 * number, {}))
    check_replay(config)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"sae": {"k": 8}}, "sae.k was 4, is 8"),
        ({"trainer": {"steps": 50}}, "trainer.steps was 40, is 50"),
        ({"rlaif": {"steps": 30}}, "rlaif.steps was 20, is 30"),
        ({"rlaif": {"evidence_blocks": 3}}, "rlaif.evidence_blocks was 16, is 3"),
        ({"judge": {"context_tokens": 16}}, "judge.context_tokens was 32, is 16"),
        ({"rlaif": {"enabled": False}}, "rlaif.enabled is false"),
        ({"name": "first"}, "is this run's own folder"),
    ],
)
def test_a_replay_that_would_be_another_run_is_refused_with_the_key_and_both_values(finished, sections, said):
    with pytest.raises(UserError) as error:
        check_replay(replay_of(finished, **sections))
    assert said in str(error.value)
    assert "rlaif.replay_rewards" in str(error.value)
    assert "\n" not in str(error.value)


def test_rewards_that_are_not_there_or_unreadable_are_named(finished, tmp_path):
    config = replay_of(finished)
    (finished / "rewards" / "round-0001.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"round-0001\.safetensors: is not a round's rewards"):
        check_replay(config)
    (finished / "rewards" / "round-0001.safetensors").unlink()
    with pytest.raises(UserError, match="holds no rewards of round 2 of 2"):
        check_replay(config)
    checkpoint.remove_all(finished / "checkpoints")
    checkpoint.commit(finished / "checkpoints" / "step-55", {"step": 55})
    with pytest.raises(UserError, match=r"that run is not finished \(step 55 of 60\)"):
        check_replay(config)
    with pytest.raises(UserError, match=r"rlaif\.replay_rewards = .*nowhere: holds no run"):
        check_replay(replay_of(tmp_path / "nowhere"))
