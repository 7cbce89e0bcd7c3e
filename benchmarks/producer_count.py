"""Who waits for whom with 1, 2 and 4 producers: the same run, real language model and trainer, one after the other.

    .venv/bin/python benchmarks/producer_count.py jobs/quickstart.yaml --counts 1 2 4 --steps 200

The losses of all runs must be the same, which is checked. Producers are logical: with more of them than cores they take
turns, and the trainer's wait falls no further.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sae_ray.telemetry import read_jsonl

OFF = ("rlaif.enabled=false", "evaluation.latents=0", "sae.export=null", "trainer.log_every=1")


def train(config: str, folder: Path, producers: int, steps: int, overrides: list[str]) -> Path:
    """Trains with so many producers; the run's folder."""
    name = f"producers-{producers}"
    sets = [*OFF, f"name={name}", f"runs_dir={folder}", f"trainer.steps={steps}", f"activations.producers={producers}"]
    options = [part for item in [*sets, *overrides] for part in ("--set", item)]
    subprocess.run([sys.executable, "-m", "sae_ray.cli", "train", config, *options], check=True)
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], help="further keys of the config")
    args = parser.parse_args()
    table = Table(title=f"{args.config}, {args.steps} steps")
    for heading in ("producers", "trainer waits", "producers idle", "steps/s", "ratio"):
        table.add_column(heading, justify="right")
    first_rate, losses = None, None
    with tempfile.TemporaryDirectory() as scratch:
        for count in args.counts:
            run = train(args.config, Path(scratch), count, args.steps, args.set)
            events = read_jsonl(run / "events.jsonl")
            (waits,) = [event for event in events if event["event"] == "waits"]
            seconds = sum(e["seconds"] for e in events if e["event"] == "phase" and e["name"] == "reconstruction")
            found = [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]
            assert losses in (None, found), "the number of producers changed a loss"
            losses, rate = found, args.steps / seconds
            first_rate = first_rate or rate
            table.add_row(
                str(count), f"{waits['trainer_wait_share']:.1%}", f"{waits['producers_idle_share']:.1%}", f"{rate:.2f}",
                f"{rate / first_rate:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
