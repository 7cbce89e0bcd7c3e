"""Our training step against each peer's own, on the same activations, sizes, dtype and threads, in one run.

    .venv/bin/python benchmarks/peer_envs.py                       once: the peers' environments
    .venv/bin/python benchmarks/trainer.py [--out FILE.json]       time and memory
    .venv/bin/python benchmarks/trainer.py --quality [--activations FILE_OR_FOLDER]      final FVU

Each contender is a process in its own environment that keeps its SAE; rounds go from one to the next and turn
the order around, so that what else the machine does falls on all of them. The floor is the one dense encoder
product, timed in the same rounds. Peers do the least that trains (forward, backward, Adam); `--peer-trainers` adds
what their own trainers do on top. AuxK is off but where it says otherwise: the peers' starts after ten million tokens.

--quality trains ours in fp32 and bf16 and sparsify in fp32, one after the other, on the same stream for the same
steps with the same learning rates, and compares FVU on batches that none was trained on.

Suffixes: N batches, B tokens of a batch, T tokens, D d_in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from batches import dense_batches, sparse_mixture, stored_batches
from peer_envs import REPO, default_dir, python_of
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from sae_ray.errors import UserError

WORKER = Path(__file__).with_name("contenders.py")
NEVER = 1_000_000_000
# name: (contender, environment or None for ours, SAEConfig values, TrainerConfig values)
BARE: dict[str, Any] = {"aux_k": 0}
UNLOGGED: dict[str, Any] = {"log_every": NEVER}


class Entry(NamedTuple):
    contender: str
    environment: str | None
    sae: dict[str, Any]
    trainer: dict[str, Any]
    warmup: int = 1


BASELINE = "ours topk fp32"
WITH_AUX = "ours topk fp32, AuxK and metrics"
IN_BF16 = "ours topk bf16 autocast"
OURS = {
    BASELINE: Entry("ours", None, {"architecture": "topk", **BARE}, UNLOGGED),
    WITH_AUX: Entry("ours", None, {"architecture": "topk", "aux_k": 64}, {"log_every": 10}, warmup=11),
    IN_BF16: Entry("ours", None, {"architecture": "topk", **BARE}, {**UNLOGGED, "autocast": "bfloat16"}),
    "ours batchtopk fp32": Entry("ours", None, {"architecture": "batchtopk", **BARE}, UNLOGGED),
}
PEERS = {
    "sparsify": Entry("sparsify", "sparsify", {}, {}),
    "dictionary_learning": Entry("dictionary_learning", "dictionary_learning", {}, {}),
    "saelens": Entry("saelens", "saelens", {}, {}),
}
PEER_TRAINERS = {
    "sparsify, as its trainer": Entry("sparsify_trainer", "sparsify", {}, {}),
    "saelens, as its trainer": Entry("saelens_trainer", "saelens", {}, {}),
}
FLOOR, FLOOR_BF16 = "encoder GEMM fp32", "encoder GEMM bf16"
FLOORS = {FLOOR: Entry("gemm_float32", None, {}, {}), FLOOR_BF16: Entry("gemm_bfloat16", None, {}, {})}
SPARSITY = {"relu_l1": {"sparsity_coef": 1e-3}, "gated": {"sparsity_coef": 1e-3}}


# ---------------------------------------------------------------------- contenders as processes


class Process:
    """A contender in its environment; answers one command at a time."""

    def __init__(self, name: str, entry: Entry, job: dict[str, Any], python: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TQDM_DISABLE": "1"}
        environment.update(HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore", PYTHONPATH=str(REPO))
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [str(python), str(WORKER), entry.contender, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            tail = self.log.read().strip().splitlines()[-6:]
            raise UserError(f"{self.name}: its process ended: " + " / ".join(tail))
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()


@contextlib.contextmanager
def processes(entries: dict[str, Entry], job: dict[str, Any], envs: Path) -> Iterator[dict[str, Process]]:
    """One process per contender, ended when the block is left."""
    out: dict[str, Process] = {}
    try:
        for name, entry in entries.items():
            python = Path(sys.executable) if entry.environment is None else python_of(entry.environment, envs)
            out[name] = Process(name, entry, {**job, "sae": entry.sae, "trainer": entry.trainer}, python)
        yield out
    finally:
        for process in out.values():
            process.close()


# ---------------------------------------------------------------------- numbers and tables (pure)


def ratio(value: float, baseline: float) -> float:
    """How many times the baseline a value is; NaN where there is none to compare with."""
    return value / baseline if baseline else math.nan


def summary(rows: dict[str, dict[str, Any]], batch: int) -> dict[str, dict[str, Any]]:
    """Medians and ratios of the raw rows: `seconds` (each step), `imports_mib`, `peak_mib`, `note`."""
    medians = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
    out = {}
    for name, row in rows.items():
        out[name] = {
            "s_per_step": medians[name],
            "fastest": min(row["seconds"]),
            "steps": len(row["seconds"]),
            "tokens_per_s": batch / medians[name],
            "times_ours": ratio(medians[name], medians.get(BASELINE, 0.0)),
            "times_floor": ratio(medians[name], medians.get(FLOOR, 0.0)),
            "step_mib": row["peak_mib"] - row["imports_mib"],
            "peak_mib": row["peak_mib"],
            "note": row.get("note", ""),
        }
    return out


def targets(size: dict[str, dict[str, Any]]) -> list[tuple[str, float, str, bool]]:
    """What the issue asks for at one size: (target, measured, bound, met). Those whose rows are there."""

    def seconds(name: str) -> float | None:
        return size[name]["s_per_step"] if name in size else None

    out = []

    def at_least(label: str, slow: str, fast: str, bound: float) -> None:
        a, b = seconds(slow), seconds(fast)
        if a is not None and b is not None:
            out.append((label, ratio(a, b), f">= {bound}", ratio(a, b) >= bound))

    at_least("sparsify / ours, fp32", "sparsify", BASELINE, 1.5)
    at_least("saelens / ours, fp32", "saelens", BASELINE, 5.0)
    at_least("sparsify fp32 / ours bf16", "sparsify", IN_BF16, 2.5)
    with_aux, without = seconds(WITH_AUX), seconds(BASELINE)
    if with_aux is not None and without is not None:
        cost = ratio(with_aux, without)
        out.append(("AuxK and metrics / without", cost, "< 1.1", cost < 1.1))
    peers = [size[name]["step_mib"] for name in PEERS if name in size]
    if peers and BASELINE in size:
        memory = ratio(size[BASELINE]["step_mib"], min(peers))
        out.append(("memory / leanest peer's", memory, "<= 1", memory <= 1))
    return out


HEADERS = (
    "contender",
    "s/step",
    "fastest",
    "tokens/s",
    "x ours",
    "x floor",
    "MiB above imports",
    "MiB in all",
    "note",
)


def cells(name: str, row: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{row['s_per_step']:.3f}",
        f"{row['fastest']:.3f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['times_ours']:.2f}",
        f"{row['times_floor']:.2f}",
        f"{row['step_mib']:,.0f}",
        f"{row['peak_mib']:,.0f}",
        row["note"],
    ]


def markdown(headers: tuple[str, ...], lines: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(headers) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(headers), align, *lines])


def rich_table(title: str, headers: tuple[str, ...], lines: list[list[str]]) -> Table:
    table = Table(title=title)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    return table


# ---------------------------------------------------------------------- runs


def race(
    entries: dict[str, Entry], job: dict[str, Any], file: Path, args: argparse.Namespace, console: Console
) -> dict[str, dict[str, Any]]:
    """Raw rows of one size: seconds of every timed step, memory, by contender."""
    rows: dict[str, dict[str, Any]] = {}
    with processes(entries, job, args.envs) as running:
        for name, process in running.items():
            process.ask("load", file=str(file))
            process.ask("step", times=max(args.warmup, entries[name].warmup))
            rows[name] = {"seconds": []}
        for turn in range(args.rounds):
            order = list(running) if turn % 2 == 0 else list(running)[::-1]
            for name in order:
                rows[name]["seconds"] += running[name].ask("step", times=args.steps_per_round)["seconds"]
            console.print(f"  round {turn + 1} of {args.rounds}: load average {os.getloadavg()[0]:.1f}", style="dim")
        for name, process in running.items():
            rows[name].update(process.ask("memory"))
    return rows


def speed(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    x_NBD = (
        stored_batches(args.activations, args.batch)[:8]
        if args.activations
        else dense_batches(2, args.batch, args.d_in)
    )
    entries = {**OURS, **{name: entry for name, entry in PEERS.items() if entry.environment in args.peers}, **FLOORS}
    # AuxK only costs while latents are dead: one that misses two batches counts as dead here.
    reviving = {**OURS[WITH_AUX].sae, "dead_after_tokens": 2 * args.batch}
    entries[WITH_AUX] = OURS[WITH_AUX]._replace(sae=reviving)
    if args.peer_trainers:
        entries.update({name: e for name, e in PEER_TRAINERS.items() if e.environment in args.peers})
    for name in args.architectures:
        sae = {"architecture": name, **BARE, **SPARSITY.get(name, {})}
        entries[f"ours {name} fp32"] = Entry("ours", None, sae, UNLOGGED)
    if args.ours:
        entries = {n: e for n, e in entries.items() if e.contender != "ours" or any(word in n for word in args.ours)}
    record: dict[str, Any] = {"machine": machine(args.threads), "settings": settings(args, x_NBD), "sizes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "activations.safetensors"
        save_file({"x_NBD": x_NBD.contiguous()}, file)
        for d_sae in args.sizes:
            console.print(f"d_sae {d_sae}: {len(entries)} contenders")
            job = job_of(args, x_NBD.shape[-1], d_sae, NEVER)
            size = summary(race(entries, job, file, args, console), args.batch)
            record["sizes"][str(d_sae)] = {"rows": size, "targets": targets(size)}
            title = f"d_in {x_NBD.shape[-1]}, d_sae {d_sae}, k {args.k}, batch {args.batch}, {args.threads} threads"
            lines = [cells(name, row) for name, row in size.items()]
            console.print(rich_table(title, HEADERS, lines))
            aims = [[t, f"{value:.2f}", bound, "yes" if met else "NO"] for t, value, bound, met in targets(size)]
            names = ("target", "measured", "bound", "met")
            console.print(rich_table(f"targets at d_sae {d_sae}", names, aims))
            print(f"\n{title}\n\n{markdown(HEADERS, lines)}\n\n{markdown(names, aims)}\n", flush=True)
    return record


def quality(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    held_out = args.held_out
    if args.activations:
        x_NBD = stored_batches(args.activations, args.batch)
        if len(x_NBD) <= held_out:
            raise UserError(f"--activations {args.activations}: {len(x_NBD)} batches, {held_out} of them held out")
    else:
        x_NBD = sparse_mixture(min(args.steps, args.fresh) + held_out, args.batch, args.d_in)
    # Their encoders start with rows of norm 1/sqrt(3), ours with 1: runs this short show it.
    entries = {
        BASELINE: started_like_sparsify(OURS[BASELINE]),
        IN_BF16: started_like_sparsify(OURS[IN_BF16]),
        "ours topk fp32, encoder rows of norm 1": OURS[BASELINE],
        "sparsify": Entry("sparsify_trainer", "sparsify", {}, {}),
    }
    record: dict[str, Any] = {"machine": machine(args.threads), "settings": settings(args, x_NBD), "sizes": {}}
    headers = ("contender", "final FVU", "x ours fp32", "minutes")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "activations.safetensors"
        save_file({"x_NBD": x_NBD.contiguous()}, file)
        for d_sae in args.sizes:
            job = job_of(args, x_NBD.shape[-1], d_sae, args.steps)
            rows: dict[str, dict[str, Any]] = {}
            for name, entry in entries.items():  # one after the other: each needs both cores for minutes
                with processes({name: entry}, job, args.envs) as running:
                    running[name].ask("load", file=str(file))
                    rows[name] = running[name].ask("train", steps=args.steps, held_out=held_out)
                console.print(f"  {name}: FVU {rows[name]['fvu']:.5f}", style="dim")
            for row in rows.values():
                row["times_ours"] = ratio(row["fvu"], rows[BASELINE]["fvu"])
            lines = [
                [name, f"{row['fvu']:.5f}", f"{row['times_ours']:.4f}", f"{row['seconds'] / 60:.1f}"]
                for name, row in rows.items()
            ]
            title = f"d_sae {d_sae}, k {args.k}, {args.steps} steps of {args.batch}, lr {args.lr:g}"
            console.print(rich_table(title, headers, lines))
            print(f"\n{title}\n\n{markdown(headers, lines)}\n", flush=True)
            record["sizes"][str(d_sae)] = {"rows": rows}
    return record


def started_like_sparsify(entry: Entry) -> Entry:
    return entry._replace(sae={**entry.sae, "init_norm": 3**-0.5})


def job_of(args: argparse.Namespace, d_in: int, d_sae: int, steps: int) -> dict[str, Any]:
    job = {"d_in": d_in, "d_sae": d_sae, "k": args.k, "batch": args.batch, "threads": args.threads}
    return {**job, "lr": args.lr, "steps": steps}


def settings(args: argparse.Namespace, x_NBD: torch.Tensor) -> dict[str, Any]:
    """What was measured, without this machine's paths."""
    kept = ("k", "batch", "threads", "rounds", "steps_per_round", "warmup", "lr", "steps", "held_out")
    source = "stored" if args.activations else "generated"
    return {name: getattr(args, name) for name in kept} | {"activations": source, "batches": len(x_NBD)}


def machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "load_average_at_start": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Our training step against the peers'.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[9216, 36864], help="d_sae")
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps-per-round", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps of each contender")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--peer-trainers", action="store_true", help="also the peers' whole trainers")
    parser.add_argument("--ours", nargs="*", help="only variants of ours whose name has one of these words")
    parser.add_argument(
        "--architectures", nargs="*", default=[], help="more of ours: matryoshka jumprelu gated relu_l1"
    )
    parser.add_argument("--activations", type=Path, help="safetensors file or folder to take tokens from")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--quality", action="store_true", help="final FVU instead of time")
    parser.add_argument("--steps", type=int, default=300, help="quality: training steps")
    parser.add_argument("--held-out", type=int, default=4, help="quality: batches nothing is trained on")
    parser.add_argument("--fresh", type=int, default=300, help="quality: generated batches before they repeat")
    parser.add_argument("--envs", type=Path, default=default_dir(), help="where peer_envs.py made the environments")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    args = parser.parse_args()
    args.envs = args.envs.expanduser().resolve()
    console = Console(width=150)
    try:
        record = quality(args, console) if args.quality else speed(args, console)
    except UserError as error:
        sys.exit(str(error))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
