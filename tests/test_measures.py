"""Shares, ages and waits against what was put in, by a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sae_ray import measures
from sae_ray.activations.scaling import Seen, Shares
from sae_ray.activations.scheduler import BlockScheduler
from sae_ray.measures import MEASURED, SPAN_S, Measures, Share
from sae_ray.telemetry import RunStatus


class Recorded:
    def __init__(self, run: str) -> None:
        self.values: dict[str, float] = {}

    def set(self, name: str, value: float) -> None:
        self.values[name] = value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(t=1000.0)
    monkeypatch.setattr(measures.time, "monotonic", lambda: now.t)
    monkeypatch.setattr(measures, "Gauges", Recorded)
    return now


def a_run(**changes: Any) -> Any:
    """What `Measures` looks at of a controller."""
    counters = {
        "ready": 2, "starting": 1, "idle": 0, "restarts": 3, "reissued": 4, "duplicates": 5, "tokens_per_s": 800.0,
        "held": 9, "leased": 3,
    }  # fmt: skip
    run = SimpleNamespace(
        stream=SimpleNamespace(counters=lambda: counters, oldest_lease_s=lambda now: 6.0, waits=Shares()),
        pipeline=Pipeline(),
        desk=SimpleNamespace(round_age_s=0.0, round_open=False, round_step=0, counters={}),
        rates=SimpleNamespace(steps_per_s=lambda: 2.0, tokens_per_s=lambda: 500.0),
        config=SimpleNamespace(total_steps=100, rlaif=SimpleNamespace(rounds=4, judged=False)),
        status=RunStatus(), saving=None, submitted_step=50, committed_step=40, generation=1,
        rounds_done=0,
    )  # fmt: skip
    vars(run).update(changes)
    return run


class Pipeline:
    def __len__(self) -> int:
        return 2

    def oldest_s(self, now: float) -> float:
        return 7.0


def test_a_share_is_of_the_last_minute():
    share = Share()
    assert share.value is None
    part = 0.0
    for second in range(200):
        part += 0.0 if second < 100 else 0.25
        share.add(float(second), part, second + 1.0)
    assert share.value == pytest.approx(0.25)
    for second in range(200, 200 + int(SPAN_S) // 2):
        part += 1.0
        share.add(float(second), part, second + 1.0)
    assert share.value == pytest.approx((0.25 + 1) / 2, abs=0.02)


def test_the_trainers_and_the_producers_shares(clock):
    told = Measures("run")
    run = a_run()
    assert told.measure(run, clock.t)["trainer_wait_share"] is None
    for second in range(20):
        clock.t += 1
        run.stream.waits.add(Seen("starves" if second % 4 == 0 else "trains", ready=2, idle=second % 2), 1.0)
        found = told.measure(run, clock.t)
    assert found["trainer_wait_share"] == pytest.approx(0.25)
    assert found["producers_idle_share"] == pytest.approx(0.25)
    for _ in range(int(SPAN_S) + 2):  # a wait for judges says nothing about blocks
        clock.t += 1
        run.stream.waits.add(Seen("elsewhere", ready=2, idle=2), 1.0)
        found = told.measure(run, clock.t)
    assert found["trainer_wait_share"] is None
    assert found["producers_idle_share"] is None


def test_ages_grow_until_what_they_wait_for_comes(clock):
    told = Measures("run")
    run = a_run()
    run.status.judge_queue, run.status.verdicts = 8, 2
    told.measure(run, clock.t)
    clock.t += 30
    found = told.measure(run, clock.t)
    assert (found["commit_age_s"], found["verdict_age_s"], found["judge_backlog_s"]) == (30, 30, 30)
    told.committed()
    run.status.verdicts = 3
    found = told.measure(run, clock.t)
    assert (found["commit_age_s"], found["verdict_age_s"], found["judge_backlog_s"]) == (0, 0, 30)
    run.status.judge_queue = 0
    clock.t += 5
    found = told.measure(run, clock.t)
    assert (found["verdict_age_s"], found["judge_backlog_s"]) == (0, 0)


def test_rewards_age_in_steps_and_rounds_in_steps_ahead(clock):
    told = Measures("run")
    run = a_run(desk=SimpleNamespace(round_age_s=12.0, round_open=True, round_step=44))
    found = told.measure(run, clock.t)
    assert found["reward_age_steps"] is None
    assert (found["round_steps_ahead"], found["round_age_s"], found["uncommitted_steps"]) == (6, 12.0, 10)
    told.rewarded(30, shared=2)
    found = told.measure(run, clock.t)
    assert (found["reward_age_steps"], found["explanations_shared"]) == (20, 2)


def test_waits_add_up_and_a_save_has_an_age(clock):
    told = Measures("run")
    told.waited("save", 1.5)
    told.waited("save", 2.0)
    told.waited("round", 3.0)
    found = told.measure(a_run(saving=SimpleNamespace(age_s=9.0)), clock.t)
    assert (found["save_wait_s"], found["round_wait_s"], found["save_age_s"]) == (3.5, 3.0, 9.0)


def test_the_screen_is_up_to_date_at_every_turn(clock):
    told = Measures("run")
    run = a_run()
    told.show(run)
    run.desk.counters = {"queue": 7, "verdicts": 12, "verdicts_per_s": 1.5, "state": "loading"}
    run.desk.calibrated = False
    told.show(run)
    status = run.status
    assert (status.blocks_held, status.blocks_leased, status.judge_queue, status.judge) == (9, 3, 7, "loading")
    assert (status.producer_tokens_per_s, status.trainer_tokens_per_s) == (800, 500)


def test_what_is_left_counts_the_rounds_to_come_as_the_last_one(clock):
    told = Measures("run")
    run = a_run()
    run.status.step = 60
    assert told.seconds_left(run) == 40 / 2
    run.config.rlaif.judged, run.rounds_done = True, 1
    assert told.seconds_left(run) is None, "no round was waited for yet"
    told.waited("round", 50.0)
    told.waited("round", 30.0)
    told.waited("save", 5.0)
    assert told.seconds_left(run) == 40 / 2 + 3 * 30
    run.rates.steps_per_s = lambda: None
    assert told.seconds_left(run) is None


def test_everything_that_is_measured_is_set_once_a_second_and_shown(clock):
    told = Measures("run")
    run = a_run()
    run.status.step = 48
    told.show(run)
    gauges: Any = told._gauges
    assert found_of(gauges) >= {"step", "generation", "oldest_lease_s", "windows_in_flight", "steps_per_s"}
    assert gauges.values["windows_in_flight"] == 2
    assert run.status.measures.keys() <= MEASURED.keys()
    assert told.measure(run, clock.t).keys() == MEASURED.keys()
    gauges.values.clear()
    clock.t += 0.5
    told.show(run)
    assert not gauges.values
    clock.t += 0.6
    told.show(run)
    assert gauges.values


def found_of(gauges: Any) -> set[str]:
    return set(gauges.values)


def test_the_age_of_the_oldest_lease():
    leases = BlockScheduler(window_blocks=8, lease_timeout_s=60)
    assert leases.oldest_lease_s(100.0) == 0
    leases.lease("a", 100.0)
    key = leases.lease("b", 110.0)
    assert leases.oldest_lease_s(130.0) == 30
    leases.worker_died("a")
    assert leases.oldest_lease_s(130.0) == 20
    leases.complete("b", key, 131.0)  # type: ignore[arg-type]
    assert leases.oldest_lease_s(140.0) == 0
