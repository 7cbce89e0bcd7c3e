"""A tiny process that outlives a judge replica by a moment and ends the engine processes it leaves behind.

vLLM's engine runs in child processes. When the replica itself is killed (out of memory, a lost node's raylet, a chaos
test), nobody is left to end them, and they would keep their memory and GPU. The reaper holds the read end of a pipe:
however the replica dies, the pipe closes. Until it is told which processes to watch, it notes the replica's children
itself: an engine that is still starting when its replica dies has not been named yet. Run as
`python -m sae_ray.judge.reaper`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_GRACE_S = 5.0
_LOOK_S = 1.0


class Reaper:
    """The replica's end of the pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.watched: list[int] = []

    def watch(self, pids: Sequence[int]) -> None:
        """Name processes to end, with their descendants, once this process is gone."""
        self.watched.extend(pids)
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{pid}\n" for pid in pids).encode())
        self._process.stdin.flush()

    def stop(self) -> None:
        """Let it end what is left now; it then ends itself."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def start_reaper() -> Reaper:
    # Its own session: a signal to the replica's process group must not take the reaper with it.
    process = subprocess.Popen(
        [sys.executable, "-S", os.path.abspath(__file__)], stdin=subprocess.PIPE, start_new_session=True
    )
    return Reaper(process)


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; tells a reused pid from the one that was named."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _with_descendants(pids: Sequence[int]) -> list[int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
                parents[int(entry)] = int(file.read().rsplit(")", 1)[1].split()[1])
    found = list(pids)
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid and child not in found)
    return found


def main() -> None:
    # The tree is noted while it stands: an engine that is dying reparents its workers, and they would be lost.
    named: dict[int, str] = {}
    replica, told = os.getppid(), False

    def note(pids: Sequence[int]) -> None:
        for pid in _with_descendants(pids):
            if pid not in (replica, os.getpid()) and (started := _started(pid)) is not None:
                named[pid] = started

    while True:
        # Only while the engine starts: what it is made of then is known, and /proc need not be read every second.
        if not told and not select.select([sys.stdin], [], [], _LOOK_S)[0]:
            if os.getppid() == replica:
                note([replica])
            continue
        line = sys.stdin.readline()
        if not line:
            break
        told = True
        note([int(line)])
    for sign, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 0.0)):
        for pid in [pid for pid, started in named.items() if _started(pid) == started]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and any(_started(p) == s for p, s in named.items()):
            time.sleep(0.1)


if __name__ == "__main__":
    main()
