"""`status.json`: what a run's terminal shows, for `sae-ray status`, wherever that runs.

It lies in the run folder, written anew every two seconds, and beside the checkpoints where those are on S3, every half
minute and by a thread of its own: nothing of the run waits for it, and what cannot be written is tried again.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_ray.errors import UserError
from sae_ray.logs import redacted
from sae_ray.storage import open_storage

if TYPE_CHECKING:
    from sae_ray.telemetry import RunStatus

FILE = "status.json"
EVERY_S, MIRRORED_EVERY_S = 2.0, 30.0
State = Literal["running", "done", "stopped", "failed"]
_log = logging.getLogger(__name__)


class StatusFile:
    """Of one run, in this process.

    Args:
        mirror: `s3://bucket/prefix` that gets a copy; None for none.
    """

    def __init__(self, run_dir: Path, run: str, mirror: str | None = None):
        self._path, self._run, self._mirror = run_dir / FILE, run, mirror
        self._started = time.time()
        self._written = self._mirrored = -MIRRORED_EVERY_S
        self._sending: threading.Thread | None = None

    def show(self, status: RunStatus, state: State = "running", why: str = "") -> None:
        """Writes it if it is time to; the last words (any other state) at once."""
        now = time.monotonic()
        if state == "running" and now - self._written < EVERY_S:
            return
        self._written = now
        data = json.dumps({
            "format": 1, "run": self._run, "pid": os.getpid(), "host": platform.node(), "started": self._started,
            "written": time.time(), "state": state, "why": redacted(why), "status": asdict(status),
        }).encode()  # fmt: skip
        # No fsync: it is worth nothing after a crash of the machine.
        temporary = self._path.with_name(f".{FILE}.{os.getpid()}")
        with suppress(OSError):  # a full disk is reported by what needs it
            temporary.write_bytes(data)
            temporary.replace(self._path)
        if self._mirror is None or (state == "running" and now - self._mirrored < MIRRORED_EVERY_S):
            return
        if self._sending is not None and self._sending.is_alive():
            if state == "running":
                return
            self._sending.join(EVERY_S)
        self._mirrored = now
        self._sending = threading.Thread(target=self._send, args=(self._mirror, data), daemon=True)
        self._sending.start()
        if state != "running":
            self._sending.join(MIRRORED_EVERY_S)

    @staticmethod
    def _send(mirror: str, data: bytes) -> None:
        try:
            open_storage(mirror).write(FILE, data)
        except UserError as error:
            _log.warning("the status is not mirrored: %s", error)


def read_status(location: str | Path) -> dict[str, Any] | None:
    """What `StatusFile` wrote at a run folder, or at a prefix of checkpoints; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    storage = open_storage(location)
    if not storage.exists(FILE):
        return None
    try:
        found = json.loads(storage.read(FILE))
    except ValueError as error:
        raise UserError(f"{storage.url(FILE)}: is not JSON") from error
    return found if isinstance(found, dict) else None
