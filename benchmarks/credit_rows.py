"""Finished cells of the bake-off, by what they start from, what they are, their gamma and their seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from credit_grid import WITH_GAMMA, Start

from sae_ray.evaluation.proving_ground import Cell
from sae_ray.evaluation.proving_ground_base import Base
from sae_ray.evaluation.proving_ground_frontier import at_ev

Record = dict[str, Any]
Row = dict[str, float]
# Of Student's t, two-sided 95%, by degrees of freedom; from 10 on its expansion in 1 / df is right to .001.
T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
STEPS = Cell(Base(), "base").steps
METRICS = (
    "l0", "ev", "f1", "precision", "recall", "mcc", "absorption", "splitting", "uniqueness", "dead", "composed",
)  # fmt: skip
# They are no point between continued training and anything.
WITHOUT_PATH = ("base", "probes", "verdict_probes")
PHRASES: dict[str, Callable[[Any], str]] = {
    "shuffled": lambda _: "shuffled verdicts",
    "frozen_decoder": lambda _: "frozen decoder",
    "explain": {
        "random_negatives": "explained against random negatives",
        "specific": "explained by candidates that compete on verdicts",
    }.__getitem__,
    "verdicts": lambda n: f"{n} verdicts",
    "noise": lambda p: f"{p:.0%} flipped",
    "delay_steps": lambda n: f"{n} steps late",
    "explanation_noise": lambda p: f"{p:.0%} explained by a relative",
    "leniency": lambda p: f"{p:.0%} lenient to relatives",
    "keep_rounds": lambda n: "verdicts kept for a round" if n == 1 else f"verdicts kept for {n} rounds",
    "rollout_gamma": lambda x: f"rollouts' gamma {x:g}",
    "rollout_share": lambda p: f"{p:.0%} of verdicts on rollouts",
    "reader_cosine": lambda x: f"readers at cosine {x:g}",
    "half_life_steps": lambda n: f"half-life {n:g} steps",
    "rewards": lambda name: f"rewarded for {name}",
    "bonus": lambda x: f"bonus {x:g}",
}


def start_of(cell: Mapping[str, Any]) -> str:
    """What a cell was tuned from and at which k; the seed aside."""
    base, usual = cell["base"], asdict(Base())
    name = start_name(Start(base["world"], base["architecture"], base["k"]))
    name += f" tuned at k {cell['k']}" if cell["k"] != base["k"] else ""
    if cell["steps"] != STEPS:
        name += f", {cell['steps']} steps of tuning"
    return name + (f", {base['steps']} steps" if base["steps"] != usual["steps"] else "")


def start_name(start: Start) -> str:
    return f"{start.world}, {start.architecture} k {start.k}"


def label(cell: Mapping[str, Any]) -> str:
    """What is done to the base: the method and what is not as usual; gamma, seed and start aside."""
    usual = asdict(Cell(Base(), cell["method"]))
    named = ("base", "method", "k", "gamma", "steps", "pool")
    unusual = [(key, value) for key, value in cell.items() if key not in named and value != usual[key]]
    said = [PHRASES[key](value) if key in PHRASES else f"{key} {value}" for key, value in unusual]
    if cell.get("rewards", usual["rewards"]) != usual["rewards"]:  # then verdicts teach nothing
        said = [text.replace("shuffled verdicts", "shuffled rewards") for text in said]
    return ", ".join([cell["method"], *said])


class Results:
    """Finished cells of one grid.

    Attributes:
        cells: start -> label -> gamma -> seed -> record, in the order in which the records were given. The gamma of a
            method that knows none is 0.
    """

    def __init__(self, records: Sequence[Record]):
        self.cells: dict[str, dict[str, dict[float, dict[int, Record]]]] = {}
        for record in records:
            cell = record["cell"]
            gamma = cell["gamma"] if cell["method"] in WITH_GAMMA else 0.0
            of_start = self.cells.setdefault(start_of(cell), {})
            of_start.setdefault(label(cell), {}).setdefault(gamma, {})[cell["base"]["seed"]] = record

    def rows(self, start: str, name: str, gamma: float, l0: int) -> dict[int, Row]:
        """Metrics at matched L0, by seed; NaN for one that was not measured yet when the cell ran."""
        found = self.cells.get(start, {}).get(name, {}).get(gamma, {})
        return {
            seed: {
                **{key: r["matched"][str(l0)].get(key, math.nan) for key in METRICS},
                "gamma": gamma,
                "collapsed": r["collapsed"],
            }
            for seed, r in found.items()
            if str(l0) in r["matched"]
        }

    def gammas(self, start: str, name: str) -> list[float]:
        return sorted(self.cells.get(start, {}).get(name, {}))

    def at(self, start: str, name: str, l0: int, level: float | Mapping[int, float]) -> dict[int, Row]:
        """Metrics at matched L0 and at the EV `level` (or each seed's), by seed; see the module `credit_report`.

        A method's path starts at continued training, which is its gamma of 0, unless its decoder was frozen.
        """
        method = name.split(",")[0]
        if method in WITHOUT_PATH:
            return {}
        points = [self.rows(start, name, gamma, l0) for gamma in self.gammas(start, name)]
        from_continued = "frozen decoder" not in name and method != "continued"
        first = self.rows(start, "continued", 0.0, l0) if from_continued else {}
        out = {}
        for seed in sorted({seed for rows in points for seed in rows}):
            path = [rows[seed] for rows in ([first, *points] if from_continued else points) if seed in rows]
            wanted = level.get(seed, math.nan) if isinstance(level, Mapping) else level
            if not math.isnan(wanted) and (seed in first or not from_continued):
                out[seed] = at_ev(path, wanted)
        return out

    def some(self, start: str, name: str | None = None) -> Record:
        """Any record of a start, or of one of its labels."""
        named = self.cells[start] if name is None else {name: self.cells[start][name]}
        return next(r for of_gamma in named.values() for of_seed in of_gamma.values() for r in of_seed.values())

    def shuffled(self, start: str, name: str) -> str:
        """The label of the same cells with shuffled verdicts."""
        return label({**self.some(start, name)["cell"], "shuffled": True})

    def below_continued(self, start: str, l0: int, drop: float) -> dict[int, float]:
        """Each seed's EV level: continued training's less `drop`."""
        return {seed: row["ev"] - drop for seed, row in self.rows(start, "continued", 0.0, l0).items()}


def values(rows: Mapping[int, Row], key: str) -> list[float]:
    return [row[key] for row in rows.values()]


def differences(rows: Mapping[int, Row], others: Mapping[int, Row], key: str) -> list[float]:
    """Paired by seed."""
    return [row[key] - others[seed][key] for seed, row in rows.items() if seed in others]


def mean(numbers: Sequence[float]) -> float:
    """Of those that are not missing; NaN of none."""
    there = [number for number in numbers if not math.isnan(number)]
    return statistics.fmean(there) if there else math.nan


def interval(numbers: Sequence[float], signed: bool = False) -> str:
    """Mean and half the 95% t interval; missing values are left out, and none at all is an empty cell."""
    there = [number for number in numbers if not math.isnan(number)]
    if not there:
        return ""
    shown = format(statistics.fmean(there), "+.3f" if signed else ".3f")
    if len(there) < 2:
        return shown
    freedom = len(there) - 1
    quantile = T95[freedom] if freedom < len(T95) else 1.96 + 2.37 / freedom + 2.82 / freedom**2 + 2.5 / freedom**3
    return f"{shown} ± {quantile * statistics.stdev(there) / math.sqrt(len(there)):.3f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = "|" + "|".join("---" if column == 0 else "---:" for column in range(len(head))) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", aligned, *("| " + " | ".join(row) + " |" for row in rows)])
