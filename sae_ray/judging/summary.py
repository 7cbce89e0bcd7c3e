"""What a judging says in the end: tables, `summary.json`, and one Parquet file of the scores that count."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_ray.config import RunConfig
from sae_ray.errors import printable
from sae_ray.judging import results
from sae_ray.storage import LocalStorage

# Summed over the sessions of a judging.
COST = ("prompt_tokens", "cached_tokens", "output_tokens", "calls", "retries", "failed", "cache_hits", "parse_failures")


def write_summary(config: RunConfig) -> dict[str, Any]:
    """Writes `summary.json` and `scores.parquet` of a judging's folder. Returns the summary."""
    storage = LocalStorage(config.run_dir)
    rows = results.read(storage, "scores")
    last = list(results.latest(rows).values())
    sessions = [json.loads(storage.read(key)) for key in storage.list("usage")]
    cost = {name: sum(each.get(name, 0) for each in sessions) for name in (*COST, "seconds")}
    latents = len({(row["kind"], row["latent"]) for row in last})
    summary = {
        "name": config.name,
        "model": config.model.name,
        "hook": config.hook.name,
        "judge": config.judge.endpoint_model or config.judge.endpoint or config.judge.model,
        "evidence": json.loads(storage.read("evidence.json")) if storage.exists("evidence.json") else {},
        "scores": results.summarise(rows),
        "latents": latents,
        "cost": cost,
        **{
            share: max((each[share] for each in sessions if share in each), default=None)
            for share in ("busy_share", "step_share")
        },
        "per_latent": {name: round(value / latents, 2) for name, value in cost.items()} if latents else {},
    }
    storage.write("summary.json", json.dumps(summary, indent=1).encode())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(last, schema=results.SCORES), buffer, compression="zstd")
    storage.write("scores.parquet", buffer.getvalue())
    return summary


def print_summary(config: RunConfig, summary: dict[str, Any], console: Console) -> None:
    title = f"{summary['name']}: {summary['hook']} of {summary['model']}, judge {summary['judge']}"
    table = Table(title=Text(printable(title)))
    for heading in ("scorer", "judged", "mean", "95% interval", "shuffled", "chance", "latents", "missing"):
        table.add_column(heading, justify="left" if heading in ("scorer", "judged") else "right", no_wrap=True)
    for row in summary["scores"]:
        table.add_row(
            row["scorer"], row["kind"], _f(row["mean"]), f"{_f(row['low'])} to {_f(row['high'])}",
            _f(row["shuffled"]), _f(row["chance"]), str(row["n_latents"]), str(row["missing"]),
        )  # fmt: skip
    console.print(table)
    if each := summary["per_latent"]:
        computed = each["prompt_tokens"] - each["cached_tokens"]
        console.print(
            f"per latent: {each['seconds']:.1f} s, {computed:,.0f} prompt tokens computed, "
            f"{each['cached_tokens']:,.0f} cached, {each['output_tokens']:,.0f} written; "
            f"{summary['cost']['parse_failures']:.0f} explanations did not parse"
            + (f"; the judge had work {summary['busy_share']:.0%} of the time" if summary["busy_share"] else "")
            + (f" and computed {summary['step_share']:.0%}" if summary["step_share"] else ""),
            soft_wrap=True,
        )
    files = f"report: {config.run_dir / 'report.html'}; scores: {config.run_dir / 'scores.parquet'}"
    console.print(Text(printable(files)), soft_wrap=True)


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
