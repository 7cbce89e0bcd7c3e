"""RLAIF's tax: the trainer's steps/s while judges on their own cores answer, against the same run without judges.

    .venv/bin/python benchmarks/rlaif_tax.py jobs/quickstart.yaml --repeats 3

vLLM's own server is the judge and has the machine's last core to itself; driver, producers and trainer share the
others, with judges and without, so that what is left is what asking costs: evidence blocks, the desk, the event loop.
Runs of both kinds take turns. Steps are timed by the clock, from outside, over the steps that were trained between the
request for the round and the arrival of its rewards; then over those with the credit in the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from sae_ray.config import JudgeConfig
from sae_ray.embedded import resolve_model
from sae_ray.judge.deploy import replica_env
from sae_ray.judge.server import cpu_dtype
from sae_ray.telemetry import read_jsonl

START_S, RUN_S = 600.0, 1800.0
POLL_S = 0.1
BEFORE = 20
# One round that is late by as much as it likes: the trainer never waits for it.
SETS = (
    "trainer.log_every=1", "trainer.checkpoint_every=100000", "evaluation.latents=0", "evaluation.blocks=1",
    "evaluation.ce_sequences=1", "sae.export=null", "rlaif.rounds=1", "rlaif.control=false",
)  # fmt: skip


class Clocked(NamedTuple):
    """at: step -> when it was seen to be done. requested, applied: steps; None: no judges."""

    at: dict[int, float]
    requested: int | None
    applied: int | None

    def rate(self, first: int, last: int) -> float:
        """Steps/s from the end of step `first` to that of `last`, as far as both were seen."""
        seen = [step for step in self.at if first <= step <= last]
        return (max(seen) - min(seen)) / (self.at[max(seen)] - self.at[min(seen)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help=f"in all; judges are asked after the first {BEFORE}")
    parser.add_argument("--set", action="append", default=[], help="further keys of the config")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("judges of their own need a second core")
    table = Table(title=f"{args.config}, {args.steps} steps; judge on core {cores[-1]}, the run on {cores[:-1]}")
    for heading in ("repeat", "judged meanwhile, steps", "steps/s", "without judges", "ratio", "with credit, ratio"):
        table.add_column(heading, justify="right")
    asking, credited = [], []
    with tempfile.TemporaryDirectory() as scratch, _server(cores[-1], Path(scratch)) as endpoint:
        judged = [
            f"trainer.steps={BEFORE}",
            f"rlaif.steps={args.steps - BEFORE}",
            f"rlaif.max_staleness_steps={args.steps}",
        ]
        judged += [f"judge.endpoint={endpoint}", "rlaif.enabled=true", *args.set]
        alone = [f"trainer.steps={args.steps}", "rlaif.enabled=false", *args.set]
        for repeat in range(args.repeats):
            with_judges = _run(args.config, Path(scratch), f"judged-{repeat}", judged, cores[:-1])
            without = _run(args.config, Path(scratch), f"alone-{repeat}", alone, cores[:-1])
            first, applied = with_judges.requested, with_judges.applied
            if first is None or applied is None:
                raise SystemExit("the round was not applied before the last step: ask for more --steps")
            # The first step is followed by the judge's calibration, in which nothing is trained.
            rates = with_judges.rate(first + 1, applied), without.rate(first + 1, applied)
            # The step at which the rewards come waits for them to be fitted.
            begins = applied + 5
            after = math.nan
            if begins + 20 < args.steps:
                after = with_judges.rate(begins, args.steps) / without.rate(begins, args.steps)
            asking.append(rates[0] / rates[1])
            credited.append(after)
            table.add_row(
                str(repeat), f"{first} to {applied}", f"{rates[0]:.2f}", f"{rates[1]:.2f}", f"{asking[-1]:.3f}",
                f"{after:.3f}",
            )  # fmt: skip
    table.add_row("median", "", "", "", f"{statistics.median(asking):.3f}", f"{statistics.median(credited):.3f}")
    Console(width=110).print(table)


def _run(config: str, folder: Path, name: str, sets: list[str], cores: list[int]) -> Clocked:
    """Trains on some cores only, and looks at its clock meanwhile.

    Each run has a folder of its own for runs: those of one share what judges have answered.
    """
    folder = folder / f"of-{name}"
    folder.mkdir()
    options = [part for item in (*SETS, *sets, f"name={name}", f"runs_dir={folder}") for part in ("--set", item)]
    command = [sys.executable, "-m", "sae_ray.cli", "train", config, *options]
    metrics, at = folder / name / "metrics.jsonl", dict[int, float]()
    with (folder / f"{name}.log").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, preexec_fn=_on(cores))
        ends = time.monotonic() + RUN_S
        while process.poll() is None:
            if time.monotonic() > ends:
                process.send_signal(signal.SIGINT)
                raise SystemExit(f"{name} took over {RUN_S:g} s")
            if metrics.exists() and (rows := metrics.read_text().splitlines()):
                with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                    at.setdefault(json.loads(rows[-1])["step"], time.monotonic())
            time.sleep(POLL_S)
    if process.returncode:
        told = [log.read_text()[-2000:] for log in (folder / f"{name}.log", folder.parent / "server.log")]
        raise SystemExit("\n".join(told))
    events = read_jsonl(folder / name / "events.jsonl")
    requested = [event["step"] for event in events if event["event"] == "round_requested"]
    applied = [event["at_step"] for event in events if event["event"] == "rewards_applied"]
    return Clocked(at, *(found[0] if found else None for found in (requested, applied)))


@contextlib.contextmanager
def _server(core: int, folder: Path) -> Iterator[str]:
    """vLLM's OpenAI-compatible server with the embedded judge, on one core; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = JudgeConfig(threads=1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve_model(judge.model)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 29), "--enforce-eager"]
    # What `judge.deploy` sets on CPUs: a seeded request whose prompt is cut in two ends vLLM there.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048"]
    # The model's own bfloat16 is ten times slower than float32 on a core without it.
    command += ["--dtype", cpu_dtype(), "--max-num-seqs", "32", "--enable-prompt-tokens-details"]
    with (folder / "server.log").open("w") as said:
        process = subprocess.Popen(
            command, env=os.environ | replica_env(judge), stdout=said, stderr=said, preexec_fn=_on([core])
        )
    try:
        ends = time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit((folder / "server.log").read_text()[-2000:])
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(family, timeout=20)[1]:
            left.kill()


def _on(cores: list[int]) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    main()
