"""Our BatchTopK and Matryoshka against SAELens's on SAELens's synthetic world, where the true features are known.

    .venv/bin/python benchmarks/synthetic.py [--steps 4000] [--seeds 0 1 2] [--only ours saelens] [--out FILE.json]

The world (RESEARCH.md section 1): 1024 features in 128 dimensions, 64 trees of branching 4 and depth 2, mutually
exclusive, children scaled by their parents, Zipf 0.5, low-rank correlation. Every SAE has 256 latents. All SAEs
of a seed train in lockstep on the same batches, each by its own library's training step; all are measured
by SAELens's `eval_sae_on_synthetic_data` on the same held-out samples, gated as they would be deployed, by one
threshold. Runs in the `saelens` environment of `peer_envs.py`, and goes there by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_envs import REPO, default_dir, python_of
from rich.console import Console
from rich.table import Table

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

D_IN, D_SAE, N_FEATURES = 128, 256, 1024
BATCH, LR, DECAY = 1024, 2e-3, 0.2
BETAS = (0.9, 0.99)  # ours; 0.999 remembers the large gradients of the start for longer than these runs last
GROUPS = (1 / 8, 1 / 4, 1 / 2, 1.0)
TOLERANCE = 0.01
METRICS = ("L0", "EV", "F1", "MCC", "precision", "recall", "dead")


# What RESEARCH.md's figures were made with (credit_prototype.py).
TABLE_RECIPE: dict[str, Any] = {
    "sae.input_norm": "none",
    "sae.b_dec_init": "zero",
    "sae.aux_k": 0,
    "trainer.lr": 1e-3,
    "trainer.betas": (0.9, 0.999),
    "trainer.grad_clip": 0,
}


class Task(NamedTuple):
    """One row of the table: an architecture at a k, and what RESEARCH.md reports for it."""

    name: str
    architecture: str
    k: int
    reference: dict[str, float]


TASKS = (
    Task("BatchTopK k=4", "batchtopk", 4, {"L0": 4.0, "EV": 0.663, "F1": 0.693, "MCC": 0.776}),
    Task("BatchTopK k=8", "batchtopk", 8, {"L0": 8.1, "EV": 0.755, "F1": 0.706, "MCC": 0.764}),
    Task("Matryoshka k=8", "matryoshka", 8, {"L0": 8.0, "EV": 0.726, "F1": 0.824, "MCC": 0.860}),
)


class Trainee(NamedTuple):
    """An SAE in training: how it takes a batch, and what of it is measured at the end."""

    step: Callable[[torch.Tensor], None]
    finish: Callable[[], Any]  # with W_dec, encode, decode, eval: what SAELens's evaluation calls


# ---------------------------------------------------------------------- the world, from SAELens


def make_world(seed: int = 0) -> Any:
    """The SyntheticModel that RESEARCH.md's figures are of."""
    from sae_lens import synthetic as world

    with contextlib.redirect_stderr(io.StringIO()):  # two hundred lines of progress
        return world.SyntheticModel(_world_config(world, seed))


def _world_config(world: Any, seed: int) -> Any:
    return world.SyntheticModelConfig(
        num_features=N_FEATURES,
        hidden_dim=D_IN,
        firing_probability=world.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=world.HierarchyConfig(
            total_root_nodes=64,
            branching_factor=4,
            max_depth=2,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=world.OrthogonalizationConfig(num_steps=200, lr=0.01),
        correlation=world.LowRankCorrelationConfig(rank=8, correlation_scale=0.1, seed=seed),
        mean_firing_magnitudes=2.0,
        std_firing_magnitudes=0.5,
        seed=seed,
    )


def measure(sae: Any, world: Any, samples: int) -> dict[str, float]:
    """SAELens's own metrics on samples that depend on nothing but their number."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    with torch.random.fork_rng():
        torch.manual_seed(4242)
        result = eval_sae_on_synthetic_data(
            sae, world.feature_dict, world.activation_generator, num_samples=samples, batch_size=4096
        )
    return {
        "L0": result.sae_l0,
        "EV": result.explained_variance,
        "F1": result.classification.f1_score,
        "MCC": result.mcc,
        "precision": result.classification.precision,
        "recall": result.classification.recall,
        "dead": float(result.dead_latents),
    }


# ---------------------------------------------------------------------- ours


def ours(
    task: Task,
    first_batch: torch.Tensor,
    steps: int,
    seed: int,
    overrides: dict[str, Any],
    start_MD: torch.Tensor | None = None,
) -> Trainee:
    """Our trainer on one process.

    Args:
        overrides: "sae.KEY" and "trainer.KEY" values, to try other settings.
        start_MD: rows that the encoder and the decoder start from, instead of our own.
    """
    sae: dict[str, Any] = {
        "architecture": task.architecture,
        "d_sae": D_SAE,
        "k": task.k,
        "groups": list(GROUPS),
        "dead_after_tokens": 100 * BATCH,
    }
    trainer: dict[str, Any] = {
        "steps": steps,
        "batch_tokens": BATCH,
        "lr": LR,
        "betas": BETAS,
        "lr_final": 0.0,
        "decay_fraction": DECAY,
        "warmup_steps": 0,
    }
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        {"sae": sae, "trainer": trainer}[section][name] = value
    machine = ShardedTrainer(SAEConfig(**sae), TrainerConfig(**trainer), D_IN, seed, Collectives(Mesh.alone()))
    machine.initialise(first_batch)
    if start_MD is not None:
        machine.W_enc_mD.copy_(start_MD)
        machine.W_dec_mD.copy_(start_MD)

    def step(x_BD: torch.Tensor) -> None:
        machine.step(x_BD, len(x_BD))

    def finish() -> AsSAELens:
        # What a checkpoint of this trainer would be read back as.
        manifest = {"architecture": task.architecture, "k": task.k, "input_scale": machine.input_scale}
        return AsSAELens(TrainedSAE.from_checkpoint(machine.state(), {**manifest, **machine.meta()}))

    return Trainee(step, finish)


def table_start() -> torch.Tensor:
    """The rows that RESEARCH.md's SAEs started from, [M, D]: the first normals of seed 0, which are also what the
    seed-0 world drew its features from. Row i has cosine .97 with feature i before any training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1)


class AsSAELens:
    """Our SAE under the names that SAELens's evaluation calls."""

    def __init__(self, sae: TrainedSAE):
        self.sae = sae
        self.W_dec = sae.W_dec_MD

    def eval(self) -> AsSAELens:
        return self

    def encode(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.sae.encode(x_BD)

    def decode(self, f_BM: torch.Tensor) -> torch.Tensor:
        return self.sae.decode(f_BM)


# ---------------------------------------------------------------------- theirs


def theirs(task: Task, world: Any, steps: int, seed: int, lr: float) -> Trainee:
    """SAELens's trainer at the same widths, k, batches and learning rate schedule; the rest is its default."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens import MatryoshkaBatchTopKTrainingSAE as Nested
    from sae_lens import MatryoshkaBatchTopKTrainingSAEConfig as NestedConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.synthetic import SyntheticActivationIterator
    from sae_lens.training.sae_trainer import SAETrainer

    with torch.random.fork_rng():
        # Never the world's seed: its features are the first normals drawn from it (see the README).
        torch.manual_seed(3000 + seed)
        if task.architecture == "matryoshka":
            widths = [int(share * D_SAE) for share in GROUPS]
            sae = Nested(NestedConfig(d_in=D_IN, d_sae=D_SAE, k=task.k, matryoshka_widths=widths))
        else:
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=task.k))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * BATCH,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=int(DECAY * steps),
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=1000,
    )
    unused = SyntheticActivationIterator(world.feature_dict, world.activation_generator, BATCH)
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=unused)

    def step(x_BD: torch.Tensor) -> None:
        trainer.step(x_BD)
        trainer.n_training_steps += 1

    def finish() -> Any:
        from tempfile import TemporaryDirectory

        from sae_lens import SAE

        with TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            return SAE.load_from_disk(folder)

    return Trainee(step, finish)


# ---------------------------------------------------------------------- the run


def run_seed(world: Any, args: argparse.Namespace, seed: int, console: Console) -> dict[str, dict[str, float]]:
    """Trains every SAE of a seed in lockstep. Returns metrics by "side: task"."""
    torch.manual_seed(1000 + seed)
    first = world.sample(16 * BATCH)
    trainees: dict[str, Trainee] = {}
    for task in TASKS:
        if args.tasks and not any(word.lower() in task.name.lower() for word in args.tasks):
            continue
        if "ours" in args.only:
            trainees[f"ours: {task.name}"] = ours(task, first, args.steps, seed, args.set)
        if "table-start" in args.only:
            trainees[f"ours, the table's start and recipe: {task.name}"] = ours(
                task, first, args.steps, seed, TABLE_RECIPE, table_start()
            )
        if "saelens" in args.only:
            for lr in args.peer_lr:
                trainees[f"saelens lr {lr:g}: {task.name}"] = theirs(task, world, args.steps, seed, lr)
    seconds = dict.fromkeys(trainees, 0.0)
    torch.manual_seed(2000 + seed)
    for done in range(args.steps):
        if done and done % 1000 == 0:
            console.print(f"seed {seed}  step {done} of {args.steps}", style="dim")
        x_BD = world.sample(BATCH)
        for name, trainee in trainees.items():
            began = time.perf_counter()
            with torch.random.fork_rng():  # whoever draws numbers must not change the others' samples
                trainee.step(x_BD)
            seconds[name] += time.perf_counter() - began
    rows = {}
    for name, trainee in trainees.items():
        rows[name] = {**measure(trainee.finish(), world, args.samples), "seconds": seconds[name]}
        console.print(f"seed {seed}  {name}: " + "  ".join(f"{k} {rows[name][k]:.3f}" for k in METRICS))
    return rows


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over seeds."""
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def verdict(ours_row: dict[str, float], reference: dict[str, float]) -> dict[str, float]:
    """By how much ours is above the reference, per metric; below -TOLERANCE is a miss."""
    return {key: ours_row[key] - reference[key] for key in ("EV", "F1", "MCC")}


def table_of(means: dict[str, dict[str, float]], steps: int, seeds: int) -> tuple[Table, str]:
    """A rich table and the same in Markdown."""
    headers = ["SAE", "L0", "EV", "F1", "MCC", "precision", "recall", "dead", "worst margin to RESEARCH.md"]
    table = Table(title=f"SyntheticModel, {D_SAE} latents, {steps} steps of {BATCH}, mean of {seeds} seed(s)")
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left")

    def add(name: str, row: dict[str, float], note: str) -> None:
        cells = [name] + [f"{row[key]:.3f}" if key in row else "" for key in METRICS[:-1]]
        cells += [f"{row['dead']:.0f}" if "dead" in row else "", note]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")

    for task in TASKS:
        own = [name for name in means if name.endswith(task.name)]
        if not own:
            continue
        add(f"RESEARCH.md: {task.name}", task.reference, "")
        for name in own:
            margins = verdict(means[name], task.reference)
            worst = min(margins, key=lambda key: margins[key])
            miss = "" if margins[worst] >= -TOLERANCE else "  below"
            add(name, means[name], f"{worst} {margins[worst]:+.3f}{miss}")
        table.add_section()
    return table, "\n".join(lines)


def _assignment(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality on SAELens's synthetic world.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=40_000, help="held-out samples that metrics are of")
    parser.add_argument("--only", nargs="+", choices=("ours", "saelens", "table-start"), default=["ours", "saelens"])
    parser.add_argument("--tasks", nargs="+", help="only rows whose name has one of these words")
    parser.add_argument(
        "--peer-lr", type=float, nargs="+", default=[1e-3, LR], help="learning rates of SAELens's trainer"
    )
    parser.add_argument("--set", type=_assignment, nargs="+", default=[], help="ours: sae.KEY=JSON or trainer.KEY=JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--envs", type=Path, default=default_dir(), help="where peer_envs.py made the environments")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec("sae_lens") is None:
        python = python_of("saelens", args.envs.expanduser().resolve())
        os.execve(python, [str(python), *sys.argv], {**os.environ, "PYTHONPATH": str(REPO)})
    args.set = dict(args.set)
    torch.set_num_threads(args.threads)
    console = Console(width=150)
    world = make_world()
    by_seed = [run_seed(world, args, seed, console) for seed in args.seeds]
    means = {name: summarise([rows[name] for rows in by_seed]) for name in by_seed[0]}
    table, markdown = table_of(means, args.steps, len(args.seeds))
    console.print(table)
    print(markdown)
    if args.out:
        record = {"steps": args.steps, "seeds": args.seeds, "set": args.set, "by_seed": by_seed, "mean": means}
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
