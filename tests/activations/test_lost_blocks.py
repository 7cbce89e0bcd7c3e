"""Blocks whose objects died with their node: the stream leases them again when it goes back to a commit."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray
from fake_ray import FakeRay, Ref, on_fake_ray

from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig
from sae_ray.trainer.group import RankDied, TrainerGroup

fake = pytest.fixture(on_fake_ray)
TREE: dict[str, Any] = {
    "name": "lost",
    "hook": {"layer": 2},
    "activations": {"producers": 2, "mix_blocks": 2, "window_blocks": 6},
}


def filled(fake: FakeRay) -> BlockStream:
    """A stream whose two producers, one on each node, have made all six blocks of its window."""
    stream = BlockStream(RunConfig.model_validate(TREE))
    stream.start()
    while True:
        stream.pump(time.monotonic())
        if not stream.pending_refs():
            return stream
        for ref in stream.pending_refs():
            stream.on_ready(ref, time.monotonic())


def test_blocks_of_a_node_that_is_gone_are_made_again_and_the_others_kept(fake: FakeRay) -> None:
    stream = filled(fake)
    before = {window: stream.window_refs(window) for window in range(3)}
    fake.alive["node-1"] = False
    stream.seek(0)
    lost = [window for window in range(3) if not stream.window_ready(window)]
    assert lost, "each producer made some"
    assert 0 < stream.counters()["held"] < 6
    assert stream.counters()["reissued"] == 6 - stream.counters()["held"]
    stream.pump(time.monotonic())
    while stream.pending_refs():
        for ref in stream.pending_refs():
            stream.on_ready(ref, time.monotonic())
        stream.pump(time.monotonic())
    after = {window: stream.window_refs(window) for window in range(3)}
    kept = [old is new for window in range(3) for old, new in zip(before[window], after[window], strict=True)]
    assert 0 < sum(kept) < 6


def test_while_no_node_is_gone_going_back_keeps_every_block(fake: FakeRay) -> None:
    stream = filled(fake)
    stream.seek(0)
    assert stream.counters()["held"] == 6


def test_a_window_that_ranks_had_fetched_before_the_node_died_still_counts_as_trained(fake: FakeRay) -> None:
    stream = filled(fake)
    fake.alive["node-1"] = False
    stream.trained(0)
    assert stream.counters()["held"] == 4


def test_a_rank_that_cannot_fetch_a_block_ends_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ray.exceptions.ObjectLostError("ab" * 28, "", "")
    error = ray.exceptions.RayTaskError("train_window", "traceback", lost)

    def get(_ref: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    group = TrainerGroup(RunConfig.model_validate(TREE), {}, 0)
    with pytest.raises(RankDied, match="a node died with blocks that the group needed for window 3"):
        group.take("window 3 to be trained", Ref())  # type: ignore[arg-type]
