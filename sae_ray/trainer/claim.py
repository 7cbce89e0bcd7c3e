"""Whose the checkpoints at a place are: the attempt that began last may write there, any earlier one stops.

No lease runs out and nobody waits: whoever starts writes `writer.json` over what is there. An attempt looks whether it
is still its own before each thing that removes or commits, so a run that was thought dead, or a second one by mistake,
finds out at its next save. What happens between a look and a commit is left to the manifest's condition.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from sae_ray.errors import UserError
from sae_ray.storage import open_storage

WRITER = "writer.json"


class Claim:
    """One attempt's right to write checkpoints below `home`, over all generations of its trainer group."""

    def __init__(self, home: str | Path, run: str):
        self.home = home
        self._run, self._token, self._held = run, secrets.token_hex(16), False

    def hold(self) -> None:
        """Takes the place over; an attempt that has held it before only looks whether it still does.

        Raises:
            UserError: the place cannot be written, or somebody else has taken it over since.
        """
        if self._held:
            self.check()
            return
        about = {
            "token": self._token,
            "run": self._run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": time.time(),
        }
        open_storage(self.home).write(WRITER, json.dumps(about, indent=1).encode())
        self._held = True

    def check(self) -> None:
        """
        Raises:
            UserError: the place is not, or no longer, this attempt's; names whose it is.
        """
        held = _holder(self.home)
        if held.get("token") == self._token:
            return
        if held:
            whose = f"the run {held.get('run')!r} (process {held.get('pid')} on {held.get('host')})"
            why = f"{whose} began after this one and has taken this place over"
        else:
            why = f"this run's {WRITER} is gone or cannot be read: somebody, --fresh perhaps, has removed what was here"
        raise UserError(
            f"{self.home}: {why}; this run stops, and has touched nothing of the other's; if both are wanted, give one "
            "of them another name or trainer.checkpoint_dir"
        )


def _holder(home: str | Path) -> dict[str, Any]:
    """What the last attempt that began has written; empty if nothing that can be read is there."""
    storage = open_storage(home)
    if not storage.exists(WRITER):
        return {}
    try:
        held = json.loads(storage.read(WRITER))
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}
