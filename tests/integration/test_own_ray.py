"""The Ray that a run starts for itself: on loopback only, with a token, gone afterwards; its actors' logs are JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)
# In a process of its own: the session's Ray, if there is one, is not joined.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
_ENVIRONMENT["PYTHONPATH"] = str(Path(__file__).parents[2])
_SCRIPT = """
import json, logging, os, sys, time
import psutil, ray
from sae_ray import logs
from sae_ray.config import RunConfig

from sae_ray.session import ray_session

config = RunConfig.model_validate_json(sys.argv[1])

class Actor:
    def __init__(self, config_json):
        logs.start_actor(RunConfig.model_validate_json(config_json), "tester")
    def work(self):
        logs.bind(generation=1, step=7)
        logging.getLogger("a.library").warning("in an actor, with %s", os.environ["MY_TOKEN"])
        return ray.util.get_node_ip_address(), os.environ.get("RAY_AUTH_MODE")

with ray_session(config.ray):
    told = ray.get(ray.remote(Actor).options(num_cpus=0).remote(config.model_dump_json()).work.remote())
    me = psutil.Process()
    listening = [c.laddr.ip for p in [me, *me.children(recursive=True)] for c in p.net_connections("inet")
                 if c.status == "LISTEN"]
    family = [p.pid for p in me.children(recursive=True)]
print(json.dumps({"told": told, "listening": listening, "left": [p for p in family if psutil.pid_exists(p)]}))
"""


def test_an_own_ray_listens_on_loopback_with_a_token_and_its_actors_log_json(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    config = {
        "name": "own",
        "runs_dir": str(tmp_path),
        "hook": {"layer": 2},
        "ray": {"local_cpus": 2, "object_store_mb": 100},
    }
    from sae_ray.config import RunConfig

    text = RunConfig.model_validate(config).model_dump_json()
    environment = {**_ENVIRONMENT, "MY_TOKEN": "hunter2hunter2"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, text], capture_output=True, text=True, timeout=800, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["told"] == ["127.0.0.1", "token"]
    assert len(found["listening"]) >= 5
    assert {address.removeprefix("::ffff:") for address in found["listening"]} <= {"127.0.0.1", "::1"}
    assert found["left"] == []
    (file,) = (tmp_path / "own" / "logs").glob("tester-*.jsonl")
    (row,) = [json.loads(line) for line in file.read_text().splitlines() if "in an actor" in line]
    assert (row["run"], row["role"], row["generation"], row["step"]) == ("own", "tester", 1, 7)
    assert row["message"] == "in an actor, with ***"


_STOPPED = """
import os, signal, sys, time
from sae_ray.config import RayConfig
from sae_ray.session import Interrupt, ray_session

with Interrupt() as interrupt, ray_session(RayConfig(address="local", local_cpus=1, object_store_mb=100)):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(0.5)
    print("requested", interrupt.requested)
"""


@pytest.mark.parametrize("sign", ["SIGTERM", "SIGINT"])
def test_a_signal_while_ray_runs_is_a_request_to_stop_and_ends_no_process(sign: str) -> None:
    """Clusters stop their jobs with SIGTERM, which Ray takes for itself as it starts."""
    command = [sys.executable, "-c", _STOPPED, sign]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=_ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "requested True" in ended.stdout
    assert "SIGTERM received" not in ended.stderr
