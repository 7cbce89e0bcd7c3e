"""The run's own parts with fuses in them: real ranks, writers and logs that die where a plan says.

Nothing else about them is changed. Importing this changes nothing; `chaos_ranks.py` takes these instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chaos_faults import Fuses

from sae_ray.config import RunConfig
from sae_ray.telemetry import RunLog
from sae_ray.trainer import checkpoint
from sae_ray.trainer.rank import TrainerRank, WindowResult
from sae_ray.trainer.saving import ShardWriter
from sae_ray.trainer.sharded_sae import ShardedTrainer

WHOLE = checkpoint.buffers_of


def fuses_of(run: RunConfig) -> Fuses:
    return Fuses(run.run_dir / "chaos")


class FaultyRank(TrainerRank):
    def __init__(self, config_json: str, widths: dict[str, int]) -> None:
        super().__init__(config_json, widths)
        self._fuses, self._number = fuses_of(self.cfg), 0
        self._writer = FaultyWriter(self._fuses)
        self._strike_between_batches()

    def join(self, address: str, port: int, rank: int, world: int, generation: int) -> int:
        self._number = self._writer.rank = rank
        if address:
            (self._fuses.folder / f"rank-{rank}.node").write_text(_node_id())
        return super().join(address, port, rank, world, generation)

    def train_window(
        self, window: int, start_batch: int, blocks: list[Any], max_steps: int | None = None
    ) -> WindowResult:
        self._kill("before a window")
        result = super().train_window(window, start_batch, blocks, max_steps)
        self._kill("after a window")
        return result

    def apply_rewards(self, batch: list[Any], evidence: list[Any]) -> dict[str, Any]:
        self._kill("while rewards are installed")
        return super().apply_rewards(batch, evidence)

    def save(self, folder: str, save: str = "") -> dict[str, Any]:
        self._kill("at a snapshot")
        self._writer.step = self._steps()
        if (fault := self._fuses.take("disk full", "before an upload", self._steps())) is not None:
            fill_disk(Path(folder).parent, int(fault.amount))
        return super().save(folder, save)

    def written(self, patience_s: float) -> dict[str, Any] | None:
        report = super().written(patience_s)
        if report is not None:
            self._kill("between shard and manifest")
        return report

    def load(self, folder: str) -> dict[str, Any]:
        manifest = super().load(folder)
        self._kill("while a checkpoint is loaded")
        return manifest

    def _kill(self, phase: str) -> None:
        self._fuses.kill("rank killed", phase, self._steps(), self._number)

    def _steps(self) -> int:
        return self.copies["main"].steps_done if "main" in self.copies else 0

    def _strike_between_batches(self) -> None:
        """All trainers of this process, which is this rank's alone."""
        original: Callable[..., Any] = ShardedTrainer.step

        def step(trainer: ShardedTrainer, *args: Any) -> None:
            original(trainer, *args)
            if trainer is self.copies.get("main"):
                self._kill("inside a window")

        ShardedTrainer.step = step  # type: ignore[method-assign]


class FaultyWriter(ShardWriter):
    def __init__(self, fuses: Fuses) -> None:
        super().__init__()
        self._fuses, self.rank, self.step = fuses, 0, 0

    def _write(self, folder: str, tp_rank: int, snapshots: dict[str, Any], save: str) -> None:
        def buffers_of(tensors: Any) -> Any:
            return _Torn(WHOLE(tensors), lambda: self._fuses.kill("rank killed", phase, self.step, self.rank))

        phase = "inside an upload"
        checkpoint.buffers_of = buffers_of  # type: ignore[assignment]
        super()._write(folder, tp_rank, snapshots, save)


class _Torn(list):  # type: ignore[type-arg]
    """A file's parts; `between` is called when some of them have been taken and some have not."""

    def __init__(self, parts: list[Any], between: Callable[[], None]) -> None:
        super().__init__(parts)
        self._between, self._left = between, 1

    def __iter__(self) -> Iterator[Any]:
        for number, part in enumerate(super().__iter__()):
            if number == len(self) // 2 and self._left:
                self._left = 0
                self._between()
            yield part


class WatchedLog(RunLog):
    """A run's log that also says when which steps were trained, and where the controller may be killed."""

    fuses: Fuses | None = None

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        super().metrics(rows)
        if rows:
            self.event("trained", first=rows[0]["step"], last=rows[-1]["step"])
            self._kill("between two windows", rows[-1]["step"])

    def event(self, kind: str, **fields: Any) -> None:
        super().event(kind, **fields)
        if kind == "rewards_applied":
            self._kill("after rewards", fields["at_step"])

    def _kill(self, phase: str, step: int) -> None:
        if self.fuses is not None:
            self.fuses.kill("controller killed", phase, step)


def watch_commits(fuses: Fuses) -> None:
    """Kills this process, the controller, before or after a manifest, where the plan says."""
    original = checkpoint.commit

    def commit(folder: Any, manifest: dict[str, Any]) -> None:
        fuses.kill("controller killed", "between shard and manifest", manifest["step"])
        original(folder, manifest)
        fuses.kill("controller killed", "after the manifest", manifest["step"])

    checkpoint.commit = commit


def fill_disk(folder: Path, leave: int) -> None:
    """Takes all room of a small file system but `leave` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with (folder / "taken").open("wb", buffering=0) as file:
        left = max(0, free - leave)
        while left > 0:
            left -= file.write(bytes(min(left, 1 << 20)))


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
