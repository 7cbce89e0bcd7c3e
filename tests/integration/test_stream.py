"""The activation stream on a real Ray, with the real language model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from sae_ray.activations.producer import ActivationProducer
from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig
from sae_ray.errors import UserError

FIELDS = ("tokens_SL", "acts", "seq_T", "pos_T", "block_id")


def config(**sections: dict) -> RunConfig:
    tree: dict = {
        "name": "stream-test",
        "hook": {"layer": 4},
        "model": {"dtype": "float32"},
        "corpus": {"context_length": 32},
        "activations": {"producers": 2, "block_sequences": 2, "mix_blocks": 2, "window_blocks": 4},
        "ray": {"wait_s": 120},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return RunConfig.model_validate(tree)


@pytest.fixture(scope="module")
def reference() -> ActivationProducer:
    """Blocks as one process computes them, without Ray actors."""
    producer = ActivationProducer(config().model_dump_json())
    producer.ready()
    return producer


@pytest.fixture(scope="module")
def shared(ray_session: None) -> Iterator[BlockStream]:
    """Producers take seconds to import torch, so the tests share two of them."""
    stream = BlockStream(config())
    stream.start()
    yield stream
    stream.stop()


@pytest.fixture
def stream(shared: BlockStream) -> BlockStream:
    """The shared stream at window 0, with nothing held or leased."""
    shared.seek(10_000)
    while shared.pending_refs():
        done, _ = ray.wait(shared.pending_refs(), timeout=30, fetch_local=False)
        assert done
        shared.on_ready(done[0], time.monotonic())
    shared.seek(0)
    assert shared.counters()["held"] == 0
    return shared


def turn(stream: BlockStream) -> list[dict]:
    """One turn of a controller's loop."""
    events = stream.pump(time.monotonic())
    if refs := stream.pending_refs():
        done, _ = ray.wait(refs, timeout=1, fetch_local=False)
        for ref in done:
            assert stream.owns(ref)
            events += stream.on_ready(ref, time.monotonic())
    return events


def wait_window(stream: BlockStream, window: int, timeout_s: float = 90) -> list[dict]:
    events: list[dict] = []
    deadline = time.monotonic() + timeout_s
    while not stream.window_ready(window):
        assert time.monotonic() < deadline, stream.counters()
        events += turn(stream)
    return events


def assert_equals_reference(reference: ActivationProducer, split, block_id: int, ref: ray.ObjectRef) -> None:
    _, expected = reference.produce(split, block_id)
    got = ray.get(ref)
    for name in FIELDS:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{split} {block_id} {name}")


def test_two_producers_stream_the_blocks_that_one_process_computes(stream, reference):
    before = stream.counters()
    for window in range(3):
        wait_window(stream, window)
        refs = stream.window_refs(window)
        for block_id, ref in zip((2 * window, 2 * window + 1), refs, strict=True):
            assert_equals_reference(reference, "train", block_id, ref)
        assert stream.window_tokens(window) == sum(len(ray.get(ref)["acts"]) for ref in refs)
        stream.trained(window)
    after = stream.counters()
    assert stream.widths == {"blocks.4.hook_resid_post": 576}
    assert after["duplicates"] == before["duplicates"]
    assert after["tokens"] > before["tokens"]


def test_untrained_blocks_hold_production_back(stream):
    wait_window(stream, 1)
    for _ in range(5):
        turn(stream)
    assert stream.counters()["held"] == 4
    assert stream.pending_refs() == []
    stream.trained(0)
    stream.pump(time.monotonic())
    assert stream.counters()["leased"] == 2


def test_a_killed_producer_costs_no_block(stream, reference):
    restarts = stream.counters()["restarts"]
    stream.pump(time.monotonic())
    victim = stream.producers[0]
    os.kill(victim["pid"], signal.SIGKILL)  # in the middle of its first lease
    events = []
    for window in range(3):
        events += wait_window(stream, window)
        for block_id, ref in zip((2 * window, 2 * window + 1), stream.window_refs(window), strict=True):
            assert_equals_reference(reference, "train", block_id, ref)
        stream.trained(window)
    (death,) = [event for event in events if event["what"] == "producer_died"]
    # Which of the two got the first block is whoever was ready first.
    assert death["reissued"][0] in ("train/0", "train/1")
    while len(stream.producers) < 2:
        turn(stream)
    assert victim["pid"] not in [producer["pid"] for producer in stream.producers]
    assert stream.counters()["restarts"] == restarts + 1


def test_evidence_blocks_come_on_request_and_stay_until_released(stream, reference):
    ids = [0, 1, 2]
    stream.fetch("evidence", ids)
    deadline = time.monotonic() + 60
    while not stream.fetched("evidence", ids):
        assert time.monotonic() < deadline
        turn(stream)
    for block_id, ref in zip(ids, stream.fetched_refs("evidence", ids), strict=True):
        assert_equals_reference(reference, "evidence", block_id, ref)
    held = stream.counters()["held"]
    stream.release("evidence", ids)
    assert stream.counters()["held"] == held - 3
    assert not stream.fetched("evidence", ids)


def test_seek_continues_at_a_later_window_and_goes_back(stream, reference):
    stream.seek(3)
    wait_window(stream, 3)
    assert_equals_reference(reference, "train", 6, stream.window_refs(3)[0])
    stream.trained(3)
    stream.seek(2)  # a rank died, the last commit was before window 2
    wait_window(stream, 2)
    wait_window(stream, 3)
    assert_equals_reference(reference, "train", 4, stream.window_refs(2)[0])
    assert_equals_reference(reference, "train", 7, stream.window_refs(3)[1])


def test_dying_again_and_again_ends_the_run_with_the_reason():
    stream = BlockStream(config(activations={"producers": 1, "max_restarts": 1}))
    stream.start()

    def kill_every_producer() -> None:
        for _ in range(60):
            for producer in stream.producers:
                os.kill(producer["pid"], signal.SIGKILL)
            turn(stream)

    try:
        with pytest.raises(UserError, match=r"died 2 times \(activations.max_restarts = 1\)"):
            kill_every_producer()
    finally:
        stream.stop()


def test_a_hung_producer_is_replaced_when_its_lease_times_out(reference):
    stream = BlockStream(config(activations={"producers": 1, "lease_timeout_s": 3}))
    stream.start()
    try:
        pid = stream.producers[0]["pid"]
        os.kill(pid, signal.SIGSTOP)
        events = wait_window(stream, 0)
        assert "lease_timeout_s" in next(e["reason"] for e in events if e["what"] == "producer_died")
        assert_equals_reference(reference, "train", 0, stream.window_refs(0)[0])
    finally:
        stream.stop()


@pytest.mark.usefixtures("shared")
def test_producers_that_find_no_place_say_what_they_need():
    stream = BlockStream(config(activations={"cpus": 64}, ray={"wait_s": 2}))
    try:
        with pytest.raises(UserError, match=r"holds at most 0 of 2 places of the producers.* needs 64 CPU .* of 8 CPU"):
            stream.start()
    finally:
        stream.stop()


def test_producers_that_come_and_go_between_leases_change_no_block(shared, reference):
    stream = BlockStream(config(activations={"producers": {"min": 1, "max": 2}}), scaled=True)
    wanted = 1
    stream._scaling.wanted = lambda: wanted  # type: ignore[method-assign]
    events: list[dict] = []

    def follow(window: int) -> None:
        deadline = time.monotonic() + 300
        while not stream.window_ready(window):
            assert time.monotonic() < deadline, stream.counters()
            events.extend([*stream.observe("starves", time.monotonic()), *turn(stream)])
        for block_id, ref in zip((2 * window, 2 * window + 1), stream.window_refs(window), strict=True):
            assert_equals_reference(reference, "train", block_id, ref)
        stream.trained(window)

    try:
        stream.start()
        follow(0)
        wanted = 2
        deadline = time.monotonic() + 300
        while stream.counters()["ready"] < 2:
            assert time.monotonic() < deadline, stream.counters()
            events.extend([*stream.observe("starves", time.monotonic()), *turn(stream)])
        follow(1)
        wanted = 1
        follow(2)
        follow(3)
        assert [event["what"] for event in events if "producers" in event["what"]] == [
            "more_producers",
            "fewer_producers",
        ]
        assert any(event["what"] == "producer_left" for event in events)
        counters = stream.counters()
        assert (counters["ready"], counters["restarts"], counters["reissued"]) == (1, 0, 0)
    finally:
        stream.stop()


def test_an_error_for_the_user_crosses_the_actor_boundary(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    stream = BlockStream(config(corpus={"kind": "jsonl", "paths": [str(bad)]}, activations={"producers": 1}))
    stream.start()
    try:
        with pytest.raises(UserError, match=r"^.*bad\.jsonl:2: is not JSON"):
            wait_window(stream, 0)
    finally:
        stream.stop()
