"""The verdict bank under kill -9: a process appends verdicts to a real bank, is killed, and goes on from what is there.

What a resumed run does (`reward.pool_judge`): it reads the bank and asks only for what it does not hold.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from chaos_faults import Fuses
from chaos_invariants import wrong_verdicts
from chaos_ranks import forking

from sae_ray.reward.bank import SCHEMA, VerdictBank
from sae_ray.storage import LocalStorage

SEGMENTS, PER_SEGMENT = 40, 60
# Between two segments, as verdicts take their time; and how long after its first one a writer lives at most. However
# fast the machine is, it is far from its end then.
PAUSE_S, KILLED_WITHIN_S = 0.005, 0.015


def verdicts(seed: int) -> list[dict[str, Any]]:
    """All that is asked for, in order; what a judge says of one is decided by the seed."""
    rng = random.Random(seed)
    blank: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    return [
        blank
        | {"round": number // 600, "latent": number // 20, "explanation": f"about {number // 20}", "judge": "judge"}
        | {"purpose": "score", "text": f"text {number}", "score": rng.random(), "mode": "likelihood", "sae_step": 1}
        for number in range(SEGMENTS * PER_SEGMENT)
    ]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["explanation"], row["text"], row["purpose"], round(row["score"], 5)


def work(folder: str, seed: int) -> None:
    bank, fuses = VerdictBank(LocalStorage(folder)), Fuses(Path(folder) / "chaos")
    held = {key_of(row)[:3] for row in bank.read()}
    asked = [row for row in verdicts(seed) if key_of(row)[:3] not in held]
    for first in range(0, len(asked), PER_SEGMENT):
        bank.append(asked[first : first + PER_SEGMENT])
        with (fuses.folder / "alive").open("a") as file:
            file.write(f"{time.time()}\n")
        time.sleep(PAUSE_S)


def disturb(folder: Path, seed: int, kills: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(faults as rows, what does not hold) of a bank whose writer was killed up to `kills` times."""
    context, rng = forking(), random.Random(seed)
    chaos = folder / "chaos"
    chaos.mkdir(parents=True, exist_ok=True)
    struck: list[float] = []
    while True:
        process = context.Process(target=work, args=(str(folder), seed))
        before = _alive(chaos)
        process.start()
        if len(struck) < kills:
            while process.is_alive() and len(_alive(chaos)) <= len(before):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, KILLED_WITHIN_S))
            at = time.time()
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                struck.append(at)
                continue
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{folder}: exit code {process.exitcode}")
        break
    beats = _alive(chaos)
    faults = [
        {"id": str(number), "kind": "writer killed", "phase": "", "recovery_s": _next(beats, at)}
        for number, at in enumerate(struck)
    ]  # fmt: skip
    found = [key_of(row) for row in VerdictBank(LocalStorage(folder)).read()]
    expected = [(*key_of(row)[:3], round(_as_stored(row["score"]), 5)) for row in verdicts(seed)]
    return faults, list(wrong_verdicts(found, expected))


def _as_stored(score: float) -> float:
    """Scores are banked as float32."""
    return float(np.float32(score))


def _next(beats: list[float], at: float) -> float | None:
    """Seconds from `at` to the next segment."""
    return next((beat - at for beat in beats if beat > at), None)


def _alive(chaos: Path) -> list[float]:
    path = chaos / "alive"
    return [float(line) for line in path.read_text().split()] if path.exists() else []
