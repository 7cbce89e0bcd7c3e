"""The paper exercise of docs/scaling.md: a 70B subject LM, 1M latents, 64 GPUs. `simulate.py --paper` runs it.

First FLOPs and bytes of every stage (a roofline), then the best split of the GPUs by closed form, then the loop's model
on it and on what would break it. Everything that was not measured is a field of `Hardware` or `Plan`, so that a reader
who has other figures can put them in. Nothing here has been run on such a cluster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from loop_model import Loop, Outcome, Rates, simulate
from rich.console import Console
from rich.table import Table

_LOT = 64  # latents that the model judges as one, so that a million of them stay few events


@dataclass(frozen=True)
class Hardware:
    """One GPU (NVIDIA H100 SXM by its data sheet), its share of a node, and what of it is reached (assumed)."""

    gpus: int = 64
    per_node: int = 8
    flops: float = 989e12  # dense bf16
    memory: float = 80e9
    memory_rate: float = 3.35e12
    nvlink_rate: float = 450e9  # one direction
    network_rate: float = 50e9  # one direction: a 400 Gb/s port a GPU
    lm_mfu: float = 0.45
    encoder_mfu: float = 0.5
    prefill_mfu: float = 0.4
    memory_use: float = 0.6  # of memory_rate, in streaming and in gathers
    link_use: float = 0.7
    host_copy_rate: float = 8e9  # bytes copied by one thread
    object_store_rate: float = 2e9  # Ray's object store into one node, over TCP
    dollars_per_gpu_hour: float = 2.5
    replica_start_s: float = 180.0


@dataclass(frozen=True)
class Plan:
    """What is trained. The subject is a Llama of 70B parameters, the judge a dense 8B."""

    lm_params: float = 70.6e9
    lm_layers: int = 80
    vocabulary: int = 128_256
    hook_layer: int = 40
    d_in: int = 8192
    d_sae: int = 1 << 20
    k: int = 64
    context: int = 1024
    block_sequences: int = 16
    mix_blocks: int = 32
    batch_tokens: int = 65_472  # 4 blocks
    tokens: float = 2e9
    rlaif_share: float = 0.3
    rounds: int = 8
    judged: int = 1 << 20
    judge_params: float = 8e9
    uncached_tokens: int = 3_206  # per latent: `sae-ray judge` in benchmarks/README.md, 20 + 20 texts, two scorers
    output_tokens: int = 214
    decode_batch: int = 64
    trainer_threads: int = 1
    open_latents: int = 4096

    @property
    def block_tokens(self) -> int:
        return self.block_sequences * (self.context - 1)

    @property
    def steps(self) -> int:
        return round(self.tokens / self.batch_tokens)


class Split(NamedTuple):
    producers: int
    dp: int
    tp: int
    judges: int

    @property
    def trainers(self) -> int:
        return self.dp * self.tp

    def __str__(self) -> str:
        return (
            f"{self.producers} producers, {self.trainers} trainers (dp {self.dp}, tp {self.tp}), {self.judges} judges"
        )


def lm_flops(plan: Plan) -> float:
    """Per token, up to the hook layer: later layers are never computed."""
    per_layer = (plan.lm_params - 2 * plan.vocabulary * plan.d_in) / plan.lm_layers
    attention = 2 * plan.context * plan.d_in  # scores and values, half of the context on average
    return (plan.hook_layer + 1) * (2 * per_layer + attention)


def lm_bytes(plan: Plan) -> float:
    """Weights of a producer, bf16: embeddings and the layers up to the hook."""
    embeddings = plan.vocabulary * plan.d_in
    per_layer = (plan.lm_params - 2 * embeddings) / plan.lm_layers
    return 2 * (embeddings + (plan.hook_layer + 1) * per_layer)


def sae_params(plan: Plan) -> float:
    return 2 * plan.d_in * plan.d_sae + plan.d_sae + plan.d_in


def step_parts(plan: Plan, hardware: Hardware, dp: int, tp: int) -> dict[str, float]:
    """Seconds of a training step by what they go to; the ranks do one after another (see trainer/rank.py)."""
    batch, width = plan.batch_tokens, plan.d_in
    ranks, own = dp * tp, plan.batch_tokens / dp
    reached = hardware.memory_rate * hardware.memory_use
    link = (hardware.nvlink_rate if tp <= hardware.per_node else hardware.network_rate) * hardware.link_use
    # Active pairs of a shard: decoded once, and three sparse products for the gradients (over all dp ranks' tokens).
    pair_bytes = 4 * width * plan.k * (2 * own + 4 * batch) / tp
    exchanged = (dp - 1) / dp * batch * 2 * width * 4  # slopes and inputs of the other dp ranks, fp32
    return {
        "encoder GEMM": 2 * width * plan.d_sae * batch / (ranks * hardware.flops * hardware.encoder_mfu),
        "sparse products": pair_bytes / reached,
        "optimiser": 28 * sae_params(plan) / tp / reached,  # Adam: reads p, g, m, v and writes p, m, v in fp32
        "tp all-reduce": 2 * (tp - 1) / tp * own * width * 4 / link,
        "dp exchange": exchanged / (hardware.network_rate * hardware.link_use),
        # Each rank copies its rows out of the window and to its GPU.
        "host: rows": 2 * 2 * own * width / (hardware.host_copy_rate * plan.trainer_threads),
        # Every rank reads the whole window twice (finite? joined) and writes it once, however few rows it needs.
        "host: window": 3 * 2 * batch * width / (hardware.host_copy_rate * plan.trainer_threads),
        "object store": 2 * batch * width / hardware.object_store_rate,
    }


_OF_WINDOW = ("host: window", "object store")


def latent_seconds(plan: Plan, hardware: Hardware) -> float:
    """Of one judge GPU at saturation."""
    prefill = plan.uncached_tokens * 2 * plan.judge_params / (hardware.flops * hardware.prefill_mfu)
    per_token = 2 * plan.judge_params / (hardware.memory_rate * hardware.memory_use)
    return prefill + plan.output_tokens * per_token / plan.decode_batch


def model_of(plan: Plan, hardware: Hardware, split: Split, window_blocks: int | None = None) -> tuple[Loop, Rates]:
    """The loop and its rates for a split of the GPUs."""
    parts = step_parts(plan, hardware, split.dp, split.tp)
    rlaif_steps = round(plan.steps * plan.rlaif_share)
    loop = Loop(
        producers=split.producers,
        steps=plan.steps - rlaif_steps,
        mix_blocks=plan.mix_blocks,
        # Two leases each, and two mixes in the trainer's hands.
        window_blocks=window_blocks or 2 * split.producers + 2 * plan.mix_blocks,
        steps_per_window=round(plan.mix_blocks * plan.block_tokens / plan.batch_tokens),
        checkpoint_every=2000,
        rlaif_steps=rlaif_steps,
        rounds=plan.rounds,
        latents=plan.judged // plan.rounds // _LOT,
        evidence_blocks=64,
        max_staleness_steps=rlaif_steps,
        min_replicas=0,
        initial_replicas=min(1, split.judges),
        max_replicas=split.judges,
        target_latents=8 / _LOT,
        open_latents=max(1, plan.open_latents // _LOT),
        downscale_delay_s=600,
    )
    on_window = sum(parts[name] for name in _OF_WINDOW)
    lot = _LOT * latent_seconds(plan, hardware)
    rates = Rates(
        block_s=plan.block_tokens * lm_flops(plan) / (hardware.flops * hardware.lm_mfu),
        step_s=sum(parts.values()) - on_window,
        window_s=on_window * loop.steps_per_window,
        latent_s=lot,
        save_s=16 * sae_params(plan) / split.tp / 25e9,  # the snapshot over PCIe; files are written meanwhile
        replica_start_s=hardware.replica_start_s,
        calibration_s=60,
        block_cv=0.05,
        latent_cv=0.3 / math.sqrt(_LOT),
    )
    return loop, rates


def splits(plan: Plan, hardware: Hardware) -> list[tuple[float, Split]]:
    """All splits whose shards fit, by their least seconds: everything that can overlap does."""
    out = []
    room = hardware.memory * 0.9
    for tp in (4, 8, 16, 32):
        for dp in (1, 2, 4):
            if dp * tp > hardware.gpus - 2 or 16 * sae_params(plan) / tp > room:
                continue
            step = sum(step_parts(plan, hardware, dp, tp).values())
            for judges in range(1, hardware.gpus - dp * tp):
                split = Split(hardware.gpus - dp * tp - judges, dp, tp, judges)
                _, rates = model_of(plan, hardware, split)
                token = max(step / plan.batch_tokens, rates.block_s / plan.block_tokens / split.producers)
                judging = plan.judged * latent_seconds(plan, hardware) / judges
                rlaif = plan.tokens * plan.rlaif_share
                out.append(((plan.tokens - rlaif) * token + max(rlaif * token, judging), split))
    return sorted(out)


def paper(console: Console, seed: int) -> dict[str, Any]:
    """Prints the exercise; returns its figures."""
    plan, now = Plan(), Hardware()
    # What the same GPUs would give if the ranks' host path and the object store did not stand in the way.
    fast = replace(now, host_copy_rate=1e12, object_store_rate=1e12)
    figures: dict[str, Any] = {"roofline": _roofline(console, plan, now)}
    for label, hardware in (("as sae_ray is", now), ("with windows fetched and mixed off the ranks' path", fast)):
        ranked = splits(plan, hardware)
        best = ranked[0][1]
        rows: list[tuple[str, Outcome]] = []
        loop, rates = model_of(plan, hardware, best)
        rows.append((f"best: {best}", simulate(loop, rates, seed)))
        few = best._replace(judges=max(1, best.judges // 2), producers=best.producers + best.judges - best.judges // 2)
        rows.append((f"half the judges: {few}", simulate(*model_of(plan, hardware, few), seed)))
        narrow = model_of(plan, hardware, best, window_blocks=2 * plan.mix_blocks)
        rows.append((f"window_blocks {2 * plan.mix_blocks}, twice mix_blocks, instead", simulate(*narrow, seed)))
        # Autoscaling aims at 8 calls a replica, and the one desk keeps no more than 8 open.
        desk = replace(loop, open_latents=1, max_replicas=1)
        rows.append(("judge.max_in_flight 8: one replica", simulate(desk, rates, seed)))
        slow = replace(loop, max_staleness_steps=60)
        rows.append(("max_staleness_steps 60, the default", simulate(slow, rates, seed)))
        _table(console, f"{plan.d_sae:,} latents on {now.gpus} GPUs, {label}", rows, plan, hardware)
        figures[label] = {
            "best": str(best),
            "closed form, s": ranked[0][0],
            "step parts, s": step_parts(plan, hardware, best.dp, best.tp),
            "runs": {name: {"seconds": run.seconds, "blame": run.blame, "bottleneck": run.bottleneck,
                            "replica_seconds": run.replica_seconds} for name, run in rows},
        }  # fmt: skip
    return figures


def _roofline(console: Console, plan: Plan, hardware: Hardware) -> dict[str, float]:
    stream = hardware.flops * hardware.lm_mfu / lm_flops(plan)
    figures = {
        "LM forward, GFLOP/token": lm_flops(plan) / 1e9,
        "producer weights, GB (of 80)": lm_bytes(plan) / 1e9,
        "tokens/s of a producer": stream,
        "activation bytes/token": 2.0 * plan.d_in,
        "SAE encoder, GFLOP/token": 2 * plan.d_in * plan.d_sae / 1e9,
        "SAE sparse products, MFLOP/token": 8 * plan.d_in * plan.k / 1e6,
        "SAE parameters, billions": sae_params(plan) / 1e9,
        "SAE with gradients and Adam, GB": 16 * sae_params(plan) / 1e9,
        "optimiser bytes/step, GB": 28 * sae_params(plan) / 1e9,
        "judge tokens/latent (uncached + output)": float(plan.uncached_tokens + plan.output_tokens),
        "judge GPU seconds/latent": latent_seconds(plan, hardware),
        "judge GPU hours for all latents": plan.judged * latent_seconds(plan, hardware) / 3600,
        "reward desk: scan of a round, GB": 12 * (64 * plan.block_tokens / 32) * (plan.judged / plan.rounds) / 1e9,
    }
    table = Table(title="FLOPs and bytes")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    console.print(table)
    parts = Table(title=f"Milliseconds of a step of {plan.batch_tokens:,} tokens")
    parts.add_column("mesh")
    meshes = ((1, 8), (1, 16), (2, 8), (2, 16), (1, 32))
    names = list(step_parts(plan, hardware, 1, 8))
    for name in [*names, "in all", "tokens/s"]:
        parts.add_column(name, justify="right")
    for dp, tp in meshes:
        found = step_parts(plan, hardware, dp, tp)
        total = sum(found.values())
        cells = [f"{found[name] * 1e3:.0f}" for name in names]
        parts.add_row(f"dp {dp}, tp {tp}", *cells, f"{total * 1e3:.0f}", f"{plan.batch_tokens / total:,.0f}")
    console.print(parts)
    return figures


def _table(console: Console, title: str, rows: list[tuple[str, Outcome]], plan: Plan, hardware: Hardware) -> None:
    table = Table(title=title)
    for heading in ("what", "hours", "steps/s", "tokens/s", "the trainer's time went to", "judges busy", "dollars"):
        table.add_column(heading, justify="left" if heading in ("what", "the trainer's time went to") else "right")
    for name, run in rows:
        blame = ", ".join(f"{who} {share:.0%}" for who, share in sorted(run.blame.items(), key=lambda x: -x[1])[:3])
        dollars = run.seconds / 3600 * hardware.gpus * hardware.dollars_per_gpu_hour
        table.add_row(
            name, f"{run.seconds / 3600:.2f}", f"{run.steps_per_s:.2f}", f"{run.steps_per_s * plan.batch_tokens:,.0f}",
            blame, f"{run.replica_busy:.0%}", f"{dollars:,.0f}",
        )  # fmt: skip
    console.print(table)
