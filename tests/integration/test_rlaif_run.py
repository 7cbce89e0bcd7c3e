"""The whole loop on a tiny run: real producers, ranks and vLLM judge, and rewards on their way back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from runs import finish, losses, start, train, wait_for, write_config
from word_judge import word_judge

from sae_ray.activations.block import Block
from sae_ray.activations.producer import ActivationProducer
from sae_ray.config_file import load_config
from sae_ray.reward.applied import AppliedRounds
from sae_ray.reward.bank import VerdictBank
from sae_ray.sae.formats import import_saelens
from sae_ray.sae.inference import TrainedSAE
from sae_ray.storage import LocalStorage
from sae_ray.telemetry import read_jsonl
from sae_ray.trainer import checkpoint

pytestmark = pytest.mark.timeout(900)

LOOP: dict[str, Any] = {
    "trainer": {"steps": 24, "checkpoint_every": 50},
    "rlaif": {
        "enabled": True, "steps": 8, "rounds": 2, "max_staleness_steps": 2, "latents": 4, "evidence_blocks": 24,
        "positives": 4, "near_misses": 2, "siblings": 2, "randoms": 2, "explainer_examples": 3, "candidates": 1,
        "max_context_share": 0.9, "control": True,
    },
    "evaluation": {"blocks": 12, "ce_sequences": 2, "latents": 4, "positives": 4, "negatives": 3,
                   "random_directions": 2, "threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(judge_app) -> dict[str, Any]:
    """Sections that make a run join the session's Ray and use its judge."""
    return {
        "ray": {"address": ray.get_runtime_context().gcs_address},
        "judge": {"app": judge_app.name, "calibration": {"concepts": 8}},
    }


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("loop")
    config = write_config(folder, name="loop", **shared, **LOOP)
    printed = train(config, timeout=600)
    return folder, printed


def test_a_run_goes_from_text_to_rewards_to_a_report(finished):
    folder, printed = finished
    run = folder / "runs" / "loop"
    events = read_jsonl(run / "events.jsonl")
    kinds = [event["event"] for event in events]
    assert kinds.count("rewards_applied") == 2
    assert kinds.index("calibration") < kinds.index("rewards_applied")
    assert sorted(losses(folder, "loop")) == list(range(1, 33))
    assert "RLAIF" in printed
    assert "report.html" in printed
    for name in ("config.yaml", "calibration.json", "evaluation.json", "report.html", "saelens/cfg.json"):
        assert (run / name).is_file(), name
    assert any((run / "tensorboard").iterdir())


def test_rewards_lag_behind_the_trainer_by_no_more_than_allowed(finished):
    folder, _ = finished
    for event in read_jsonl(folder / "runs" / "loop" / "events.jsonl"):
        if event["event"] == "rewards_applied":
            assert 0 <= event["at_step"] - event["judged_at_step"] <= 2


def test_the_judge_was_measured_in_both_modes_and_likelihood_was_picked(finished):
    folder, _ = finished
    report = json.loads((folder / "runs" / "loop" / "calibration.json").read_text())
    assert report["mode"] == "likelihood"
    assert report["modes"]["likelihood"]["low"] > 0.5
    assert report["modes"]["yes_no"]["auroc"] < report["modes"]["likelihood"]["auroc"]


def test_every_verdict_is_banked_with_what_it_takes_to_use_it_again(finished):
    folder, _ = finished
    rows = VerdictBank(LocalStorage(folder / "runs" / "loop")).read()
    assert {row["purpose"] for row in rows} == {"select", "score", "shuffled"}
    assert {row["round"] for row in rows} == {0, 1}
    answered = [row for row in rows if row["score"] is not None]
    assert len(answered) == len(rows)
    assert all(0 <= row["probability"] <= 1 and row["text"] and row["explanation"] for row in answered)
    # One pair was judged once: the same question always has the same answer on record.
    scores: dict[tuple[str, str], set[float]] = {}
    for row in answered:
        scores.setdefault((row["text"], row["explanation"]), set()).add(row["score"])
    assert all(len(values) == 1 for values in scores.values())


def test_explanations_are_scored_on_texts_that_neither_explained_nor_chose_them(finished):
    folder, _ = finished
    rows = VerdictBank(LocalStorage(folder / "runs" / "loop")).read()
    for latent in {row["latent"] for row in rows}:
        for number in (0, 1):
            mine = [row for row in rows if row["latent"] == latent and row["round"] == number]
            chose = {row["context"] for row in mine if row["purpose"] == "select"}
            scored = {row["context"] for row in mine if row["purpose"] == "score"}
            assert not chose & scored


def test_the_evaluation_compares_three_versions_with_both_nulls(finished):
    folder, _ = finished
    result = json.loads((folder / "runs" / "loop" / "evaluation.json").read_text())
    assert set(result["core"]) == {"before", "rlaif", "control"}
    assert {"before", "rlaif", "control", "random_directions"} <= set(result["detection"])
    for row in result["core"].values():
        assert 0 < row["fvu"] < 2
        assert row["ce_clean"] < row["ce_mean_ablation"]
        assert row["ce_recovered_mean"] is not None
    assert {pair["name"] for pair in result["paired"]} >= {"rlaif - control", "rlaif - before"}
    for row in result["detection"].values():
        assert row["n_latents"] == 0 or 0 <= row["shuffled"] <= 1


def test_the_exported_sae_is_the_trained_one_on_real_activations(finished):
    folder, _ = finished
    run = folder / "runs" / "loop"
    config = load_config(run / "config.yaml")
    _, stored = ActivationProducer(config.model_dump_json()).produce("heldout", 0)
    raw_TD = Block.from_numpy_dict(stored).acts_TD(torch.float32)
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    trained = TrainedSAE.from_checkpoint(*checkpoint.load_full(path, "main"))
    exported = import_saelens(run / "saelens")
    assert torch.allclose(exported.encode(raw_TD), trained.encode(raw_TD), rtol=1e-4, atol=1e-4)
    scale = float(raw_TD.norm(dim=1).mean())
    assert np.allclose(exported.reconstruct(raw_TD), trained.reconstruct(raw_TD), atol=1e-4 * scale)


def test_the_control_copy_trains_on_the_same_batches(finished):
    folder, _ = finished
    rows = [row for row in read_jsonl(folder / "runs" / "loop" / "metrics.jsonl") if row["step"] > 24]
    assert all("control/loss" in row for row in rows)
    assert rows[0]["fvu"] == rows[0]["control/fvu"]


def test_every_applied_round_is_kept_with_its_step(finished):
    folder, _ = finished
    rounds = AppliedRounds(LocalStorage(folder / "runs" / "loop"))
    events = [e for e in read_jsonl(folder / "runs" / "loop" / "events.jsonl") if e["event"] == "rewards_applied"]
    assert [(e["round"], e["at_step"]) for e in events] == [(n, rounds.read(n).at_step) for n in rounds.numbers()]
    assert [event["alarms"]["state"] for event in events] == ["ok", "ok"]
    first, second = (event["alarms"]["alarm/rarity"] for event in events)
    assert first == 0, "the first round is the reference"
    assert 0 < abs(second) < 0.1, "four steps later its latents fire a little differently"


def numbers(run: Path) -> list[dict[str, float]]:
    """What a run's metrics say, but for times."""
    rows = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "seconds" not in k and "tokens_per_s" not in k} for row in rows]


def test_a_replay_has_the_losses_of_the_run_and_asks_no_judge(ray_session, tmp_path):
    address = {"address": ray.get_runtime_context().gcs_address}
    # A judge that knows the words it is asked about, latents of few words, and texts enough: some are trusted.
    texts = {"latents": 24, "max_context_share": 0.35, "positives": 16, "near_misses": 0, "siblings": 0, "randoms": 16}
    loop = {"trainer": LOOP["trainer"], "rlaif": {**LOOP["rlaif"], **texts}}
    with word_judge() as url:
        judge = {"endpoint": url, "calibration": {"concepts": 8}}
        train(write_config(tmp_path, name="taught", ray=address, judge=judge, **loop), timeout=400)
    taught = tmp_path / "runs" / "taught"
    credit = [row.get("credit_loss", 0) for row in numbers(taught)]
    at_step = AppliedRounds(LocalStorage(taught)).read(0).at_step
    assert not any(credit[:at_step])
    assert credit[at_step] > 0, "a run that was taught nothing is repeated by any training"
    # Nobody could serve this model.
    evaluation = LOOP["evaluation"]
    config = write_config(
        tmp_path, name="replay", ray=address, judge={"model": "/no/such/model"}, evaluation=evaluation, **loop
    )
    train(config, "--replay-rewards", str(taught), timeout=300)
    run = tmp_path / "runs" / "replay"
    assert numbers(run) == numbers(taught)
    assert not (run / "bank").exists()
    assert not (run / "calibration.json").exists()
    assert json.loads((run / "evaluation.json").read_text())["detection"] == {}
    # Going on without the other run's rewards would ask judges from here on.
    code, _, err = finish(start(config), timeout=120)
    assert code == 2
    assert "rlaif.replay_rewards was " in err


def test_what_the_stored_rewards_say_is_what_a_replay_is_taught(finished, shared):
    """So small a run may trust no explanation; here all are, by the file alone."""
    folder, _ = finished
    taught = folder / "runs" / "taught"
    shutil.copytree(folder / "runs" / "loop", taught)
    rounds = AppliedRounds(LocalStorage(taught))
    first = rounds.read(0)
    trusted = np.full_like(first.batch.credit_weight, 1 / len(first.batch.latents))
    rounds.write(replace(first, batch=replace(first.batch, credit_weight=trusted)))
    config = write_config(folder, name="student", ray=shared["ray"], judge={"model": "/no/such/model"}, **LOOP)
    train(config, "--replay-rewards", str(taught), timeout=300)
    before, after = numbers(folder / "runs" / "loop"), numbers(folder / "runs" / "student")
    assert before[: first.at_step] == after[: first.at_step]
    assert after[first.at_step]["credit_loss"] > 0
    assert after[-1]["loss"] != before[-1]["loss"]


def test_a_finished_run_is_shown_again_and_not_trained_again(finished):
    folder, _ = finished
    printed = train(folder / "loop.yaml", timeout=120)
    assert "is complete" in printed


def test_a_judge_at_chance_is_refused_before_it_can_teach(shared, tmp_path):
    # SmolLM2-135M answers yes/no questions at chance: a real judge that must not be believed.
    judge = {**shared["judge"], "mode": "yes_no"}
    process = start(write_config(tmp_path, name="chance", ray=shared["ray"], judge=judge, **LOOP))
    code, out, err = finish(process, timeout=400)
    assert code == 2, out + err
    assert "is at chance" in err
    assert "yes_no AUROC" in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs" / "chance" / "bank").exists()


def test_the_reward_desks_death_in_the_middle_of_a_round_sets_the_run_back_and_ends_nothing(shared, tmp_path):
    config = write_config(tmp_path, name="deskless", **shared, **LOOP)
    process = start(config)
    events = tmp_path / "runs" / "deskless" / "events.jsonl"
    asked = lambda: events.exists() and any(e["event"] == "round_requested" for e in read_jsonl(events))  # noqa: E731
    wait_for(asked, process, timeout=400)
    (desk,) = [p for p in psutil.process_iter(["cmdline"]) if "ray::RewardDesk" in (p.info["cmdline"] or [""])[0]]
    desk.kill()
    code, out, err = finish(process, timeout=500)
    assert code == 0, err[-3000:]
    assert "the reward desk died; building the group again" in out
    found = read_jsonl(events)
    kinds = [event["event"] for event in found]
    assert kinds.count("rank_died") == 1
    assert kinds.index("rank_died") < kinds.index("rewards_applied")
    assert [event["round"] for event in found if event["event"] == "rewards_applied"] == [0, 1]
    assert sorted(losses(tmp_path, "deskless")) == list(range(1, 33))


def test_a_corrupt_shard_is_named_before_a_cluster_starts(finished, tmp_path):
    folder, _ = finished
    path = checkpoint.latest(folder / "runs" / "loop" / "checkpoints")
    assert path is not None
    (shard,) = path.glob("rank-1.main.*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8] + b"\0" * 7 + b"\1")
    try:
        (folder / "runs" / "loop" / "evaluation.json").rename(tmp_path / "evaluation.json")
        code, out, err = finish(start(folder / "loop.yaml"), timeout=120)
    finally:
        shard.write_bytes(whole)
        (tmp_path / "evaluation.json").rename(folder / "runs" / "loop" / "evaluation.json")
    assert code == 2, out + err
    assert f"{shard.name}: is corrupt" in err
    assert len(err.strip().splitlines()) == 1
    assert "starting" not in out
