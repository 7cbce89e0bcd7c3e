"""What a run does when its reward desk dies: what is open ends the generation, and the next has a new desk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray as real
from round_world import run_config

from sae_ray.controller import Controller
from sae_ray.errors import UserError
from sae_ray.reward import link
from sae_ray.reward.link import Calibrated, DeskDied, DeskLink
from sae_ray.trainer.group import RankDied

DEATH = real.exceptions.RayActorError("ab", "The actor died.\n\tclass_name: RewardDesk\n\tip: 10.0.0.7", False)


class Desk:
    """An actor that answers at once while it lives."""

    def __init__(self) -> None:
        self.alive, self.judges = True, False

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any) -> Any:
            return SimpleNamespace(name=name, desk=self, args=args)

        return SimpleNamespace(remote=ask)


class Ray:
    exceptions, ObjectRef = real.exceptions, object

    def __init__(self) -> None:
        self.desks: list[Desk] = []

    def remote(self, _kind: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._start))

    def _start(self, *_: Any) -> Desk:
        self.desks.append(Desk())
        return self.desks[-1]

    def kill(self, desk: Desk) -> None:
        desk.alive = False

    def cancel(self, _ref: Any) -> None: ...

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        done = [ref for ref in refs if not ref.desk.alive or ref.name != "judge_round" or ref.desk.judges]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: Any, timeout: float) -> Any:
        if not ref.desk.alive:
            raise DEATH
        return {"judge_round": ({}, "batch"), "progress": {"state": "judging"}}.get(ref.name, {})


@pytest.fixture
def ray(monkeypatch) -> Ray:
    fake = Ray()
    monkeypatch.setattr(link, "ray", fake)
    return fake


def calibrated(desk: DeskLink) -> None:
    desk.start()
    desk._polled = -link.JUDGE_POLL_S
    desk.pump()
    (ref,) = desk.pending_refs()
    assert isinstance(desk.on_ready(ref), Calibrated)
    desk.pump()


def looked(desk: DeskLink) -> None:
    """It asks how far the desk is, and takes the answer."""
    for _ in range(2):
        desk.pump()


@pytest.fixture
def desk(ray, tmp_path) -> DeskLink:
    desk = DeskLink(run_config(tmp_path), SimpleNamespace(start=lambda: None, ready=lambda timeout: True))  # type: ignore[arg-type]
    calibrated(desk)
    return desk


@pytest.mark.parametrize(
    ("open_", "needs_it"),
    [
        (True, lambda desk: desk.on_ready(desk.pending_refs()[0])),
        (True, looked),
        (False, lambda desk: desk.keep(0, 40, 0)),
    ],
)
def test_its_death_says_which_node_it_was_and_the_next_generation_gets_a_new_one(ray, desk, open_, needs_it):
    if open_:
        desk.open_round(0, 40, [], [])
    ray.desks[0].alive = False
    with pytest.raises(DeskDied, match=r"the reward desk died \(.*ip: 10\.0\.0\.7") as died:
        needs_it(desk)
    assert isinstance(died.value, RankDied)
    assert not desk.started
    assert not desk.calibrated
    assert not desk.round_open
    calibrated(desk)
    assert len(ray.desks) == 2
    desk.open_round(0, 40, [], [])
    ray.desks[1].judges = True
    assert desk.on_ready(desk.pending_refs()[0]).number == 0


def test_while_nothing_is_asked_of_it_its_death_stops_nobody(ray, desk):
    ray.desks[0].alive = False
    looked(desk)
    assert not desk.started
    for asks in (lambda: desk.open_round(1, 40, [], []), lambda: desk.keep(0, 40, 0)):
        with pytest.raises(DeskDied, match="the reward desk died before"):
            asks()


def test_a_desk_that_dies_before_the_judges_serve_is_missed_at_once(ray, tmp_path):
    desk = DeskLink(run_config(tmp_path), SimpleNamespace(start=lambda: None, ready=lambda timeout: False))  # type: ignore[arg-type]
    desk.start()
    ray.desks[0].alive = False
    with pytest.raises(DeskDied):
        looked(desk)


def test_a_round_that_is_judged_is_not_overdue_because_the_controller_was_held_up(ray, desk):
    desk.open_round(0, 40, [], [])
    desk._round.deadline._ends = 0.0
    with pytest.raises(UserError, match="judging round 0"):
        desk.pump()
    ray.desks[0].judges = True
    desk.pump()
    assert desk.on_ready(desk.pending_refs()[0]).number == 0


def test_after_too_many_deaths_the_run_ends_with_what_died_and_how_to_go_on(tmp_path):
    controller = Controller.__new__(Controller)
    controller.config = run_config(tmp_path)
    controller.generation = controller.config.trainer.max_restarts
    controller.log = SimpleNamespace(event=lambda *_, **__: None)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"the reward desk died \(judging round 1\); the same command resumes"):
        controller._end_generation(DeskDied("the reward desk died (judging round 1)"))
