"""A checkpoint on its way to storage while training goes on.

`ShardWriter` lives in a rank: it writes a snapshot in a thread of its own. `Saving` lives in the controller: it
asks the ranks whether they are done, and commits the manifest once all are. Until then nothing counts, so a
death or an error in between leaves the last commit as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from torch import Tensor

from sae_ray.errors import UserError
from sae_ray.storage import join
from sae_ray.trainer import checkpoint
from sae_ray.trainer.claim import Claim

# How long a rank with nothing to train stands still for its writer, per question.
PATIENCE_S = 0.1
# How long what a rank has written may stay unseen here: NFS remembers for up to a minute that there was nothing.
UNSEEN_S = 75.0


class ShardWriter:
    """Writes one rank's files in the background, one snapshot at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._report: dict[str, Any] = {}

    def start(self, folder: str, tp_rank: int, states: dict[str, dict[str, Tensor]], save: str = "") -> float:
        """Snapshots `states` (copy name -> tensors) and begins to write. Returns the snapshot's seconds."""
        if self._thread is not None:
            self._thread.join()
        began = time.perf_counter()
        snapshots = {name: checkpoint.snapshot(state) for name, state in states.items()}
        seconds = time.perf_counter() - began
        self._error, self._report = None, {"files": {}, "write_seconds": 0.0}
        self._thread = threading.Thread(target=self._write, args=(folder, tp_rank, snapshots, save), daemon=True)
        self._thread.start()
        return seconds

    def report(self, patience_s: float) -> dict[str, Any] | None:
        """{"files", "write_seconds"} once all is written; None if it is not after `patience_s`.

        Raises:
            UserError: what went wrong in the thread.
        """
        if self._thread is not None:
            self._thread.join(patience_s)
            if self._thread.is_alive():
                return None
        if self._error is not None:
            raise self._error
        return self._report

    def _write(self, folder: str, tp_rank: int, snapshots: dict[str, dict[str, Tensor]], save: str) -> None:
        began = time.perf_counter()
        try:
            for name in list(snapshots):
                self._report["files"] |= checkpoint.write_shard(folder, tp_rank, name, snapshots.pop(name), save)
        except Exception as error:  # whatever it is, it is raised where the rank is asked
            self._error = error
        self._report["write_seconds"] = time.perf_counter() - began


class _Group(Protocol):
    def ask_writers(self, ranks: list[int], patience_s: float) -> list[ray.ObjectRef]: ...

    def take(self, what: str, ref: ray.ObjectRef) -> Any: ...


@dataclass
class Saving:
    """One save in flight.

    Args:
        claim: the run's right to commit here.
        reports: what `TrainerRank.save` returned on each rank.
        manifest: makes the manifest of the completed reports.
        limit_s: how long the ranks may write before the run says so.
    """

    group: _Group
    claim: Claim
    path: str | Path
    step: int
    pin: str | None
    reports: list[dict[str, Any]]
    manifest: Callable[[list[dict[str, Any]]], dict[str, Any]]
    limit_s: float
    _began: float = field(default_factory=time.monotonic)
    _written: dict[int, dict[str, Any]] = field(default_factory=dict)
    _asked: dict[ray.ObjectRef, int] = field(default_factory=dict)
    _completed: float | None = None  # when the last rank was done

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._began

    def pending_refs(self) -> list[ray.ObjectRef]:
        return list(self._asked)

    def pump(self, idle: bool) -> dict[str, Any] | None:
        """Asks and listens; commits when the last rank is done. Returns what the commit cost, once committed.

        Args:
            idle: no window is in flight, so that a rank may wait for its writer.
        Raises:
            RankDied: a rank is gone; the save never counted.
            UserError: what a rank could not write, the time limit, files that lie where only a rank sees them, or
                somebody else has taken the place over.
        """
        what = f"{self.path} to be written"
        done, _ = ray.wait(self.pending_refs(), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for ref in done:
            rank = self._asked.pop(ref)
            if (answer := self.group.take(what, ref)) is not None:
                self._written[rank] = answer
        if len(self._written) == len(self.reports):
            return self._commit(idle)
        if time.monotonic() - self._began > self.limit_s:
            missing = len(self.reports) - len(self._written)
            raise UserError(f"{self.path}: {missing} ranks did not write their files within {self.limit_s:g} s")
        quiet = [rank for rank in range(len(self.reports)) if rank not in {*self._written, *self._asked.values()}]
        refs = self.group.ask_writers(quiet, PATIENCE_S if idle else 0)
        self._asked |= dict(zip(refs, quiet, strict=True))
        return None

    def wait(self) -> dict[str, Any]:
        """Until it is committed, in a caller that has nothing else to do."""
        while (cost := self.pump(idle=True)) is None:
            ray.wait(self.pending_refs(), timeout=1.0)
        return cost

    def _commit(self, idle: bool) -> dict[str, Any] | None:
        reports = [report | self._written[rank] for rank, report in enumerate(self.reports)]
        manifest = self.manifest(reports)
        unseen = checkpoint.unseen(self.path, manifest["files"])
        self.claim.check()  # before a missing file is blamed on the folder: who takes over removes files
        if unseen is not None:
            self._wait_for(unseen, idle)
            return None
        checkpoint.commit(self.path, manifest)
        return {
            "snapshot_seconds": round(max(report["snapshot_seconds"] for report in reports), 4),
            "write_seconds": round(max(report["write_seconds"] for report in reports), 3),
            "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        }

    def _wait_for(self, unseen: str, idle: bool) -> None:
        """Once its time is over, a file is on another machine's disk: a manifest would commit what nobody can read."""
        self._completed = self._completed or time.monotonic()
        if time.monotonic() - self._completed >= UNSEEN_S:
            raise UserError(
                f"{join(self.path, unseen)}: a rank has written it, and it is not to be seen from here: this is not a "
                "folder that all nodes share; set trainer.checkpoint_dir (or runs_dir) to one, or to s3://bucket/prefix"
            )
        if idle:
            time.sleep(PATIENCE_S)
