"""A caller that was busy elsewhere holds its own lateness against no producer."""

from __future__ import annotations

from typing import Any

import pytest
from fake_ray import FakeRay, on_fake_ray

from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig

fake = pytest.fixture(on_fake_ray)
TIMEOUT_S = 60.0
TREE: dict[str, Any] = {
    "name": "late",
    "hook": {"layer": 2},
    "activations": {"producers": 2, "mix_blocks": 2, "window_blocks": 6, "lease_timeout_s": TIMEOUT_S},
}


def leased(fake: FakeRay, now: float) -> BlockStream:
    stream = BlockStream(RunConfig.model_validate(TREE))
    stream.start()
    stream.pump(now)
    assert stream.counters()["leased"] == 4
    return stream


def test_blocks_that_were_ready_in_time_are_taken_and_no_producer_is_killed(fake: FakeRay) -> None:
    stream = leased(fake, 0.0)
    events = stream.pump(2 * TIMEOUT_S)  # the caller was away
    assert (fake.killed, stream.counters()["restarts"], stream.counters()["held"]) == (0, 0, 4)
    assert events == []
    assert stream.window_ready(0)


def test_a_producer_whose_blocks_do_not_come_is_still_ended(fake: FakeRay) -> None:
    stream = leased(fake, 0.0)
    hangs = stream._pool.slots[0]
    for ref, pending in stream._pending.items():
        ref.ready = pending.producer is not hangs  # type: ignore[attr-defined]
    (event,) = stream.pump(2 * TIMEOUT_S)
    assert (event["what"], event["producer"], fake.killed) == ("producer_died", 0, 1)
    assert len(event["reissued"]) == 2
    assert stream.counters()["held"] == 2


def test_a_block_that_is_under_way_has_its_own_time_from_when_the_one_before_it_was_done(fake: FakeRay) -> None:
    stream = leased(fake, 0.0)
    for ref, pending in stream._pending.items():
        ref.ready = pending.key.block_id < 2  # type: ignore[attr-defined]
    assert stream.pump(2 * TIMEOUT_S) == []
    assert (fake.killed, stream.counters()["held"]) == (0, 2)
    for ref in stream._pending:
        ref.ready = False  # type: ignore[attr-defined]
    assert {event["what"] for event in stream.pump(3 * TIMEOUT_S + 1)} == {"producer_died"}


def test_a_new_actor_that_has_started_meanwhile_is_not_late(fake: FakeRay) -> None:
    stream = leased(fake, 0.0)
    stream._replace(stream._pool.slots[1], 0.0, "killed")
    (event,) = [e for e in stream.pump(10 * stream._cfg.ray.wait_s) if e["what"] == "producer_ready"]
    assert event["producer"] == 1
