"""The controller replays another run's rounds: after the same steps, in order, and without asking anybody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from sae_ray.config import RunConfig
from sae_ray.controller import Controller
from sae_ray.reward.applied import AppliedRound, AppliedRounds
from sae_ray.reward.credit import RewardBatch
from sae_ray.storage import LocalStorage
from sae_ray.telemetry import RunStatus

SUMMARY: dict[str, Any] = {
    "judged_at_step": 40, "latents": 1, "rewards": 1, "verdicts": 9, "missing": 0, "mean_auroc": 0.7,
    "mean_shuffled": 0.5, "seconds": 3.0, "usage": {}, "drift": None,
}  # fmt: skip


def batch(number: int) -> RewardBatch:
    none = np.zeros(0, dtype=np.int64)
    return RewardBatch(number, 40, none, none, none, none, none, none, none, none, 0.0, 0.0, gamma_factor=0.5 + number)


def replayed(tmp_path: Any, done: int) -> tuple[list[Any], list[Any], list[str]]:
    """What the ranks, the event log and the terminal get of a run that has `done` rounds behind it."""
    rounds = AppliedRounds(LocalStorage(tmp_path / "first"))
    for number, step in enumerate([43, 51]):
        told = {"alarms": {"state": "ok", "told": "alarms ok"}, "mean_shuffled": None} if number else {}
        rounds.write(AppliedRound(batch(number), step, {**SUMMARY, **told}))
    rlaif = {"replay_rewards": str(tmp_path / "first"), "steps": 20, "rounds": 2}
    tree = {"name": "second", "runs_dir": str(tmp_path), "hook": {"layer": 2}, "trainer": {"steps": 40}, "rlaif": rlaif}
    controller = Controller.__new__(Controller)
    controller.config = RunConfig.model_validate(tree)
    controller.status, controller.rounds_done = RunStatus(), done
    controller.pipeline = SimpleNamespace(step=40)  # type: ignore[assignment]
    controller.measures = SimpleNamespace(rewarded=lambda *_: None)  # type: ignore[assignment]
    applied, events, said = [], [], []

    def apply(batch: RewardBatch, evidence: list[Any]) -> None:
        applied.append((controller.submitted_step, batch.round, batch.gamma_factor, evidence))

    controller.group = SimpleNamespace(has_control=False, apply_rewards=apply)  # type: ignore[assignment]
    controller.log = SimpleNamespace(event=lambda kind, **about: events.append((kind, about)))  # type: ignore[assignment]
    controller.progress = SimpleNamespace(phase=lambda *_: None, say=said.append)  # type: ignore[assignment]
    controller._wait_evidence = lambda: ["block"]  # type: ignore[method-assign,list-item]
    controller._train_until = lambda step: setattr(controller.pipeline, "step", max(step, controller.pipeline.step))  # type: ignore[method-assign]
    # No desk, no judges: whoever asks for one fails.
    controller._rlaif_phase()
    assert controller.submitted_step == 60
    assert controller.rounds_done == 2
    return applied, events, said


def test_rounds_are_installed_where_the_other_run_installed_them(tmp_path):
    applied, events, said = replayed(tmp_path, done=0)
    assert applied == [(43, 0, 0.5, ["block"]), (51, 1, 1.5, ["block"])]
    assert [(kind, e["round"], e["at_step"], e["judged_at_step"]) for kind, e in events] == [
        ("rewards_applied", 0, 43, 40),
        ("rewards_applied", 1, 51, 40),
    ]
    assert {e["replayed_from"] for _, e in events} == {str(tmp_path / "first")}
    assert said[0].endswith("mean AUROC 0.700 (shuffled 0.500), 1 rewards applied at step 43")
    assert said[1].endswith("mean AUROC 0.700, 1 rewards applied at step 51; alarms ok"), "no null was judged"


def test_a_resumed_replay_goes_on_with_the_next_round(tmp_path):
    assert [row[:2] for row in replayed(tmp_path, done=1)[0]] == [(51, 1)]
