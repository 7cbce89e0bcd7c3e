"""Which norm the encoder's rows should start with: held-out FVU by architecture, norm and number of steps.

    python benchmarks/init_norm.py --activations ACTS.safetensors --steps 600

ACTS holds one tensor [tokens, d_in] (`sae-ray store` writes such chunks; any safetensors file with one 2-D tensor will
do). The last tenth of the tokens is held out; the others are seen in a new random order each time round, the same for
every run. Each architecture also has its own schedule end: `lr` falls to 0 over the last fifth of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

NORMS = {"1": 1.0, "1/sqrt(3)": 1 / math.sqrt(3), "1/3": 1 / 3, "0.1": 0.1}


def batches(acts_TD: torch.Tensor, size: int, steps: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(acts_TD), generator=generator)])
        yield acts_TD[order[:size]]
        order = order[size:]


def run(
    args: argparse.Namespace, architecture: str, norm: float, acts_TD: torch.Tensor, held_TD: torch.Tensor
) -> dict[str, float]:
    sae = SAEConfig(architecture=architecture, d_sae=args.d_sae, k=args.k, init_norm=norm)
    cfg = TrainerConfig(
        tp=1, batch_tokens=args.batch, lr=args.lr, lr_final=0.0, steps=args.steps, log_every=max(1, args.steps // 20)
    )
    trainer = ShardedTrainer(sae, cfg, acts_TD.shape[1], 0, Collectives(Mesh.alone()))
    trainer.initialise(acts_TD[: 4 * args.batch])
    for raw_BD in batches(acts_TD, args.batch, args.steps):
        trainer.step(raw_BD, len(raw_BD))
    trained = TrainedSAE.from_checkpoint(trainer.state(), trainer.meta())
    error = sum(float((trained.reconstruct(part) - part).square().sum()) for part in held_TD.split(1024))
    active = sum(float((trained.encode(part) > 0).sum()) for part in held_TD.split(1024))
    log = trainer.read_metrics()
    return {
        "fvu": error / float((held_TD - held_TD.mean(0)).square().sum()),
        "train_fvu": log[-1]["fvu"],
        "l0": active / len(held_TD),
        "train_l0": sum(row["l0"] for row in log[-3:]) / len(log[-3:]),
        "dead": log[-1]["dead_fraction"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", default=["batchtopk", "topk", "matryoshka", "jumprelu"])
    parser.add_argument("--norms", nargs="+", default=["1", "1/sqrt(3)", "1/3"], choices=NORMS)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 600])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    acts_TD = next(tensor for tensor in load_file(args.activations).values() if tensor.ndim == 2).float()
    cut = len(acts_TD) * 9 // 10
    found: list[dict[str, Any]] = []
    table = Table(
        "architecture",
        "steps",
        "norm",
        "held-out FVU",
        "training FVU",
        "held-out L0",
        "training L0",
        "dead",
        title="start norm",
    )
    for steps in args.steps:
        for architecture in args.architectures:
            for norm in args.norms:
                one = argparse.Namespace(**{**vars(args), "steps": steps})
                result = run(one, architecture, NORMS[norm], acts_TD[:cut], acts_TD[cut:])
                found.append({"architecture": architecture, "steps": steps, "norm": norm, **result})
                numbers = [f"{result[key]:.4f}" for key in ("fvu", "train_fvu")]
                numbers += [f"{result[key]:.1f}" for key in ("l0", "train_l0")]
                table.add_row(architecture, str(steps), norm, *numbers, f"{result['dead']:.1%}")
                print(json.dumps(found[-1]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(found, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
