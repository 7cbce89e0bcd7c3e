"""Disturbed runs of every level, each compared with the undisturbed one: `chaos.py` draws them, tests choose them."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chaos_bank
import chaos_invariants as invariants
import chaos_ranks
from chaos_faults import Fault, Fuses, draw
from chaos_proxy import FaultyProxy, StorageFault, draw_storage
from chaos_world import World

from sae_ray.config import RunConfig

RANK_KINDS = {"rank killed": 3.0, "controller killed": 1.0}
DISK_MB = 40
SHOWN = {"disk": "storage", "rpc": "run"}  # as another level in the table
Row = dict[str, Any]
Outcome = tuple[list[Row], list[str]]
"""(faults that struck: id, kind, phase, recovery_s; invariants that do not hold)"""


class Chaos:
    """Makes disturbed runs of every level, in one folder."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.world = World(self.out)
        self._references: dict[int, invariants.Reference] = {}

    def disturb(self, level: str, seed: int) -> Row:
        """One run with faults drawn by `seed`, as a row: level, seed, name, faults, broken, seconds."""
        began, name = time.monotonic(), f"{level}-{seed}"
        shutil.rmtree(self.out / "runs" / name, ignore_errors=True)
        faults, broken = getattr(self, f"_draw_{level}")(name, seed)
        row = {"level": SHOWN.get(level, level), "seed": seed, "name": name, "faults": faults, "broken": broken}
        return {**row, "seconds": round(time.monotonic() - began, 1)}

    # -- without Ray ------------------------------------------------------------------------------------

    def banks(self, name: str, seed: int, kills: int) -> Outcome:
        return chaos_bank.disturb(self.out / "runs" / name, seed, kills)

    def ranks(self, name: str, plan: list[Fault], random_kills: int = 0, seed: int = 0) -> Outcome:
        config = self.world.config(name, trainer={"tp": 1})
        Fuses.lay(config.run_dir / "chaos", plan)
        chaos_ranks.run_to_end(config, random_kills=random_kills, seed=seed)
        return self._outcome(config, plan)

    def bucket(self, name: str, faults: list[StorageFault], plan: list[Fault]) -> Outcome:
        """Checkpoints go to a real S3 server, through a proxy that has `faults`."""
        with _bucket() as (server, bucket, proxy):
            config = self.world.config(name, trainer={"tp": 1, "checkpoint_dir": f"s3://{bucket}/{name}"})
            proxy.set(faults)
            Fuses.lay(config.run_dir / "chaos", plan)
            chaos_ranks.run_to_end(config, {**server.settings, "AWS_ENDPOINT_URL": proxy.url})
            rows, broken = self._outcome(config, plan, invariants.Bucket(server.client, bucket, name))
        events = invariants.rows_of(config.run_dir / "events.jsonl")
        for fault in faults:
            if fault.struck:
                kind = f"S3: {fault.kind}" + (", longer than a client tries" if fault.times > 4 else "")
                rows.append(_row(fault.id, kind, fault.method, broken, fault.struck[0], events))
        return rows, broken

    def disk(self, name: str, plan: list[Fault]) -> Outcome:
        """Checkpoints go to a small file system of their own, which must be mounted."""
        disk = self.out / "disk"
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)], check=True)
        try:
            config = self.world.config(name, trainer={"tp": 1, "checkpoint_dir": str(disk / name)})
            Fuses.lay(config.run_dir / "chaos", plan)
            chaos_ranks.run_to_end(config)
            return self._outcome(config, plan, invariants.Folder(disk / name))
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    # -- drawn by a seed --------------------------------------------------------------------------------

    def _draw_bank(self, name: str, seed: int) -> Outcome:
        return self.banks(name, seed, kills=6)

    def _draw_rank(self, name: str, seed: int) -> Outcome:
        config = self.world.config(name)
        plan = draw(seed, 6, config.total_steps, self.world.blocks(config), 1, RANK_KINDS)
        return self.ranks(name, plan, random_kills=2, seed=seed)

    def _draw_storage(self, name: str, seed: int) -> Outcome:
        plan = draw(seed, 2, self.world.config(name).total_steps, 1, 1, RANK_KINDS)
        return self.bucket(name, draw_storage(seed, 8, requests=26), plan)

    def _draw_disk(self, name: str, seed: int) -> Outcome:
        rng = random.Random(seed)
        steps = sorted(rng.sample(range(self.world.config(name).total_steps), 4))
        plan = [
            Fault(f"{seed}-d{number}", "disk full", "before an upload", step, amount=rng.randrange(0, 3 << 20))
            for number, step in enumerate(steps)
        ]
        return self.disk(name, plan)

    # -- what came of it --------------------------------------------------------------------------------

    def _outcome(
        self,
        config: RunConfig,
        plan: list[Fault],
        shelf: invariants.Shelf | None = None,
        reference: invariants.Reference | None = None,
    ) -> Outcome:
        shelf = shelf or invariants.Folder(config.run_dir / "checkpoints")
        broken = invariants.broken(config.run_dir, shelf, reference or self._reference(config.trainer.tp))
        events, by_id = invariants.rows_of(config.run_dir / "events.jsonl"), {fault.id: fault for fault in plan}
        rows = []
        for fault_id, at in sorted(Fuses(config.run_dir / "chaos").struck().items(), key=lambda item: item[1]):
            fault = by_id.get(fault_id) or Fault(fault_id, "rank killed", "at a random moment", 0)
            rows.append(_row(fault_id, fault.kind, fault.phase, broken, at, events))
        return rows, broken

    def _reference(self, tp: int) -> invariants.Reference:
        """The undisturbed run on this mesh, made once."""
        if tp not in self._references:
            config = self.world.config(f"undisturbed-tp{tp}", trainer={"tp": tp})
            if not (config.run_dir / "complete").exists():
                shutil.rmtree(config.run_dir, ignore_errors=True)
                self._undisturbed(config)
                (config.run_dir / "complete").touch()
            shelf = invariants.Folder(config.run_dir / "checkpoints")
            windows, batch = self.world.windows(config), config.trainer.batch_tokens
            self._references[tp] = invariants.Reference.of(config.run_dir, shelf, windows, batch)
        return self._references[tp]

    def _undisturbed(self, config: RunConfig) -> None:
        chaos_ranks.run_to_end(config)


@contextlib.contextmanager
def _bucket() -> Iterator[tuple[Any, str, FaultyProxy]]:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from s3_server import BUCKET, S3Server

    server = S3Server()
    proxy = FaultyProxy(server.settings["AWS_ENDPOINT_URL"])
    try:
        yield server, BUCKET, proxy
    finally:
        proxy.close()
        server.stop()


def _row(fault_id: str, kind: str, phase: str, broken: list[str], at: float, events: list[Row]) -> Row:
    """A fault behind the last new step is recovered from when the run has ended well, at its last event."""
    seconds = invariants.recovered_after(events, at)
    if seconds is None and not broken:
        seconds = max(0.0, events[-1]["time"] - at)
    return {"id": fault_id, "kind": kind, "phase": phase, "recovery_s": None if seconds is None else round(seconds, 2)}
