"""What shall go wrong in a disturbed run, and when: drawn by a seed, struck once, written down when it struck.

A plan is a file in the run's folder. Each process of the run reads it; the one that comes to a fault's place first
strikes it, leaves a file that says when, and most often is dead then. So a fault strikes once, however often the run
goes through that place again, and whoever looks afterwards knows which faults there really were.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

RANK_PHASES = (
    "before a window",
    "inside a window",
    "after a window",
    "at a snapshot",
    "inside an upload",
    "between shard and manifest",
    "while rewards are installed",
    "while a checkpoint is loaded",
)
PRODUCER_PHASES = ("before a block", "after a block", "while it starts")
CONTROLLER_PHASES = ("between shard and manifest", "after the manifest", "between two windows", "after rewards")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Args:
        id: unique in its plan.
        kind: what goes wrong, as the table calls it.
        phase: what the process that it strikes is doing.
        at: strikes at this step (for producers: train block) or at the first chance after it.
        rank: which trainer rank, where one is struck.
        amount: seconds of a delay, or bytes that a full disk leaves; what it means is the kind's matter.
    """

    id: str
    kind: str
    phase: str
    at: int
    rank: int = 0
    amount: float = 0.0


class Fuses:
    """The faults of one run, in a folder that all its processes see."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        plan = self.folder / "plan.json"
        self.faults = [Fault(**each) for each in json.loads(plan.read_text())] if plan.exists() else []

    @classmethod
    def lay(cls, folder: str | Path, faults: list[Fault]) -> Fuses:
        """Writes the plan. Raises ValueError: two faults have one id."""
        if len({fault.id for fault in faults}) != len(faults):
            raise ValueError("two faults have one id")
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults], indent=1))
        return cls(folder)

    def take(self, kind: str, phase: str, at: int, rank: int | None = None) -> Fault | None:
        """A fault of this kind and phase that is due at `at`; it counts as struck from here on."""
        for fault in self.faults:
            if (fault.kind, fault.phase) != (kind, phase) or fault.at > at or rank not in (None, fault.rank):
                continue
            if self._claim(fault.id):
                return fault
        return None

    def kill(self, kind: str, phase: str, at: int, rank: int | None = None) -> None:
        """Ends this process as the kernel's OOM killer or a lost machine would, if a fault says so."""
        if self.take(kind, phase, at, rank) is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    def struck(self) -> dict[str, float]:
        """Fault id -> when it struck (seconds since the epoch)."""
        return {path.stem: float(path.read_text()) for path in self.folder.glob("*.struck") if path.stat().st_size}

    def note(self, fault_id: str) -> None:
        """Says of a fault that somebody outside the run strikes that this is now."""
        self._claim(fault_id)

    def _claim(self, fault_id: str) -> bool:
        path = self.folder / f"{fault_id}.struck"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.write(handle, repr(time.time()).encode())
        os.close(handle)
        return True


def draw(seed: int, count: int, steps: int, blocks: int, ranks: int, kinds: dict[str, float]) -> list[Fault]:
    """A plan: kinds by their weights, phases and places alike.

    Args:
        steps: of the run; faults of ranks and of the controller are placed among them.
        blocks: train blocks of the run; faults of producers are placed among them.
        kinds: weights of "producer killed", "lease runs out", "rank killed", "controller killed".
    """
    rng = random.Random(seed)
    plan = []
    for number in range(count):
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        at, rank, amount = rng.randrange(steps), rng.randrange(ranks), 0.0
        if kind == "producer killed":
            phase, at = rng.choice(PRODUCER_PHASES), rng.randrange(blocks)
            at = 0 if phase == "while it starts" else at
        elif kind == "lease runs out":
            phase, at = "inside a block", rng.randrange(blocks)
        elif kind == "rank killed":
            phase = rng.choice(RANK_PHASES)
        elif kind == "controller killed":
            phase = rng.choice(CONTROLLER_PHASES)
        else:
            raise ValueError(f"{kind}: cannot be drawn")
        plan.append(Fault(f"{seed}-{number}", kind, phase, at, rank, amount))
    return plan
