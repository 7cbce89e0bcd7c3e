"""Two machines on one: network namespaces with an address each and a wire between them, and a Ray node in each.

Nothing but the file system is shared. What runs in a namespace is found by the kernel's own list of its processes, so
all of it is ended and nothing else is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PORT = 6379
TOKEN = secrets.token_hex(24)


def can_make() -> bool:
    """Whether this user may make network namespaces here."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"sae-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


@dataclass(frozen=True)
class Machine:
    namespace: str
    address: str

    def popen(self, *command: str, **env: str) -> subprocess.Popen[str]:
        """Starts a command that sees this machine's network only, in a process group of its own."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment() | env,
        )  # fmt: skip

    def run(self, *command: str, timeout: float = 400, **env: str) -> str:
        """What a command printed; fails the test if it ends with an error."""
        process = self.popen(*command, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{command} took over {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
        assert process.returncode == 0, f"{command}\n{out[-3000:]}\n{err[-3000:]}"
        return out

    def ray(self, *options: str, **env: str) -> None:
        """Starts a Ray node here."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        self.run(*ray, "--node-ip-address", self.address, "--disable-usage-stats", *options, **env)

    def pids(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def end_all(self) -> None:
        """Ends every process on this machine."""
        ends = time.monotonic() + 30
        while (left := self.pids()) and time.monotonic() < ends:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        assert not left, f"still on {self.namespace}: {left}"


def environment() -> dict[str, str]:
    """Of Ray nodes and drivers: this checkout, no Ray that the shell has in mind, and nobody to report to."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        # These addresses are not the loopback's: a cluster there has a token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",
    }


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """A pair of namespaces that reach each other and nobody else."""
    machines = [Machine(f"sae-{os.getpid()}-{letter}", f"10.77.0.{i}") for i, letter in enumerate("ab", 1)]
    try:
        for machine in machines:
            _ip("netns", "add", machine.namespace)
        first, second = (machine.namespace for machine in machines)
        _ip("-n", first, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second)
        for machine in machines:
            _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "wire")
            _ip("-n", machine.namespace, "link", "set", "wire", "up")
            _ip("-n", machine.namespace, "link", "set", "lo", "up")
            # By it Ray learns which address is its own. It leads to the other machine and no further.
            _ip("-n", machine.namespace, "route", "add", "default", "dev", "wire")
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            machine.end_all()
            subprocess.run(["ip", "netns", "delete", machine.namespace], check=False)


@contextlib.contextmanager
def two_nodes(cpus: int = 4, object_store_mb: int = 200) -> Iterator[tuple[Machine, Machine]]:
    """A Ray cluster of a head and one more node, each on a machine of its own."""
    store = ["--object-store-memory", str(object_store_mb << 20), "--num-cpus", str(cpus)]
    # What a run needs of Ray, and no more: each process takes seconds to start.
    few = ["--include-log-monitor", "false"]
    head_only = ["--head", "--port", str(PORT), "--include-dashboard", "false", "--no-monitor", *few]
    with (
        tempfile.TemporaryDirectory(
            prefix="sn", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,  # a socket's is short
        two_machines() as (head, other),
    ):
        head.ray(*head_only, "--temp-dir", folder, *store)
        other.ray("--address", f"{head.address}:{PORT}", *few, *store)
        yield head, other


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
