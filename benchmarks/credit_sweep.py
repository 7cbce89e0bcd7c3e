"""The sweep's tables: every estimator over verdicts, noise and staleness, against continued training of its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from credit_grid import COMPARED, DEFAULT, DELAYS, HALF, NOISES, SMALL, SWEPT, VERDICTS
from credit_rows import WITH_GAMMA, Results, differences, interval, label, markdown, start_of

METHODS = (*COMPARED, "verdict_probes")
INTRODUCTION = """\
Gains over continued training of the same seed at L0 {k}: F1 / MCC / EV, means over seeds ± half the 95% t interval; the
number of seeds stands in brackets. They are not at equal EV: what is paid is the third number. Cells are half as long
as others ({steps} steps, {pool} samples a round). A dash: not run."""


def is_sweep(start: str) -> bool:
    """Whether a start's cells are the sweep's."""
    return start == start_of(_cell("continued"))


def sweep_tables(results: Results) -> list[str]:
    """Markdown: a table of verdicts for each noise, and one of delays."""
    parts = [INTRODUCTION.format(k=SMALL.k, **HALF)]
    for noise in NOISES:
        columns = [(f"{n} verdicts", {"verdicts": n, "noise": noise}) for n in VERDICTS]
        parts += [f"{noise:.0%} flipped:", _table(results, columns)]
    told = f"{SWEPT['verdicts']} verdicts, {SWEPT['noise']:.0%} flipped, {{}} steps late"
    parts.append(_table(results, [(told.format(n), {**SWEPT, "delay_steps": n}) for n in DELAYS]))
    return parts


def _table(results: Results, columns: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    asked_of = [*((method, {}) for method in METHODS), (DEFAULT, {"shuffled": True})]
    rows = [
        (label(_cell(method, **more)), *(_gains(results, _cell(method, **asked, **more)) for _, asked in columns))
        for method, more in asked_of
    ]
    return markdown(("method", *(title for title, _ in columns)), rows)


def _gains(results: Results, cell: Mapping[str, Any]) -> str:
    start, gamma = start_of(cell), cell["gamma"] if cell["method"] in WITH_GAMMA else 0.0
    found = results.rows(start, label(cell), gamma, SMALL.k)
    if not found:
        return "-"
    continued = results.rows(start, "continued", 0.0, SMALL.k)
    gains = [interval(differences(found, continued, key), signed=True) for key in ("f1", "mcc", "ev")]
    return " / ".join(gains) + f" ({len(found.keys() & continued.keys())})"


def _cell(method: str, **changes: Any) -> dict[str, Any]:
    return asdict(SMALL.cell(0, method, gamma=0.03, **HALF, **changes))
