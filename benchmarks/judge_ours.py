"""Our side of `judge.py`: runs `sae-ray judge` on what delphi was given, and writes what it cost.

python benchmarks/judge_ours.py SAE CORPUS LATENTS MODEL OUT [--texts 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sae_ray.evidence.types import QUANTILE, TOP
from sae_ray.judge.scorers.stopping import error_of
from sae_ray.judge.scores import Estimate
from sae_ray.judging import results
from sae_ray.storage import LocalStorage


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sae")
    parser.add_argument("corpus")
    parser.add_argument("latents")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=int, default=20, help="per class, latent and scorer")
    parser.add_argument("--scorers", default="detection,fuzzing", help="delphi's defaults have the same two")
    parser.add_argument("--blocks", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        settings = {
            "runs_dir": runs,
            "ray.address": "local",
            "ray.local_cpus": 8,
            "ray.object_store_mb": 800,
            "judge.model": args.model,
            "judging.blocks": args.blocks,
            "judging.scorers": f"[{args.scorers}]",
            "judging.positives": args.texts,
            "judging.negatives": args.texts,
            "judging.random_directions": 0,
        }
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "sae_ray.cli", "judge", args.sae, "--corpus", args.corpus]
        subprocess.run([*command, "--latents", args.latents, "--name", "ours", *sets], check=True)
        summary = json.loads((Path(runs) / "ours" / "summary.json").read_text())
        rows = pq.read_table(Path(runs) / "ours" / "scores.parquet").to_pylist()
        calibration = json.loads((Path(runs) / "ours" / "calibration-scorer.json").read_text())["calibration"]
        verdicts = results.read(LocalStorage(Path(runs) / "ours"), "verdicts")
    first = args.scorers.split(",")[0]
    errors = [
        error_of(Estimate(row["value"], row["stderr"], row["low"], row["high"], row["n"]), row["n"] // 2, row["n"] // 2)
        for row in rows
        if row["scorer"] == first and row["value"] is not None
    ]
    cost = summary["cost"]
    names = ("seconds", "prompt_tokens", "cached_tokens", "output_tokens", "calls")
    threshold = calibration["modes"][calibration["mode"]]["threshold"]
    found = {
        "features": len(errors),
        **{name: cost[name] for name in names},
        "stderr": statistics.median(errors),
        "verdicts": counts_of([row for row in verdicts if row["scorer"] == first], threshold),
    }
    args.out.write_text(json.dumps(found, indent=1))


def counts_of(rows: list[dict[str, Any]], threshold: float) -> dict[str, dict[str, int]]:
    """Per latent, verdicts at the calibrated threshold that were right and wrong of either class, and lost ones."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["purpose"] == "score":
            positive, raw = row["stratum"] in (TOP, QUANTILE), row["raw"]
            said = "failed" if raw is None else "right" if (raw > threshold) == positive else "wrong"
            counts = found.setdefault(str(row["latent"]), {})
            name = f"{'positive' if positive else 'negative'}_{said}"
            counts[name] = counts.get(name, 0) + 1
    return found


if __name__ == "__main__":
    main()
