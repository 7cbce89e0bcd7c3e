"""How busy one judge replica is kept, by how many calls a caller has open.

    .venv/bin/python benchmarks/judge_pool.py [--seconds 20] [--in-flight 1 2 4 8 16] [--out FILE.json]

Starts a Ray and one replica of its own. Each row is a closed loop: as many tasks as calls in flight, each asking for
`--texts` fresh contexts of the corpus times 8 explanations (likelihood mode) as soon as its last call is answered.
Verdicts per second are counted in a window that opens when every task has had an answer; a call that reaches over the
window's edge counts by the part of it inside. The columns that say how busy the replica was:

- `had requests`: share of the time in which at least one request was with the engine (`busy_share` in the metrics);
- `executing`: share in which the engine core waited for its workers to finish a batch (`step_share`). A lower bound of
  the time that workers compute: the core does not wait while it schedules the next batch beside a running one;
- `worker CPU`: seconds of CPU time of the engine's worker processes per second, as the operating system counts it, so
  that "executing" can be told from waiting for a core on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import psutil
import ray
from rich.console import Console
from rich.table import Table

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import CorpusConfig, JudgeConfig, ModelConfig
from sae_ray.corpus import open_corpus
from sae_ray.judge.client import JudgeClient
from sae_ray.judge.deploy import JudgeApp

REPO = Path(__file__).parents[1]
EXPLANATIONS = (
    *("file paths", "HTTP requests, url, response", "matrix multiplication", "unit tests"),
    *("dates and times", "lists of numbers", "error messages", "names of people"),
)
COLUMNS = (
    *("calls in flight", "verdicts/s", "s per call", "had requests", "executing", "worker CPU"),
    *("tokens per verdict", "of them cached"),
)


def main() -> None:
    args = arguments()
    cfg = JudgeConfig(
        model=args.judge, threads=args.threads, start_timeout_s=900, deadline_s=900, max_in_flight=max(args.in_flight)
    )
    texts = contexts(args.context_tokens)
    ray.init(
        num_cpus=8, object_store_memory=400 << 20, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPO)}},
    )  # fmt: skip
    app = JudgeApp(cfg, "busy")
    try:
        app.start()
        if not app.ready(cfg.start_timeout_s):
            raise SystemExit(f"the judge did not start within {cfg.start_timeout_s:g} s: {app.status()}")
        rows = asyncio.run(measure_all(app, cfg, texts, args))
    finally:
        app.shutdown()
        ray.shutdown()
    table = Table(
        title=f"One replica of {args.judge}, {args.threads} threads, {args.texts} texts x {len(EXPLANATIONS)} "
        f"explanations a call, {args.seconds:g} s a row; {os.cpu_count()} cores, {processor()}"
    )
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=150).print(table)
    if args.out:
        args.out.write_text(json.dumps({"settings": vars(args) | {"out": None}, "rows": rows}, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--judge", default="smollm2-135m-instruct", help="as judge.model")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=20, help="window of each row")
    parser.add_argument("--texts", type=int, default=8, help="per call")
    parser.add_argument("--context-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    return parser.parse_args()


def contexts(tokens: int) -> Iterator[str]:
    """Texts of the built-in corpus, each once."""
    tokenizer = load_tokenizer(ModelConfig())
    for document in open_corpus(CorpusConfig()).documents(0):
        ids = tokenizer.encode(document, add_special_tokens=False)[:tokens]
        if len(ids) == tokens:
            yield tokenizer.decode(ids)


async def measure_all(
    app: JudgeApp, cfg: JudgeConfig, texts: Iterator[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    first = JudgeClient(app.handle(), cfg)
    # The replica's first requests pay for its warm-up.
    await first.score([(text, EXPLANATIONS[0]) for text in itertools.islice(texts, 4)], "likelihood")
    described = await first.describe()
    engines = [psutil.Process(pid) for pid in described["engine_pids"]]
    tree = [*engines, *(child for engine in engines for child in engine.children(recursive=True))]
    workers = [process for process in tree if process.name().startswith("VLLM::Worker")]
    rows = []
    for in_flight in args.in_flight:
        rows.append(await measure(JudgeClient(app.handle(), cfg), workers, texts, in_flight, args))
        print("  ".join(f"{column} {cell}" for column, cell in zip(COLUMNS, cells(rows[-1]), strict=True)), flush=True)
    return rows


async def measure(
    client: JudgeClient, workers: list[psutil.Process], texts: Iterator[str], in_flight: int, args: argparse.Namespace
) -> dict[str, Any]:
    calls: list[tuple[float, float]] = []
    answered_once: set[int] = set()
    all_going, closed = asyncio.Event(), asyncio.Event()
    per_call = args.texts * len(EXPLANATIONS)

    async def loop(number: int) -> None:
        while not closed.is_set():
            pairs = [(text, each) for text in itertools.islice(texts, args.texts) for each in EXPLANATIONS]
            if len(pairs) < per_call:
                raise SystemExit("the corpus has no more texts; ask for fewer seconds")
            began = time.monotonic()
            verdicts = await client.score(pairs, "likelihood")
            if None in verdicts:
                raise SystemExit(f"a verdict is missing: {client.last_error}")
            calls.append((began, time.monotonic()))
            answered_once.add(number)
            if len(answered_once) == in_flight:
                all_going.set()

    # The explanations' priors are asked for once and are no part of the loop.
    await client.score([("", each) for each in EXPLANATIONS], "likelihood")
    tasks = [asyncio.ensure_future(loop(number)) for number in range(in_flight)]
    waiting = asyncio.ensure_future(all_going.wait())
    await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    if not all_going.is_set():
        waiting.cancel()
        await asyncio.gather(*tasks)
    opens, cpu = time.monotonic(), cpu_seconds(workers)
    await asyncio.sleep(args.seconds)
    closes, spent = time.monotonic(), cpu_seconds(workers) - cpu
    had_requests, executing = client.busy.value, client.busy.stepping
    closed.set()
    await asyncio.gather(*tasks)
    inside = sum(max(0.0, min(end, closes) - max(began, opens)) / (end - began) for began, end in calls)
    counters, done = client.counters, len(calls) * per_call
    return {
        "calls_in_flight": in_flight,
        "verdicts_per_s": inside * per_call / (closes - opens),
        "seconds_per_call": sum(end - began for began, end in calls) / len(calls),
        "had_requests": had_requests,
        "executing": executing,
        "worker_cpu": spent / (closes - opens),
        "tokens_per_verdict": counters.prompt_tokens / done,
        "cached_share": counters.cached_tokens / counters.prompt_tokens,
        "retries": counters.retries,
    }


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def cells(row: dict[str, Any]) -> list[str]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    return [
        str(row["calls_in_flight"]),
        f"{row['verdicts_per_s']:.1f}",
        f"{row['seconds_per_call']:.1f}",
        share(row["had_requests"]),
        share(row["executing"]),
        f"{row['worker_cpu']:.2f}",
        f"{row['tokens_per_verdict']:.0f}",
        share(row["cached_share"]),
    ]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
