"""One run over two Ray nodes: the trainer's replicas on one each, producers on either, the losses of one node.

Where the machine allows, the nodes are network namespaces with an address each, so that whatever goes between them goes
over a wire: rendezvous, gradients, blocks. Elsewhere they are two raylets of Ray's own test cluster on one address.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from machines import PORT, can_make, environment, two_nodes
from runs import finish, losses, train, write_config

from sae_ray.telemetry import read_jsonl

pytestmark = pytest.mark.timeout(3600)

# Two replicas of a whole SAE each: what goes between them is gradients and sums.
HALVES = {"dp": 2, "tp": 1, "steps": 24}


class Nodes(NamedTuple):
    address: str  # of the cluster
    addresses: list[str]  # of the nodes
    command: list[str]  # before a driver's own command line
    environment: dict[str, str]  # of a driver


@contextlib.contextmanager
def raylets() -> Iterator[Nodes]:
    """Two raylets on one address, without a token."""
    from ray.cluster_utils import Cluster

    env = {key: value for key, value in environment().items() if not key.startswith("RAY_AUTH")}
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = env["PYTHONPATH"]
    each: dict[str, Any] = {"num_cpus": 4, "object_store_memory": 200 << 20, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    try:
        cluster.add_node(**each)
        cluster.wait_for_nodes()
        yield Nodes(cluster.address, [cluster.address.rpartition(":")[0]] * 2, [], env)
    finally:
        cluster.shutdown()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@contextlib.contextmanager
def namespaces() -> Iterator[Nodes]:
    with two_nodes() as (head, other):
        command = ["ip", "netns", "exec", head.namespace]
        yield Nodes(f"{head.address}:{PORT}", [head.address, other.address], command, environment())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with namespaces() if can_make() and "SAE_RAY_TEST_RAYLETS" not in os.environ else raylets() as found:
        yield found


def run(nodes: Nodes, folder: Path, **sections: Any) -> list[dict[str, Any]]:
    """Trains on the cluster; its events."""
    ray = {"address": nodes.address, "local_cpus": None, "object_store_mb": None, "wait_s": 900}
    config = write_config(folder, ray=ray, **sections)
    command = [*nodes.command, sys.executable, "-m", "sae_ray.cli", "train", str(config)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=nodes.environment,
    )
    code, out, err = finish(process, timeout=1700)
    assert code == 0, out[-3000:] + err[-3000:]
    return read_jsonl(folder / "runs" / "tiny" / "events.jsonl")


def test_two_nodes_train_to_the_losses_of_one(nodes: Nodes, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    train(write_config(alone, trainer=HALVES, ray={"wait_s": 900}), timeout=1700)

    events = run(nodes, tmp_path, trainer=HALVES)
    (group,) = [event for event in events if event["event"] == "group"]
    assert sorted(group["nodes"]) == sorted(nodes.addresses)
    produced = [event for event in events if event.get("what") == "producer_ready"]
    assert len({event["node_id"] for event in produced}) == 2, "a producer on each node"

    # A sum of two has no order: the wire between the two summands changes no bit.
    assert losses(tmp_path) == losses(alone)
    assert sorted(losses(alone)) == list(range(1, 25))
