"""Whole runs on a Ray of their own: driver process, producers, trainer ranks, one or several raylets.

The driver is a process that joins the Ray, so it can be killed and started again as a user would. Nodes are raylets of
`ray.cluster_utils.Cluster`, on loopback, with a session folder and ports that no other Ray of the machine finds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from chaos_faults import Fault, Fuses

from sae_ray.config import RunConfig

HERE = Path(__file__).parent
DRAIN_PREEMPTION = 2  # autoscaler.proto, DrainNodeReason: the node is about to be taken away
PRODUCERS_AND_RANKS = 4.0  # logical CPUs of a node that holds a whole run and half of it again


class Nodes:
    """A Ray cluster on this machine: a head without places for actors, and nodes with them."""

    def __init__(self, folder: str) -> None:
        os.environ["RAY_TMPDIR"] = folder  # where Ray notes which cluster this machine has
        from ray.cluster_utils import Cluster

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            agent = probe.getsockname()[1]
        # Jobs are submitted to the agent, whose usual port another Ray of this machine may hold.
        self.cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": 150 << 20,
                "dashboard_agent_listen_port": agent,
                "node_ip_address": "127.0.0.1",
                "include_dashboard": False,
                "include_log_monitor": False,
            },
        )

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        return self.cluster.add_node(
            num_cpus=PRODUCERS_AND_RANKS, object_store_memory=150 << 20, node_ip_address="127.0.0.1"
        )

    def remove(self, node: Any) -> None:
        """As a machine that loses power."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> bool:
        """A notice that the node will be taken away; whether it was taken note of."""
        from ray._raylet import GcsClient

        deadline = int((time.time() + seconds) * 1000)
        accepted, _ = GcsClient(address=self.address).drain_node(node.node_id, DRAIN_PREEMPTION, "preempted", deadline)
        return bool(accepted)


@contextlib.contextmanager
def ray_nodes(count: int, environment: dict[str, str] | None = None) -> Iterator[Nodes]:
    """`count` nodes beside the head; every process of theirs has ended afterwards.

    Args:
        environment: of all of Ray's processes: what Ray itself shall get wrong, say.
    """
    wanted = {
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a driver would take the loopback for the machine's own address
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    before, mine = dict(os.environ), {child.pid for child in psutil.Process().children(recursive=True)}
    os.environ.update(wanted)
    os.environ.pop("RAY_ADDRESS", None)
    nodes = None
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        try:
            nodes = Nodes(folder)
            for _ in range(count):
                nodes.add()
            yield nodes
        finally:
            started = [each for each in psutil.Process().children(recursive=True) if each.pid not in mine]
            if nodes is not None:
                with contextlib.suppress(Exception):
                    nodes.cluster.shutdown()
            _, alive = psutil.wait_procs(started, timeout=5)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "forkserver" not in " ".join(process.cmdline()):
                        process.kill()
            os.environ.clear()
            os.environ.update(before)


class Driver:
    """The driver process, started again whenever a fault has ended it."""

    def __init__(self, config: RunConfig, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.config, self._environment, self.codes = config, environment or {}, list[int]()
        self._path = folder / f"{config.name}.yaml"
        self._path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.start()

    def start(self) -> None:
        path = f"{HERE.parent}{os.pathsep}{HERE}"
        with (self._path.with_suffix(".log")).open("a") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "chaos_driver.py"), str(self._path)],
                stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": path, **self._environment},
            )  # fmt: skip

    def turn(self) -> bool:
        """Starts it again if a fault has ended it. Whether the run is complete.

        Raises:
            RuntimeError: it failed otherwise than by a fault.
        """
        if (code := self._process.poll()) is None:
            return False
        self.codes.append(code)
        if code == 0:
            return True
        if code not in (2, -signal.SIGKILL) or len(self.codes) > 30:
            raise RuntimeError(f"{self.config.name}: exit codes {self.codes}; {self.said()}")
        with contextlib.suppress(FileNotFoundError):
            Path(f"{self.config.trainer.checkpoint_dir}", "taken").unlink()  # somebody makes room on the full disk
        self.start()
        return False

    def said(self) -> str:
        return self._path.with_suffix(".log").read_text()[-2500:]

    def finish(self, limit_s: float) -> list[int]:
        """Until the run is complete; all exit codes. Raises RuntimeError: it took longer than that, or failed."""
        ends = time.monotonic() + limit_s
        while not self.turn():
            if time.monotonic() > ends:
                raise RuntimeError(f"{self.config.name}: not complete within {limit_s:g} s; {self.said()}")
            time.sleep(0.1)
        return self.codes

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def at(config: RunConfig, nodes: Nodes) -> RunConfig:
    """The run, to be trained on `nodes`."""
    return config.model_copy(update={"ray": config.ray.model_copy(update={"address": nodes.address})})


def take_nodes_away(driver: Driver, nodes: Nodes, plan: list[Fault], limit_s: float) -> None:
    """At each gate of the plan that the stream comes to, a node goes and another one comes; then the gate opens.

    Args:
        plan: faults with the phase "at a gate"; `rank` 0 is the node of the trainer, 1 another one.
    """
    fuses, ends = Fuses(driver.config.run_dir / "chaos"), time.monotonic() + limit_s
    for fault in sorted(plan, key=lambda each: each.at):
        while not (fuses.folder / f"{fault.id}.reached").exists():
            if driver.turn():
                return
            if time.monotonic() > ends:
                raise RuntimeError(f"gate {fault.id} was not reached within {limit_s:g} s; {driver.said()}")
            time.sleep(0.1)
        trainers = (fuses.folder / "rank-0.node").read_text()
        held = {node.node_id: node for node in nodes.cluster.worker_nodes}
        victim = held[trainers] if fault.rank == 0 else next((n for key, n in held.items() if key != trainers), None)
        if victim is None:
            raise RuntimeError(f"gate {fault.id}: there is no other node than the trainer's")
        nodes.add()
        if fault.kind == "node drained, then gone" and not nodes.drain(victim, 60):
            raise RuntimeError(f"gate {fault.id}: Ray refused to drain the node")
        if fault.amount:
            time.sleep(fault.amount)
        fuses.note(fault.id)
        nodes.remove(victim)
        (fuses.folder / f"{fault.id}.open").touch()
