"""The figures of a finished run, read from its folder: phase times, rates, the tax of credit on a training step.

    .venv/bin/python benchmarks/run_figures.py runs/quickstart

The tax compares medians of the main copy's and the control copy's step times on the same batches of the same
ranks, after the first rewards were applied: the control copy is the same step without credit.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sae_ray.telemetry import read_jsonl


def main() -> None:
    run = Path(sys.argv[1])
    metrics, events = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "events.jsonl")
    evaluation = json.loads((run / "evaluation.json").read_text())
    calibration = json.loads((run / "calibration.json").read_text())
    table = Table(title=f"{run.name}: figures")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for event in events:
        if event["event"] == "phase":
            table.add_row(f"phase {event['name']}", f"{event['seconds']:.0f} s")
    rows_before = [row for row in metrics if "control/step_seconds" not in row]
    if rows_before:
        step = statistics.median(row["step_seconds"] for row in rows_before)
        rate = statistics.median(row["rank_tokens_per_s"] for row in rows_before)
        table.add_row("step time, reconstruction (median)", f"{step * 1000:.0f} ms")
        table.add_row("trainer tokens/s while training a window (median)", f"{rate:,.0f}")
    for label, value in _tax(metrics, events):
        table.add_row(label, value)
    for event in events:
        if event["event"] == "rewards_applied":
            rate = event["verdicts"] / event["seconds"]
            usage = event["usage"]
            null = "" if event["mean_shuffled"] is None else f"shuffled {event['mean_shuffled']:.3f}, "
            table.add_row(
                f"round {event['round']}: {event['verdicts']} verdicts, AUROC {event['mean_auroc']:.3f}, "
                f"{null}{event['rewards']} credited",
                f"{rate:.1f} verdicts/s",
            )
            table.add_row("  tokens so far: prompt / cached / output", _tokens(usage))
    for name, mode in calibration["modes"].items():
        table.add_row(
            f"judge AUROC, {name} ({mode['low']:.2f} to {mode['high']:.2f}), {mode['n']} items", f"{mode['auroc']:.3f}"
        )
    for name, row in evaluation["core"].items():
        recovered = "-" if row["ce_recovered_mean"] is None else f"{row['ce_recovered_mean']:.3f}"
        table.add_row(
            f"{name}: FVU, L0, CE recovered (mean ablation)", f"{row['fvu']:.3f}, {row['l0']:.1f}, {recovered}"
        )
    for name, row in evaluation["detection"].items():
        table.add_row(f"{name}: detection AUROC, shuffled null", f"{row['auroc']:.3f}, {row['shuffled']:.3f}")
    for pair in evaluation["paired"]:
        interval = f"{pair['low']:+.3f} to {pair['high']:+.3f}"
        table.add_row(f"{pair['name']} over {pair['n']} latents ({interval})", f"{pair['difference']:+.3f}")
    Console(width=130).print(table)


def _tax(metrics: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Step time with credit against the control copy's step, and their ratio."""
    applied = [event["at_step"] for event in events if event["event"] == "rewards_applied" and event["rewards"]]
    if not applied:
        return []
    # A row averages the steps since the row before: the one that straddles the rewards is left out.
    rows = [row for row in metrics if "control/step_seconds" in row and row["step"] > min(applied) + 10]
    if not rows:
        return []
    on = statistics.median(row["step_seconds"] for row in rows)
    off = statistics.median(row["control/step_seconds"] for row in rows)
    return [
        (f"step time with credit / without (medians of {len(rows)})", f"{on * 1000:.0f} / {off * 1000:.0f} ms"),
        ("ratio", f"{on / off:.2f}"),
    ]


def _tokens(usage: dict[str, Any]) -> str:
    return f"{usage['prompt_tokens']:,.0f} / {usage['cached_tokens']:,.0f} / {usage['output_tokens']:,.0f}"


if __name__ == "__main__":
    main()
