"""The bake-off's results as markdown: targets, methods at matched L0, methods at equal EV, and what was left out.

Every number is a mean over seeds; where there are two or more, half the width of its 95% t interval stands behind it.
Differences are means of differences paired by seed. "Equal EV" is a level below continued training's EV of the same
seed, and each method is taken where its cells over gamma come down to it (`proving_ground_frontier.at_ev`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from credit_grid import GRIDS, LEFT_OUT, WITH_GAMMA
from credit_rows import WITHOUT_PATH, Record, Results, differences, interval, markdown, values
from credit_sweep import is_sweep, sweep_tables
from credit_targets import targets, verdict

from sae_ray.evaluation.proving_ground import Cell

DROPS = (0.01, 0.05)  # EV levels of the comparisons, below continued training's
SHOWN = ("ev", "f1", "precision", "recall", "mcc", "absorption", "splitting", "uniqueness", "dead", "collapsed",
         "composed")  # fmt: skip
INTRODUCTION = """\
Numbers are means over seeds ± half the 95% t interval; differences are paired by seed. Metrics are at matched L0: one
shift of all thresholds gives each SAE that many active latents per sample (fewer where it has not that many positive
pre-activations: then its own L0 stands in the column). *collapsed* is the share of the latents that stood for a child
and now fire for a parent of it; *composed* is the mean share of a decoder row that three true features explain beyond
the best of them. Verdicts are 512 per latent in two rounds, 10% flipped, unless a row says otherwise."""


def report(name: str, stages: Mapping[str, Sequence[Cell]], records: Sequence[Record]) -> str:
    """Markdown of a grid's finished cells.

    Args:
        name: of the grid, and its `stages`. records: finished cells, in the grid's order.
    """
    results = Results(records)
    parts = ["# The bake-off's tables", _provenance(name, stages, records)]
    if name != "sweep":  # no target is asked of it
        parts += [INTRODUCTION, *_targets(results)]
    for start in results.cells:
        parts.append(f"## {start[0].upper()}{start[1:]}")
        if is_sweep(start):
            parts += sweep_tables(results)
            continue
        k = results.some(start)["cell"]["k"]
        parts += [_at_matched_l0(results, start, l0) for l0 in sorted({4, 8, k}) if _any_at(results, start, l0)]
        parts += [part for drop in DROPS if (part := _at_equal_ev(results, start, k, drop))]
    parts.append(_left_out(name, stages, records))
    return "\n\n".join(parts) + "\n"


def _provenance(name: str, stages: Mapping[str, Sequence[Cell]], records: Sequence[Record]) -> str:
    total = sum(len(cells) for cells in stages.values())
    seconds = sum(record["cpu_seconds"] for record in records)
    lines = [
        "Written by `benchmarks/credit.py --report`: do not edit. [credit.md](credit.md) says what it means.",
        f"Grid `{name}`: {len(records)} of {total} cells, {seconds / 3600:.1f} CPU hours without the bases' training.",
    ]
    # Where the results lay is nothing to repeat.
    ran = Counter((r["run"]["commit"], re.sub(r" --out \S+", "", r["run"]["command"])) for r in records)
    lines += [f"- {count} cells at commit {commit}: `{command}`" for (commit, command), count in ran.items()]
    return "\n".join(lines[:1]) + "\n\n" + "\n".join(lines[1:])


def _targets(results: Results) -> list[str]:
    """Nothing where no cell of any target was run."""
    head = ("target", "measured", "", "shuffled verdicts", "true labels")
    of_all = targets(results)
    rows = [(found.target, found.measured, verdict(found), found.shuffled, found.truth) for found in of_all]
    return ["## Targets\n\n" + markdown(head, rows)] if any(found.met is not None for found in of_all) else []


def _any_at(results: Results, start: str, l0: int) -> bool:
    return any(results.rows(start, name, gamma, l0) for name in results.cells[start]
               for gamma in results.gammas(start, name))  # fmt: skip


def _at_matched_l0(results: Results, start: str, l0: int) -> str:
    head = ("method", "gamma", "seeds", "L0", *(_title(key) for key in SHOWN), "F1 - continued", "MCC - continued")
    continued = results.rows(start, "continued", 0.0, l0)
    rows = []
    for name in results.cells[start]:
        for gamma in results.gammas(start, name):
            found = results.rows(start, name, gamma, l0)
            if found:
                numbers = [interval(values(found, key)) for key in ("l0", *SHOWN)]
                gains = [interval(differences(found, continued, key), signed=True) for key in ("f1", "mcc")]
                rows.append((name, _gamma(name, gamma), str(len(found)), *numbers, *gains))
    probes = results.cells[start].get("probes", {}).get(0.0, {})
    if probes:
        deployed = {seed: record["deployed"] for seed, record in probes.items()}
        numbers = [interval([row.get(key, float("nan")) for row in deployed.values()]) for key in ("l0", *SHOWN)]
        rows.append(("probes of true labels (no SAE, own L0)", "", str(len(probes)), *numbers, "", ""))
    return f"At L0 {l0}:\n\n" + markdown(head, rows)


def _at_equal_ev(results: Results, start: str, l0: int, drop: float) -> str:
    """Nothing where nothing was trained on without credit."""
    level = results.below_continued(start, l0, drop)
    continued = results.rows(start, "continued", 0.0, l0)
    if not level:
        return ""
    head = ("method", "gammas", "seeds", "EV", "F1", "MCC", "absorption", "F1 - continued", "MCC - continued",
            "F1 - shuffled")  # fmt: skip
    rows = []
    for name in results.cells[start]:
        found = results.at(start, name, l0, level)
        if not found or name.split(",")[0] in WITHOUT_PATH:
            continue
        null = results.at(start, results.shuffled(start, name), l0, level) if "shuffled" not in name else {}
        gammas = ", ".join(_gamma(name, gamma) for gamma in results.gammas(start, name))
        numbers = [interval(values(found, key)) for key in ("ev", "f1", "mcc", "absorption")]
        gains = [interval(differences(found, continued, key), signed=True) for key in ("f1", "mcc")]
        judges = interval(differences(found, null, "f1"), signed=True)
        rows.append((name, gammas, str(len(found)), *numbers, *gains, judges))
    return f"At L0 {l0} and the EV of continued training less {drop}:\n\n" + markdown(head, rows)


def _left_out(name: str, stages: Mapping[str, Sequence[Cell]], records: Sequence[Record]) -> str:
    done = {record["key"] for record in records}
    lines = [f"- {line}" for line in LEFT_OUT[name]]
    for stage, cells in stages.items():
        missing = sum(cell.key not in done for cell in cells)
        if missing:
            lines.append(f"- Not run (yet): {missing} of {len(cells)} cells of stage `{stage}`.")
    others = [stage.__name__ for stage in GRIDS[name] if stage.__name__ not in stages]
    if others:
        lines.append(f"- Not in this table: the stages {', '.join(f'`{stage}`' for stage in others)} of the grid.")
    return "## What was left out\n\n" + "\n".join(lines)


def _gamma(name: str, gamma: float) -> str:
    return f"{gamma:g}" if name.split(",")[0] in WITH_GAMMA else ""


def _title(key: str) -> str:
    return {"ev": "EV", "f1": "F1", "mcc": "MCC"}.get(key, key)
