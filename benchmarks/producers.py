"""Producers against a bare truncated transformers forward of the same batches, in one run.

    .venv/bin/python benchmarks/producers.py jobs/quickstart.yaml [--blocks 12] [--rounds 3]

Ours is the whole path through Ray: read, tokenize, forward, mask, object store, controller. The bare side is
a plain `AutoModel` cut after the hook layer, called on the same token batches by as many actors with as many
threads. Rounds alternate; the table gives medians and their ratio (1 means that the path costs nothing).
"""

from __future__ import annotations

import argparse
import statistics
import time

import ray
import torch
from rich.console import Console
from rich.table import Table

from sae_ray.activations.hooks import native_dtype
from sae_ray.activations.stream import BlockStream
from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.corpus import BlockReader
from sae_ray.embedded import resolve_model
from sae_ray.session import ray_session


class Bare:
    """The forward pass and nothing else."""

    def __init__(self, config: RunConfig):
        from transformers import AutoConfig, AutoModel

        torch.set_num_threads(config.activations.threads)
        source = resolve_model(config.model.name)
        model_config = AutoConfig.from_pretrained(source)
        model_config.num_hidden_layers = 1 + max(hook.layer for hook in config.hooks)
        dtype = native_dtype(config.model.dtype, torch.device("cpu"))
        self.model = AutoModel.from_pretrained(source, config=model_config, dtype=dtype).eval()

    def run(self, batches: list[torch.Tensor]) -> int:
        with torch.inference_mode():
            for tokens_SL in batches:
                self.model(input_ids=tokens_SL.clamp(min=0).long(), use_cache=False)
        return sum(tokens.numel() for tokens in batches)


def ours(stream: BlockStream, first: int, blocks: int) -> float:
    """Sequence tokens per second of `blocks` evidence blocks, wall time."""
    ids = list(range(first, first + blocks))
    began = time.perf_counter()
    stream.fetch("evidence", ids)
    while not stream.fetched("evidence", ids):
        stream.pump(time.monotonic())
        for ref in ray.wait(stream.pending_refs(), timeout=1.0, fetch_local=False)[0]:
            stream.on_ready(ref, time.monotonic())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    # A window of one block: the stream must not produce train blocks beside what is measured.
    config = load_config(args.config, ["activations.mix_blocks=1", "activations.window_blocks=2"])
    reader = BlockReader(config, load_tokenizer(config.model))
    n, blocks = config.activations.most_producers, args.blocks
    per_block = config.activations.block_sequences * config.corpus.context_length
    with ray_session(config.ray):
        stream = BlockStream(config)
        stream.start()
        actors = [ray.remote(num_cpus=config.activations.cpus)(Bare).remote(config) for _ in range(n)]
        batches = [torch.from_numpy(reader.block("evidence", i).tokens_SL) for i in range(blocks)]
        ray.get([actor.run.remote(batches[:1]) for actor in actors])
        ours(stream, 0, 2 * n)  # warm-up, and the window's own two train blocks
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        for round_ in range(args.rounds):
            rates["ours"].append(blocks * per_block / ours(stream, 2 * n + round_ * blocks, blocks))
            began = time.perf_counter()
            ray.get([actor.run.remote(batches[i::n]) for i, actor in enumerate(actors)])
            rates["bare"].append(blocks * per_block / (time.perf_counter() - began))
        stream.stop()
    median = {name: statistics.median(values) for name, values in rates.items()}
    hooks = ", ".join(hook.name for hook in config.hooks)
    table = Table(title=f"{n} producers, {hooks}, {config.model.name}, {blocks} blocks, {args.rounds} rounds")
    for column in ("side", "tokens/s (median)", "all rounds", "ratio"):
        table.add_column(column)
    for name, values in rates.items():
        ratio = f"{median[name] / median['bare']:.2f}"
        table.add_row(name, f"{median[name]:,.0f}", " ".join(f"{v:,.0f}" for v in values), ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
