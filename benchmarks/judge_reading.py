"""What a verdict costs, by the way it is read from vLLM: CPU seconds and tokens of each way, side by side.

    python benchmarks/judge_reading.py [--texts 16] [--explanations 8] [--dtype auto]

Ways: the pool's own (`reading.Reader`: the text's KV from the prefix cache, log-probabilities of the explanation's
tokens only), the same without reading the cache (what vLLM does when asked for prompt log-probabilities, and what its
OpenAI-compatible server does), and one output token after the cached text (a yes/no verdict). Seconds are the CPU time
of the engine's processes: on a busy machine wall time says little. Forced decoding by structured choice is left out:
its log-probabilities are those after the mask, so they read nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from sae_ray.config import JudgeConfig
from sae_ray.corpus.installed_docs import installed_docs
from sae_ray.embedded import resolve_model
from sae_ray.judge.deploy import engine_kwargs, replica_env
from sae_ray.judge.prompts import Mode
from sae_ray.judge.reading import Reader

TEXT_TOKENS = 93
EXPLANATIONS = [
    *("file paths", "HTTP requests and responses", "matrix multiplication", "unit tests and assertions"),
    *("dates and times", "threads and locks", "random numbers", "error messages", "colours of a plot"),
    *("command line options", "database queries", "string formatting"),
]


class Engine:
    """`reading.Engine` over vLLM; `cached=False` turns reading the prefix cache off, whatever is asked."""

    def __init__(self, client: Any, cached: bool) -> None:
        self._client, self._cached = client, cached

    async def run(self, prompt_ids: Sequence[int], **sampling: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not self._cached:
            sampling["skip_reading_prefix_cache"] = True
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        last = None
        prompt = {"prompt_token_ids": list(prompt_ids)}
        async for output in self._client.generate(prompt, params, uuid.uuid4().hex):
            last = output
        return last


@dataclass
class Cost:
    way: str
    verdicts: int
    cpu_s: float
    wall_s: float
    usage: dict[str, int]
    values: list[float]


def cpu_seconds() -> float:
    """Of this process and everything below it: the engine and its worker."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


async def measure(way: str, client: Any, cached: bool, mode: Mode, texts: list[str], explanations: list[str]) -> Cost:
    await client.reset_prefix_cache()
    config = client.vllm_config
    tokenizer = client.get_tokenizer()
    reader = Reader(
        engine=Engine(client, cached),
        tokenizer=tokenizer,
        block_size=config.cache_config.block_size,
        max_tokens=config.model_config.max_model_len,
    )
    cpu, wall = cpu_seconds(), time.monotonic()
    answers = await asyncio.gather(*(reader.read(text, explanations, mode) for text in texts))
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - wall
    values = [reading.value for answer in answers for reading in answer if reading is not None]
    return Cost(way, len(values), cpu, wall, asdict(reader.usage), values)


async def main(texts: int, explanations: int, dtype: str) -> list[Cost]:
    cfg = JudgeConfig(dtype=dtype, kv_cache_gb=0.5)
    os.environ.update(replica_env(cfg))
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from sae_ray.judge.server import cpu_dtype

    arguments = engine_kwargs(cfg) | {"model": resolve_model(cfg.model)}
    if dtype == "auto":
        arguments["dtype"] = cpu_dtype()
    client = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        tokenizer = client.get_tokenizer()
        cut = [tokenizer.encode(document)[:TEXT_TOKENS] for document in installed_docs()[: 20 * texts]]
        read = [tokenizer.decode(ids) for ids in cut if len(ids) == TEXT_TOKENS][:texts]
        phrases = EXPLANATIONS[:explanations]
        ways: list[tuple[str, bool, Mode]] = [
            ("likelihood, text cached (the pool's)", True, "likelihood"),
            ("likelihood, cache not read", False, "likelihood"),
            ("one output token, text cached", True, "yes_no"),
        ]
        await measure("warm-up", client, True, "likelihood", read[:2], phrases)
        # Each way twice, in turns: the lower of two is less disturbed by what else runs.
        costs = [await measure(way, client, cached, mode, read, phrases) for way, cached, mode in ways * 2]
    finally:
        client.shutdown()
    best = [min(costs[i], costs[i + len(ways)], key=lambda cost: cost.cpu_s) for i in range(len(ways))]
    difference = max(abs(a - b) for a, b in zip(best[0].values, best[1].values, strict=True))
    show(best, difference, arguments["dtype"], len(read))
    return best


def show(costs: list[Cost], difference: float, dtype: str, texts: int) -> None:
    table = Table(title=f"{costs[0].verdicts} readings of {texts} texts of {TEXT_TOKENS} tokens, {dtype}")
    for column in ("way", "CPU s", "CPU ms/reading", "wall s", "prompt tokens", "cached", "uncached/reading", "output"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for cost in costs:
        used = cost.usage
        uncached = (used["prompt_tokens"] - used["cached_tokens"]) / cost.verdicts
        numbers = (f"{cost.cpu_s:.2f}", f"{1000 * cost.cpu_s / cost.verdicts:.1f}", f"{cost.wall_s:.2f}")
        tokens = (f"{used['prompt_tokens']}", f"{used['cached_tokens']}", f"{uncached:.1f}", f"{used['output_tokens']}")
        table.add_row(cost.way, *numbers, *tokens)
    Console(width=150).print(table)
    print(f"largest difference between the first two ways' numbers: {difference:.2g} nats")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--explanations", type=int, default=8, choices=range(2, len(EXPLANATIONS) + 1))
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    options = parser.parse_args()
    asyncio.run(main(options.texts, options.explanations, options.dtype))
