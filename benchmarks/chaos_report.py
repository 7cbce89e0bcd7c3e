"""From what disturbed runs left to a table: one row for each kind of fault at each level."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

LEVELS = {
    "run": "a whole run: driver, Ray, producers, ranks",
    "nodes": "a whole run over several raylets",
    "rank": "one real trainer rank in a process of its own, without Ray; the controller is the benchmark's own loop",
    "storage": "the same with an S3 server behind a faulty proxy, or a full disk",
    "bank": "a process that appends to a verdict bank",
}


ABOUT = [
    "After each run (`benchmarks/chaos_invariants.py`): every step once with the undisturbed run's numbers to the last",
    "bit; between two commits each step trained once, nothing committed trained again; every checkpoint whole, at the",
    "place of the stream where each block has been used once; the last one bitwise the undisturbed run's; rewards",
    "(replayed) applied after the same steps; nothing half-written left; every verdict banked once.",
    "",
    "Recovery is the time from the fault until a step was trained that had not been trained before: mostly the start",
    "of processes. That an undisturbed run's numbers came out holds for any machine; the seconds do not.",
    "Calls between Ray's processes that fail or come late are switched on for a whole run by Ray's own settings and",
    'counted once each: that they happened is taken from Ray, and their "recovery" is the time until the first step.',
    "",
    "Judges are not among these runs, whose rewards are replayed. One that is killed in the middle of a request, and",
    "one whose engine hangs, are in `tests/integration/test_judge.py`, `test_judge_pool.py`, `test_judge_models.py`:",
    "every call is answered, none twice. The reward desk that is killed within a round is in `test_rlaif_run.py`.",
]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown. Args: rows as `chaos.py` writes them: level, faults (kind, phase, recovery_s), broken."""
    groups: dict[tuple[str, str], list[tuple[float | None, bool]]] = defaultdict(list)
    for row in rows:
        for fault in row["faults"]:
            groups[(row["level"], fault["kind"])].append((fault["recovery_s"], not row["broken"]))
    lines = [
        "| level | fault | struck | recovered | invariants held | recovery s, median | max |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    order = list(LEVELS)
    for (level, kind), found in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        seconds = [s for s, _ in found if s is not None]
        times = f"{median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
        held = sum(ok for _, ok in found)
        lines.append(f"| {level} | {kind} | {len(found)} | {len(seconds)} | {held} | {times} |")
    every = [fault for row in rows for fault in row["faults"]]
    recovered = sum(fault["recovery_s"] is not None for fault in every)
    held = sum(len(row["faults"]) for row in rows if not row["broken"])
    lines.append(f"| all | | {len(every)} | {recovered} | {held} | | |")
    return lines


def phases(rows: list[dict[str, Any]]) -> list[str]:
    """How often each phase was struck, as one line a kind."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        for fault in row["faults"]:
            counts[fault["kind"]][fault["phase"]] += 1
    return [
        f"- {kind}: " + ", ".join(f"{phase} {count}" for phase, count in sorted(found.items()))
        for kind, found in sorted(counts.items())
        if set(found) != {""}
    ]


def page(rows: list[dict[str, Any]], command: str, machine: str) -> str:
    """`docs/chaos.md`: table, phases, what the levels are, what did not hold."""
    broken = [f"- {row['name']}: {line}" for row in rows for line in row["broken"]]
    failed = [f"- {row['name']}: {row['failed']}" for row in rows if row.get("failed")]
    seeds = sorted({row["seed"] for row in rows})
    levels = [f"- {level}: {what}" for level, what in LEVELS.items() if any(row["level"] == level for row in rows)]
    return "\n".join(
        [
            "# Faults, and what came of them",
            "",
            f"Written by `{command}`: {len(rows)} runs with seeds {', '.join(map(str, seeds))}, on {machine}.",
            "",
            *ABOUT,
            "",
            *table(rows),
            "",
            *levels,
            "",
            "Where processes were struck:",
            "",
            *phases(rows),
            "",
            *(["What did not hold:", "", *broken, ""] if broken else []),
            *(["Runs that did not end:", "", *failed, ""] if failed else []),
        ]
    )
