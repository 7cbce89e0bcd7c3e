"""`sae-ray submit` against a real Ray head that this test starts, with token authentication: the job trains, is
stopped, and the same command goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import runs

from sae_ray.telemetry import read_jsonl
from sae_ray.trainer import checkpoint

pytestmark = pytest.mark.timeout(900)
TOKEN = "0123456789abcdef" * 4


class Head(NamedTuple):
    address: str
    env: dict[str, str]

    def sae_ray(self, *arguments: str, timeout: float = 400, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sae_ray.cli", *arguments, "--address", self.address],
            capture_output=True, text=True, timeout=timeout, env={**self.env, **env},
        )  # fmt: skip


def free_ports(n: int) -> list[int]:
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node of its own, on loopback, that knows nothing of other Rays of this machine."""
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:  # short: sockets lie below it
        yield from running_head(folder)


def running_head(folder: str) -> Iterator[Head]:
    gcs, dashboard, agent = free_ports(3)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        # Where Ray notes which cluster this machine has; others are not to find this one.
        "RAY_TMPDIR": folder,
        # A job that is asked to stop has this long to commit a checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    env.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        "--num-cpus=8", f"--object-store-memory={300 << 20}",
        # Jobs are submitted to the agent, whose usual port another Ray of this machine may hold.
        f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        ends = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{dashboard}/api/version"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < ends, "the dashboard did not start"
            time.sleep(0.5)
        yield Head(f"http://127.0.0.1:{dashboard}", env)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([*children, psutil.Process(process.pid)], timeout=20)
        for each in alive:
            each.kill()
        process.wait(timeout=20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401  # it asks for the token
    except OSError:
        return False


def test_a_submitted_run_is_stopped_and_the_same_command_finishes_it(head: Head, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, trainer={"steps": 400, "checkpoint_every": 20})
    folder = tmp_path / "runs" / "tiny" / "checkpoints"

    submitted = head.sae_ray("submit", str(config), "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    assert "tiny: submitted as job sae-ray-tiny-1" in submitted.stdout
    assert "tiny: is under way as job sae-ray-tiny-1" in head.sae_ray("submit", str(config), "--no-wait").stdout

    ends = time.monotonic() + 240
    while checkpoint.latest(folder) is None:
        assert time.monotonic() < ends, head.sae_ray("logs", "tiny").stdout[-3000:]
        time.sleep(0.5)
    refused = head.sae_ray("submit", str(config), "--no-wait", "--set", "seed=9")
    assert refused.returncode == 2
    assert "another config" in refused.stderr
    assert "is asked to stop" in head.sae_ray("stop", "tiny").stdout
    ends = time.monotonic() + 120
    while "STOPPED" not in (told := head.sae_ray("status", "tiny").stdout):
        assert time.monotonic() < ends, told
    stopped_at = checkpoint.read_manifest(checkpoint.latest(folder))["step"]  # type: ignore[arg-type]
    assert stopped_at < 400

    finished = head.sae_ray("submit", str(config), "--set", "trainer.steps=400")
    assert finished.returncode == 0, (finished.stdout[-3000:], finished.stderr)
    assert "tiny: submitted as job sae-ray-tiny-2" in finished.stdout
    assert f"resuming at step {stopped_at} of 400" in finished.stdout
    rows = read_jsonl(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 401))
    told = head.sae_ray("status").stdout
    assert "sae-ray-tiny-2" in told
    assert "SUCCEEDED" in told


def test_without_the_right_token_nothing_is_told(head: Head) -> None:
    for env in ({"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        refused = head.sae_ray("status", **env)
        assert refused.returncode == 2, refused.stdout
        assert "token" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


def test_a_run_that_fails_fails_the_command(head: Head, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, name="broken", model={"name": "/no/such/model"})
    failed = head.sae_ray("submit", str(config))
    assert failed.returncode == 1
    assert "model.name" in failed.stdout
    assert "broken: FAILED" in failed.stderr
