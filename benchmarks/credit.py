"""The bake-off of credit estimators on synthetic worlds: every cell an SAE, fine-tuned with one kind of credit.

    .venv/bin/python benchmarks/credit.py [--grid smoke|deciding|sweep|full] [--seeds 0 1 2] [--minutes 360]
        [--workers 2] [--stages teacher parents] [--worlds research] [--methods teacher_gate] [--set gamma=0.3 rounds=2]
        [--out runs/credit] [--report docs/credit_table.md] [--plot docs/credit_frontier.svg] [--only-report]

`credit_grid.py` says which cells there are and in which order they run; `sae_ray.evaluation.proving_ground` what a cell
is. Finished cells are lines of OUT/results.jsonl and are not run again: stop it when you like and start it again. Cells
whose settings or base differ are other cells. The report (`credit_report.py`) is written from what is finished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from credit_grid import GRIDS, by_stage
from credit_report import report
from credit_rows import Results, label, start_of

from sae_ray.evaluation.proving_ground import Cell, run_cell
from sae_ray.evaluation.proving_ground_base import Ground
from sae_ray.evaluation.synthetic_worlds import PRESETS

REPO = Path(__file__).resolve().parents[1]
MINUTES = {"smoke": 10.0, "deciding": 60.0, "sweep": 60.0, "full": 360.0}
GROUNDS = 3  # worlds at a seed that a worker keeps: 0.3 GB each, 0.8 GB in the large world


# ---------------------------------------------------------------------- running


@lru_cache(maxsize=GROUNDS)
def _ground(world: str, seed: int) -> Ground:
    return Ground(world, seed)


def _work(record: dict[str, Any], cache: str) -> dict[str, Any]:
    """One cell in a worker process."""
    import torch

    torch.set_num_threads(1)
    cell = Cell.read(record)
    return run_cell(cell, _ground(cell.base.world, cell.base.seed), Path(cache))


def _start_worker(parent: int) -> None:
    """Workers are nice, and end with the process that started them however that ends."""
    os.nice(5)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run(cells: list[Cell], out: Path, minutes: float, workers: int) -> int:
    """Runs what is not finished, until the time is up; a cell that has started is finished.

    Returns:
        How many cells failed: what they raised is printed, and the others run.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = finished(out)
    waiting: Iterator[Cell] = iter([cell for cell in cells if cell.key not in done])
    deadline = time.monotonic() + 60 * minutes
    running: dict[Future[dict[str, Any]], Cell] = {}
    failed, count = 0, len([cell for cell in cells if cell.key in done])
    origin = {"commit": commit(), "command": shlex.join(["benchmarks/credit.py", *sys.argv[1:]])}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(),))
    with pool, _appended(out / "results.jsonl") as lines:
        while True:
            while len(running) < workers and time.monotonic() < deadline:
                cell = next(waiting, None)
                if cell is None:
                    break
                running[pool.submit(_work, asdict(cell), str(out / "bases"))] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    failed += 1
                    print(f"failed: {cell}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                lines.write(json.dumps({**record, "run": origin}) + "\n")
                lines.flush()
                count += 1
                print(f"{count} of {len(cells)}: {_said(record)}", flush=True)
    if count < len(cells):
        print(f"{len(cells) - count} cells are left; the same command goes on with them")
    return failed


def _said(record: dict[str, Any]) -> str:
    cell = record["cell"]
    name = f"{start_of(cell)}, seed {cell['base']['seed']}: {label(cell)}, gamma {cell['gamma']:g}"
    at = record["matched"].get(str(cell["k"]), record["deployed"])
    found = ", ".join(f"{key} {at[key]:.3f}" for key in ("ev", "f1", "mcc", "absorption") if key in at)
    return f"{name}: {found}; {record['cpu_seconds']:.0f} CPU s"


def _appended(file: Path) -> TextIO:
    """The open file, after a newline where an earlier process was stopped within a line."""
    with file.open("a+b") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
    return file.open("a")


def finished(out: Path) -> dict[str, dict[str, Any]]:
    """The records of OUT/results.jsonl by their cells' keys; a line that was cut off in writing is left out."""
    file = out / "results.jsonl"
    records = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except json.JSONDecodeError:
            print(f"{file}: a line is not whole and its cell is run again", file=sys.stderr)
    return records


def commit() -> str:
    """The commit of the working tree, with a + where it has changed since; "unknown" outside a checkout."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=REPO, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Credit estimators on synthetic worlds.")
    parser.add_argument("--grid", choices=sorted(GRIDS), default="deciding")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, help="no cell is started later than this; by grid: 10, 60 or 360")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", nargs="+", help="only these stages of the grid")
    parser.add_argument("--worlds", choices=sorted(PRESETS), nargs="+", help="only cells of these worlds")
    parser.add_argument("--methods", nargs="+", help="only cells of these estimators and controls")
    parser.add_argument("--set", type=_setting, nargs="+", default=[], help="KEY=JSON of every cell")
    parser.add_argument("--out", type=Path, default=Path("runs/credit"), help="folder of results and pretrained bases")
    parser.add_argument("--report", type=Path, help="write the report to this file too")
    parser.add_argument("--plot", type=Path, help="draw the frontiers over gamma into this image")
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    args = parser.parse_args()
    stages = {
        stage: [
            cell
            for cell in cells
            if (not args.methods or cell.method in args.methods) and (not args.worlds or cell.base.world in args.worlds)
        ]
        for stage, cells in by_stage(args.grid, args.seeds, dict(args.set), args.stages).items()
    }
    cells = [cell for of_stage in stages.values() for cell in of_stage]
    failed = 0
    if not args.only_report:
        failed = run(cells, args.out, args.minutes or MINUTES[args.grid], args.workers)
    done = finished(args.out)
    records = [done[cell.key] for cell in cells if cell.key in done]
    text = report(args.grid, stages, records)
    if args.report:
        args.report.write_text(text)
    else:
        print(text)
    if args.plot:
        from credit_plot import plot  # matplotlib: of the development lock

        plot(Results(records), args.plot)
    sys.exit(f"{failed} cells failed" if failed else 0)


if __name__ == "__main__":
    main()
