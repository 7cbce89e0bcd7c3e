"""The bake-off of credit estimators on synthetic worlds: every cell an SAE, fine-tuned with one kind of credit.

    .venv/bin/python benchmarks/credit.py [--grid smoke|deciding|full] [--seeds 0 1 2] [--minutes 360] [--workers 2]
        [--world research] [--out runs/credit] [--table FILE.md] [--set gamma=0.3 rounds=2]

A cell is estimator x verdicts per latent x verdict noise x staleness x seed, beside the controls; see
`sae_ray.evaluation.proving_ground`. Finished cells are lines of OUT/cells.jsonl and are not run again: stop it when
you like and start it again. Cells whose settings or base differ are other cells. `--only-table` runs nothing.

The table is at matched L0 (4 and 8): mean over seeds, and half the width of the 95% t interval where there are two or
more. "F1 - continued" is the mean of paired differences to continued training from the same base and seed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sae_ray.evaluation.proving_ground import CONTROLS, Cell, run_cell
from sae_ray.evaluation.proving_ground_base import Base, Ground
from sae_ray.evaluation.synthetic_worlds import PRESETS
from sae_ray.reward.credit import ESTIMATORS

# policy_gradient learns from rollouts of a language model, which these worlds do not have.
COMPARED = tuple(name for name in ESTIMATORS if name != "policy_gradient")
# Of Student's t, two-sided 95%, by degrees of freedom; from 10 on the normal is close enough to round to 2 figures.
T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
VERDICTS, NOISES, DELAYS = (32, 128, 256, 1024), (0.0, 0.1, 0.2), (0, 200, 800)
COLUMNS = ("ev", "f1", "precision", "recall", "mcc", "absorption", "splitting")


# ---------------------------------------------------------------------- grids


def grid(name: str, world: str, seeds: Iterable[int], settings: dict[str, Any]) -> list[Cell]:
    """The cells of a grid, the most telling ones first; whole seeds one after the other, so that a run that is cut
    short has complete seeds.

    smoke: one seed's controls and estimators, shrunk until they take a minute or two: it shows that things run.
    deciding: all estimators and controls at 512 verdicts and 10% noise, from BatchTopK (k 4, 4 tuned at 8, and 8) and
    Matryoshka.
    full: deciding, and each estimator over VERDICTS x NOISES x DELAYS from BatchTopK trained and tuned at k 4.
    """
    makers = {"smoke": _smoke, "deciding": _deciding, "full": lambda w, s: [*_deciding(w, s), *_sweep(w, s)]}
    seeds = list(seeds)[:1] if name == "smoke" else list(seeds)
    cells = [replace(cell, **settings) for seed in seeds for cell in makers[name](world, seed)]
    return list({cell.key: cell for cell in cells}.values())


def _smoke(world: str, seed: int) -> list[Cell]:
    base = Base(world, seed, steps=150)
    small = {"steps": 60, "pool": 6000, "verdicts": 64}
    return [Cell(base, method, **small) for method in (*CONTROLS, *COMPARED)]


def _deciding(world: str, seed: int) -> list[Cell]:
    cells = []
    for architecture, base_k, k in (
        ("batchtopk", 4, 4),
        ("batchtopk", 4, 8),
        ("batchtopk", 8, 8),
        ("matryoshka", 8, 8),
    ):
        base = Base(world, seed, architecture, base_k)
        cells += [Cell(base, method, k=k) for method in (*CONTROLS, *COMPARED)]
        for method in COMPARED:
            cells.append(Cell(base, method, k=k, shuffled=True))
            cells.append(Cell(base, method, k=k, explain="random_negatives"))
        first = COMPARED[0]
        cells.append(Cell(base, first, k=k, frozen_decoder=True))
        cells.append(Cell(base, first, k=k, explanation_noise=0.2))
        cells.append(Cell(base, first, k=k, leniency=0.3))
        cells += [Cell(base, first, k=k, gamma=gamma) for gamma in (0.03, 0.3, 1.0)]
    return cells


def _sweep(world: str, seed: int) -> list[Cell]:
    base = Base(world, seed)
    return [
        Cell(base, method, verdicts=verdicts, noise=noise, delay_steps=delay)
        for method in (*COMPARED, "verdict_probes")
        for verdicts in VERDICTS
        for noise in NOISES
        for delay in (DELAYS if method in COMPARED else (0,))
    ]


# ---------------------------------------------------------------------- running


@lru_cache(maxsize=1)
def _ground(world: str, seed: int) -> Ground:
    return Ground(world, seed)


def _work(record: dict[str, Any], cache: str) -> dict[str, Any]:
    """One cell in a worker process."""
    import torch

    torch.set_num_threads(1)
    cell = Cell.read(record)
    return run_cell(cell, _ground(cell.base.world, cell.base.seed), Path(cache))


def _quiet_worker() -> None:
    os.nice(5)


def run(cells: list[Cell], out: Path, minutes: float, workers: int) -> None:
    """Runs what is not finished, until the time is up; a cell that has started is finished."""
    out.mkdir(parents=True, exist_ok=True)
    done = {record["key"] for record in finished(out)}
    waiting: Iterator[Cell] = iter([cell for cell in cells if cell.key not in done])
    deadline = time.monotonic() + 60 * minutes
    running: set[Future[dict[str, Any]]] = set()
    count = len([cell for cell in cells if cell.key in done])
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_quiet_worker)
    with pool, (out / "cells.jsonl").open("a") as lines:
        while True:
            while len(running) < workers and time.monotonic() < deadline:
                cell = next(waiting, None)
                if cell is None:
                    break
                running.add(pool.submit(_work, asdict(cell), str(out / "bases")))
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                record = future.result()
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                count += 1
                print(
                    f"{count} of {len(cells)}: {_name(record['cell'])}, {record['cpu_seconds']:.0f} CPU s", flush=True
                )
    if count < len(cells):
        print(f"{len(cells) - count} cells are left; the same command goes on with them")


def finished(out: Path) -> list[dict[str, Any]]:
    """The records of OUT/cells.jsonl; a last line that was cut off in writing is left out."""
    file = out / "cells.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{file}: a line is not whole and its cell is run again", file=sys.stderr)
    return records


# ---------------------------------------------------------------------- the table


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each cell but for its seed, a block for each L0."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(_name(record["cell"]), []).append(record)
    continued = {_start(r["cell"]): r for r in records if r["cell"]["method"] == "continued"}
    blocks = []
    for l0 in ("4", "8"):
        head = ["cell", "seeds", "L0", *COLUMNS, "F1 - continued"]
        rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, group in groups.items():
            found = [r["matched"][l0] for r in group if l0 in r["matched"]]
            if not found:
                continue
            cells = [name, str(len(found)), *(interval([row[key] for row in found]) for key in ("l0", *COLUMNS))]
            pairs = [(r, continued.get(_start(r["cell"]))) for r in group]
            gains = [r["matched"][l0]["f1"] - c["matched"][l0]["f1"] for r, c in pairs if c is not None]
            rows.append("| " + " | ".join([*cells, interval(gains, signed=True)]) + " |")
        blocks.append(f"At L0 {l0}:\n\n" + "\n".join(rows))
    ceilings = [(name, group) for name, group in groups.items() if group[0]["cell"]["method"] == "probes"]
    for name, group in ceilings:
        shown = {key: interval([r["deployed"][key] for r in group]) for key in ("l0", "precision", "recall", "f1")}
        blocks.append(f"{name} (no SAE): " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    return "\n\n".join(blocks) + "\n"


def interval(values: list[float], signed: bool = False) -> str:
    """Mean and half the 95% t interval; missing values are left out, and none at all is an empty cell."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    mean = format(statistics.fmean(values), "+.3f" if signed else ".3f")
    if len(values) < 2:
        return mean
    quantile = T95[len(values) - 1] if len(values) <= len(T95) else 1.96
    return f"{mean} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def _start(cell: dict[str, Any]) -> str:
    """What a cell shares with the continued training that it is compared with."""
    return json.dumps([cell["base"], cell["k"], cell["steps"], cell["lr"]])


def _name(cell: dict[str, Any]) -> str:
    """What a cell is, without its seed and without what is as usual."""
    base, usual = cell["base"], asdict(Cell(Base(), cell["method"]))
    start = f"{base['world']} {base['architecture']} k {base['k']}" + (
        f"->{cell['k']}" if cell["k"] != base["k"] else ""
    )
    start += f" {base['steps']} steps" if base["steps"] != usual["base"]["steps"] else ""
    other = [
        f"{key} {value}" for key, value in cell.items() if key not in ("base", "k", "method") and value != usual[key]
    ]
    return ", ".join([start, cell["method"], *other])


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Credit estimators on synthetic worlds.")
    parser.add_argument("--grid", choices=("smoke", "deciding", "full"), default="deciding")
    parser.add_argument("--world", choices=sorted(PRESETS), default="research")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=360, help="no cell is started later than this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", help="only cells of these estimators and controls")
    parser.add_argument("--set", type=_setting, nargs="+", default=[], help="KEY=JSON of every cell")
    parser.add_argument("--out", type=Path, default=Path("runs/credit"), help="folder of results and pretrained bases")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    parser.add_argument("--only-table", action="store_true")
    args = parser.parse_args()
    cells = grid(args.grid, args.world, args.seeds, dict(args.set))
    cells = [cell for cell in cells if not args.methods or cell.method in args.methods]
    if not args.only_table:
        run(cells, args.out, args.minutes, args.workers)
    wanted = {cell.key for cell in cells}
    text = table([record for record in finished(args.out) if record["key"] in wanted])
    print(text)
    if args.table:
        args.table.write_text(text)


if __name__ == "__main__":
    main()
