"""Disturbs many short runs and finds out whether they end as the undisturbed one does.

    python benchmarks/chaos.py --out runs/chaos --faults 200 --minutes 30 --report docs/chaos.md

Levels: bank, rank, storage, disk, which start no Ray; then run, rpc and nodes. Each run has several faults, drawn by a
seed; a finished run is one line in OUT/runs.jsonl, so the same command goes on where it stopped. Needs the tests' S3
server (moto, in the dev requirements); a full disk needs leave to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import chaos_invariants as invariants
from chaos_levels import Chaos, Row
from chaos_ray_levels import ChaosOnRay
from chaos_report import page, table

LEVELS = ("bank", "rank", "storage", "disk", "run", "rpc", "nodes")


def struck(rows: list[Row]) -> int:
    return sum(len(row["faults"]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="taken in turn")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these [default: 0, 1, ... until --faults]")
    parser.add_argument("--faults", type=int, default=200, help="stop when so many have struck, all runs together")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    parser.add_argument("--report", type=Path, help="Markdown, from all runs in OUT")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    ledger, began = arguments.out / "runs.jsonl", time.monotonic()
    rows = invariants.rows_of(ledger)
    done = {row["name"] for row in rows}
    chaos: Chaos | None = None
    for seed in arguments.seeds or range(10_000):
        for level in arguments.levels:
            if struck(rows) >= arguments.faults or time.monotonic() - began > 60 * arguments.minutes:
                break
            if f"{level}-{seed}" in done:
                continue
            chaos = chaos or ChaosOnRay(arguments.out)
            row = _tried(lambda chaos=chaos, level=level, seed=seed: chaos.disturb(level, seed), level, seed)
            rows.append(row)
            with ledger.open("a") as file:
                file.write(json.dumps(row) + "\n")
            state = row.get("failed") or ("; ".join(row["broken"]) or "held")
            print(f"{row['name']}: {len(row['faults'])} faults, {row['seconds']} s, {state}", flush=True)
        else:
            continue
        break
    print("\n".join(table(rows)))
    if arguments.report:
        command = "python benchmarks/chaos.py --out OUT --report docs/chaos.md"
        machine = f"{os.cpu_count()} cores ({platform.machine()})"
        arguments.report.write_text(page(rows, command, machine))


def _tried(run: Callable[[], Row], level: str, seed: int) -> Row:
    """A run that does not end is a row too: what went wrong, and no invariant held."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        row = {"level": level, "seed": seed, "name": f"{level}-{seed}", "faults": [], "broken": [], "failed": what}
        return {**row, "seconds": 0.0}


if __name__ == "__main__":
    main()
