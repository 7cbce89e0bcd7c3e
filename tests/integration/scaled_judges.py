"""Deploys judges on a cluster and prints, as JSON, how many of them and of their nodes there were when. A program.

    python scaled_judges.py ADDRESS JUDGE-SECTION-AS-JSON FOLDER

Everything is `judge/deploy.py`'s own (the application's life, its autoscaling, its options, its fence) but for what
serves: in place of vLLM's engine, which takes this machine minutes to start, something that waits to be told to answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve

from sae_ray.config import JudgeConfig
from sae_ray.judge.deploy import JudgeApp, deployment_options, placement

PATIENCE_S = 900.0


class Waiting:
    """A judge whose calls last until a file exists."""

    async def verdict(self, file: str) -> str:
        while not Path(file).exists():
            await asyncio.sleep(0.2)
        return str(ray.get_runtime_context().get_node_id())


def build(cfg: JudgeConfig) -> Any:
    """The application as Ray Serve LLM would make it of our options: the actor's CPUs go into the first bundle."""
    options, asked = deployment_options(cfg), placement(cfg)
    first = asked["bundles"][0] | {"CPU": options["ray_actor_options"]["num_cpus"]}
    options["name"] = f"JudgeServer:{options['name']}"
    bundles = {"placement_group_bundles": [first], "placement_group_strategy": asked["strategy"]}
    return serve.deployment(Waiting).options(**options, **bundles).bind()


def judge_nodes() -> int:
    """Nodes that are up and fenced for judges."""
    return sum(node["Alive"] and "judge" in node["Resources"] for node in ray.nodes())


def main() -> None:
    address, section, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    ray.init(address=address, namespace="sae_ray", logging_level=logging.ERROR, log_to_driver=False)
    app = JudgeApp(JudgeConfig.model_validate(section), "scaled", build=build)
    said: dict[str, Any] = {}

    def until(what: str, condition: Callable[[int, int], bool]) -> None:
        """Waits for a number of nodes and running judges; notes both, and how long it took."""
        began = time.monotonic()
        while not condition(nodes := judge_nodes(), running := app.status()["running"]):
            if time.monotonic() - began > PATIENCE_S:
                raise SystemExit(f"{what}: still {nodes} nodes and {running} judges; {app.status()}; so far {said}")
            time.sleep(0.5)
        said[what] = {"nodes": nodes, "judges": running, "seconds": round(time.monotonic() - began, 1)}

    try:
        app.start()
        if not app.ready(PATIENCE_S):
            raise SystemExit(f"not deployed: {app.status()}")
        said["deployed"] = {"nodes": judge_nodes(), "judges": app.status()["running"]}
        answer = folder / "answer"
        backlog = [app.handle().verdict.remote(str(answer)) for _ in range(8)]
        until("backlog", lambda nodes, running: nodes == running == 2)
        answer.touch()
        said["answered_by"] = len({call.result(timeout_s=PATIENCE_S) for call in backlog})
        until("idle", lambda nodes, running: nodes == running == 0)
    finally:
        app.shutdown()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
