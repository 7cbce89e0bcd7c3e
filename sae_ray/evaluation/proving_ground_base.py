"""What the cells of the bake-off share: a world with its samples, and SAEs pretrained on it, kept in files.

Suffixes: B batch, N evaluation samples, T pool samples, F features, D d_in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.evaluation.proving_ground_evidence import Pool
from sae_ray.evaluation.synthetic import Firings, World
from sae_ray.evaluation.synthetic_metrics import Truth
from sae_ray.evaluation.synthetic_worlds import preset
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

BATCH = 1024
POOL_BYTES = 2**27  # of training activations that are kept and gone through again; metrics are on others
MIN_BATCHES = 128  # that are kept however large they are
EVIDENCE_BYTES = 2**27  # of evidence pools that are kept for the next cell
GROUPS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # matryoshka's prefixes


def digest(record: dict[str, Any]) -> str:
    """A short name for a set of settings."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Base:
    """A pretrained SAE; cells that share it share its file."""

    world: str = "research"
    seed: int = 0
    architecture: str = "batchtopk"
    k: int = 4
    steps: int = 4000
    lr: float = 2e-3

    @property
    def key(self) -> str:
        return f"{self.world}-{self.architecture}-k{self.k}-seed{self.seed}-" + digest(asdict(self))


class Ground:
    """A world at a seed with everything that its cells share: training batches, evidence pools, held-out samples."""

    def __init__(self, world: str, seed: int, samples: int = 20_000):
        self.world = World.of(world, seed)
        self.seed = seed
        generator = torch.Generator().manual_seed(900_001 + seed)
        firings = self.world.fire(samples, generator)
        self.truth = Truth(
            self.world.activations(firings),
            self.world.shown(firings),
            self.world.directions_FD,
            self.world.forest,
        )
        self._batches: list[tuple[torch.Tensor, Firings]] = []
        self._stream = torch.Generator().manual_seed(100_003 + seed)
        self._pools: dict[tuple[int, int], Pool] = {}
        self._n_batches = max(MIN_BATCHES, POOL_BYTES // (4 * BATCH * self.world.spec.d_in))

    def batch(self, step: int) -> tuple[torch.Tensor, Firings]:
        """Activations [B, D] of a fine-tuning step, the same for every cell, and what fires in them."""
        while len(self._batches) <= min(step, self._n_batches - 1):
            firings = self.world.fire(BATCH, self._stream)
            self._batches.append((self.world.activations(firings), firings))
        return self._batches[step % self._n_batches]

    def pool(self, samples: int, round_index: int) -> Pool:
        """Fresh samples for the evidence of a round, the same for every cell."""
        kept = self._pools.get((samples, round_index))
        if kept is not None:
            return kept
        generator = torch.Generator().manual_seed(500_009 + 101 * self.seed + round_index)
        firings = self.world.fire(samples, generator)
        pool = Pool(self.world.activations(firings), self.world.shown(firings))
        if sum(each.nbytes for each in (*self._pools.values(), pool)) <= EVIDENCE_BYTES:
            self._pools[samples, round_index] = pool
        return pool


# ---------------------------------------------------------------------- the base


def pretrained(base: Base, ground: Ground, cache: Path) -> ShardedTrainer:
    """The trained base, from `cache` if an earlier call (of any process) has trained it."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{base.key}.safetensors"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            trainer = pretrain(base, ground)
            weights = {name: tensor.contiguous() for name, tensor in without_moments(trainer).items()}
            save_file(weights, f"{file}.part", {"meta": json.dumps(trainer.meta())})
            Path(f"{file}.part").rename(file)
    return _load(base, file, make_trainer(base, base.k, base.steps, base.lr, ground.world.spec.d_in))


def pretrain(base: Base, ground: Ground) -> ShardedTrainer:
    """Reconstruction only, on samples that are never repeated."""
    stream = torch.Generator().manual_seed(300_007 + base.seed)
    trainer = make_trainer(base, base.k, base.steps, base.lr, ground.world.spec.d_in)
    trainer.initialise(ground.world.activations(ground.world.fire(16 * BATCH, stream)))
    for _ in range(base.steps):
        trainer.step(ground.world.activations(ground.world.fire(BATCH, stream)), BATCH)
    return trainer


def make_trainer(base: Base, k: int, steps: int, lr: float, d_in: int) -> ShardedTrainer:
    """An untrained SAE of the base's kind, to be trained for `steps` at `k`."""
    sae = SAEConfig(
        architecture=base.architecture,
        d_sae=preset(base.world).d_sae,
        k=k,
        groups=list(GROUPS),
        dead_after_tokens=100 * BATCH,
    )
    trainer = TrainerConfig(
        steps=steps, batch_tokens=BATCH, lr=lr, betas=(0.9, 0.99), lr_final=0.0, decay_fraction=0.2, warmup_steps=0
    )
    return ShardedTrainer(sae, trainer, d_in, base.seed, Collectives(Mesh.alone()))


def without_moments(trainer: ShardedTrainer) -> dict[str, torch.Tensor]:
    """Its state without the optimiser's."""
    return {name: tensor for name, tensor in trainer.state().items() if not name.startswith("adam.")}


def _load(base: Base, file: Path, into: ShardedTrainer) -> ShardedTrainer:
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
    into.load_state(load_file(file), {**meta, "steps_done": 0})
    return into
