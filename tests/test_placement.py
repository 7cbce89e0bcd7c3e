"""What a pending placement says it waits for, and when a cluster can never hold a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.config import RunConfig
from sae_ray.placement import Ask, NodeRoom, asks_of, held, never, nodes_of, selected, trainer_ask, waits_for


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "hook": {"layer": 0}, **sections})


def node(address: str, free: dict[str, float], total: dict[str, float], **labels: str) -> NodeRoom:
    return NodeRoom(address, total, free, {key.replace("_", "-"): value for key, value in labels.items()})


GPUS = Ask("trainer", "rank", 3, {"CPU": 2.0, "GPU": 1.0}, {}, "trainer.dp")


def test_a_tensor_parallel_group_is_one_bundle_and_so_on_one_node() -> None:
    asked = trainer_ask(
        config(trainer={"dp": 3, "tp": 4, "cpus": 0.5, "gpus": 1, "resources": {"trainer": 0.01}}).trainer
    )
    assert (asked.bundles, asked.each) == (3, {"CPU": 2.0, "GPU": 4.0, "trainer": 0.04})
    # Four ranks of 1.5 GPUs' share: Ray gives more than one GPU only whole.
    assert trainer_ask(config(trainer={"tp": 3, "gpus": 0.5}).trainer).each["GPU"] == 2.0


def test_nodes_are_read_as_ray_describes_them_and_dead_ones_left_out() -> None:
    described = [
        {
            "NodeID": "a" * 8,
            "Alive": True,
            "NodeManagerAddress": "10.0.0.1",
            "Resources": {"CPU": 4.0},
            "Labels": {"x": "y"},
        },
        {"NodeID": "b" * 8, "Alive": False, "NodeManagerAddress": "10.0.0.2", "Resources": {}},
    ]
    assert nodes_of(described, {"a" * 8: {"CPU": 1.5}}) == [
        NodeRoom("10.0.0.1", {"CPU": 4.0}, {"CPU": 1.5}, {"x": "y"})
    ]


def test_a_wait_names_the_resource_that_lacks_how_much_is_asked_and_what_is_free_where() -> None:
    nodes = [
        node("10.0.0.1", {"CPU": 6, "GPU": 0.5}, {"CPU": 8, "GPU": 4}),
        node("10.0.0.2", {"CPU": 8}, {"CPU": 8, "GPU": 4}),
    ]
    assert waits_for(GPUS, 1, nodes) == (
        "trainer: 1 of 3 places found; each rank needs 2 CPU and 1 GPU on one node; too little GPU is free on any; "
        "free: 10.0.0.1 6 of 8 CPU, 0.5 of 4 GPU; 10.0.0.2 8 of 8 CPU, 0 of 4 GPU"
    )


def test_enough_in_all_but_on_no_single_node_is_said_node_by_node() -> None:
    ask = Ask("trainer", "tensor-parallel group of 4 ranks", 1, {"GPU": 4.0}, {}, "trainer.tp")
    told = waits_for(ask, 0, [node(f"10.0.0.{i}", {"GPU": i % 4}, {"GPU": 4}) for i in range(1, 8)])
    assert "too little GPU is free on any" in told
    # The emptiest first, and not all of a thousand.
    assert told.split("free: ")[1].startswith("10.0.0.3 3 of 4 GPU")
    assert told.endswith("; and 3 nodes with less")


def test_a_wait_for_nodes_with_a_label_looks_at_those_only() -> None:
    ask = Ask("producers", "producer", 1, {"CPU": 1.0}, {"sae-ray/role": "producer"}, "activations.cpus")
    judges = NodeRoom("10.0.0.1", {"CPU": 8}, {"CPU": 8}, {"sae-ray/role": "judge"})
    assert "with sae-ray/role=producer, and none of the 1 nodes is such" in waits_for(ask, 0, [judges])
    assert waits_for(ask, 0, []).endswith("and there are no nodes")
    ours = NodeRoom("10.0.0.2", {"CPU": 0}, {"CPU": 8}, {"sae-ray/role": "producer"})
    assert "10.0.0.1" not in waits_for(ask, 0, [judges, ours])


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True), ({"role": "judge"}, True), ({"role": "trainer"}, False), ({"role": "!trainer"}, True),
        ({"role": "in(trainer, judge)"}, True), ({"role": "!in(trainer, judge)"}, False), ({"zone": "a"}, False),
        ({"zone": "!a"}, True), ({"role": "judge", "zone": "a"}, False),
    ],
)  # fmt: skip
def test_label_selectors_are_read_as_ray_reads_them(selector: dict[str, str], fits: bool) -> None:
    assert selected({"role": "judge"}, selector) is fits


def test_a_cluster_that_can_never_hold_a_run_is_known_although_all_is_free() -> None:
    run = config(trainer={"dp": 2, "tp": 4, "gpus": 1, "cpus": 1}, activations={"producers": 3, "gpus": 1, "cpus": 1})
    eight = node("10.0.0.1", {}, {"CPU": 64, "GPU": 8})
    # 8 GPUs hold the trainer, and 3 the producers, but not both.
    assert never(asks_of(run, 3), [eight]) == (
        "the cluster has 8 GPU and 11 are asked (8 for the trainer and 3 for the producers): add nodes, or lower "
        "trainer.dp, trainer.tp, trainer.cpus or trainer.gpus or activations.producers, activations.cpus or "
        "activations.gpus"
    )
    assert never(asks_of(run, 3), [eight, node("10.0.0.2", {}, {"CPU": 8, "GPU": 3})]) is None
    # 12 GPUs, but nowhere four of them together twice.
    threes = [node(f"10.0.0.{i}", {}, {"CPU": 64, "GPU": 3}) for i in range(4)]
    assert "holds at most 0 of 2 places of the trainer" in str(never(asks_of(run, 0), threes))


@settings(max_examples=200, deadline=None)
@given(
    rooms=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=4),
    cpu=st.integers(1, 4),
    gpu=st.integers(0, 3),
)
def test_the_count_of_places_is_that_of_filling_the_nodes_one_by_one(rooms, cpu, gpu) -> None:
    ask = Ask("trainer", "rank", 1000, {"CPU": cpu} | ({"GPU": gpu} if gpu else {}), {}, "")
    count, nodes = 0, [node(str(i), {}, {"CPU": c, "GPU": g}) for i, (c, g) in enumerate(rooms)]
    for cpus, gpus in rooms:
        while cpus >= cpu and gpus >= gpu:
            cpus, gpus, count = cpus - cpu, gpus - gpu, count + 1
    assert held(ask, nodes) == count


def test_shares_of_a_cpu_are_counted_as_ray_counts_them() -> None:
    tenth = Ask("producers", "producer", 100, {"CPU": 0.1}, {}, "")
    assert held(tenth, [node("a", {}, {"CPU": 0.3})]) == 3, "0.3 / 0.1 is less than 3 in floating point"
    assert math.floor(0.3 / 0.1) == 2
