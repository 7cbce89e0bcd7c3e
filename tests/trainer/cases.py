"""Small training cases that every architecture and every mesh is compared on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from reference import ReferenceSAE

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.sae import init
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

D_IN, D_OUT, BATCH, STEPS, D_SAE, SEED = 12, 9, 40, 20, 48, 7

# name: (sae section, trainer section, transcoder)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "batchtopk": ({"architecture": "batchtopk"}, {}, False),
    "topk": ({"architecture": "topk"}, {}, False),
    "topk-aux-pool": ({"architecture": "topk", "aux_pool": 5, "aux_k": 2}, {}, False),
    "topk-margin": ({"architecture": "topk", "margin": 0.3}, {}, False),
    "matryoshka": ({"architecture": "matryoshka", "groups": [0.2, 0.5, 1.0]}, {}, False),
    "jumprelu": ({"architecture": "jumprelu", "threshold_lr": 0.009}, {}, False),
    "jumprelu-hoyer": (
        {"architecture": "jumprelu", "threshold_lr": 0.009, "sparsity": "hoyer", "sparsity_coef": 0.01, "aux_k": 0},
        {"grad_clip": 0},
        False,
    ),
    "gated": ({"architecture": "gated", "sparsity_coef": 0.05}, {}, False),
    "relu-l1": ({"architecture": "relu_l1", "sparsity_coef": 0.05, "sparsity_warmup_steps": 5}, {}, False),
    **{
        f"relu-{kind}": ({"architecture": "relu_l1", "sparsity": kind, "sparsity_coef": 0.05, "aux_k": 0}, {}, False)
        for kind in ("l2", "hoyer", "p_norm", "cross")
    },
    "free-rms-adamw": (
        {"decoder_norm": "free", "input_norm": "rms", "init_norm": 0.5, "b_dec_init": "mean", "subtract_b_dec": False},
        {"optimizer": "adamw", "weight_decay": 0.01, "decay": "cosine"},
        False,
    ),
    "k-annealed": ({"k_start": 9, "k_anneal_steps": 12}, {}, False),
    "transcoder-topk": ({"architecture": "topk"}, {}, True),
    "transcoder-gated": ({"architecture": "gated", "sparsity_coef": 0.05}, {}, True),
    "transcoder-matryoshka": ({"architecture": "matryoshka", "groups": [0.3, 1.0]}, {}, True),
}


def configs(name: str) -> tuple[SAEConfig, TrainerConfig]:
    sae, trainer, _ = CASES[name]
    sae = {"d_sae": D_SAE, "k": 3, "aux_k": 4, "aux_coef": 0.5, "dead_after_tokens": 100, **sae}
    trainer = {
        "lr": 3e-3, "warmup_steps": 3, "steps": 16, "grad_clip": 0.2, "log_every": 2, "dtype": "float64", "tp": 1,
        "batch_tokens": BATCH, **trainer,
    }  # fmt: skip
    return SAEConfig(**sae), TrainerConfig(**trainer)


def batches(n: int = STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(8, D_IN, generator=generator, dtype=torch.float64)
    out = []
    for i in range(n):
        hidden = torch.randn(BATCH + i % 2, 8, generator=generator, dtype=torch.float64).relu()
        out.append(hidden @ basis + 5)  # an offset that b_dec has to learn
    return out


def target_of(raw_BD: torch.Tensor) -> torch.Tensor:
    """What a transcoder has to give, [B, D_OUT]."""
    mixing = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (raw_BD - 5).relu() @ mixing - 2


class PullUp:
    """A credit on two latents of different shards: raises their gates."""

    latents = (5, 41)

    def loss(self, x_BD, params, threshold):
        own = [i - params.first_latent for i in self.latents if 0 <= i - params.first_latent < len(params.b_enc_m)]
        if not own:
            return None
        return pull_up(x_BD, params.W_enc_mD[own], params.b_enc_m[own], params.b_dec_D)

    def state_dict(self):
        return {}


def pull_up(x_BD, W_nD, b_n, b_dec_D):
    return torch.nn.functional.softplus(-((x_BD - b_dec_D) @ W_nD.T + b_n)).mean(0).sum()


def start(mesh: Mesh, name: str) -> ShardedTrainer:
    transcodes = CASES[name][2]
    trainer = ShardedTrainer(*configs(name), D_IN, SEED, Collectives(mesh), D_OUT if transcodes else None)
    raw = batches(1)[0]
    trainer.initialise(raw, target_of(raw) if transcodes else None)
    return trainer


def sharded_run(mesh: Mesh, name: str, credit: bool = False, steps: int = STEPS) -> ShardedTrainer:
    trainer, transcodes = start(mesh, name), CASES[name][2]
    for raw in batches(steps):
        low, high = mesh.rows(len(raw))
        own = raw[low:high]
        trainer.step(own, len(raw), PullUp() if credit else None, target_of(own) if transcodes else None)
    return trainer


def reference_start(name: str) -> dict[str, torch.Tensor]:
    """The weights that the definition starts from, computed without the trainer."""
    sae, _ = configs(name)
    transcodes, raw = CASES[name][2], batches(1)[0]
    x = raw * init.input_scale(raw, sae.input_norm)
    y = target_of(raw) if transcodes else raw
    y = y * init.input_scale(y, sae.input_norm)
    rows = init.unit_rows(0, D_SAE, D_IN, SEED, torch.float64)
    out_rows = init.unit_rows(0, D_SAE, D_OUT, SEED + 1, torch.float64) if transcodes else rows
    weights = {
        "W_enc": rows * sae.init_norm,
        "W_dec": out_rows * (sae.init_norm if sae.decoder_norm == "free" else 1),
        "b_dec": init.centre(y, sae.b_dec_init),
    }
    weights["b_enc"] = torch.zeros(D_SAE, dtype=torch.float64)
    if not sae.subtract_b_dec or transcodes:
        weights["b_enc"] = -(weights["W_enc"] @ init.centre(x, sae.b_dec_init))
    if sae.architecture == "jumprelu":
        pre = (x - weights["b_dec"])[:BATCH] @ weights["W_enc"].T
        weights["theta"] = pre.flatten().sort(descending=True).values[sae.k * BATCH - 1].repeat(D_SAE)
    if sae.architecture == "gated":
        weights |= {"r_mag": torch.zeros(D_SAE).double(), "b_mag": torch.zeros(D_SAE).double()}
    return weights


@functools.cache
def reference_run(name: str, credit: bool = False) -> ReferenceSAE:
    data, (sae, cfg), transcodes = batches(), configs(name), CASES[name][2]
    scale = init.input_scale(data[0], sae.input_norm)
    out_scale = init.input_scale(target_of(data[0]), sae.input_norm) if transcodes else scale
    centred = sae.subtract_b_dec and not transcodes
    reference = ReferenceSAE(sae, cfg, reference_start(name), (scale, out_scale), centred)

    def gate_credit(x, W, b, b_dec):
        return pull_up(x, W[list(PullUp.latents)], b[list(PullUp.latents)], b_dec)

    for raw in data:
        reference.step(raw, gate_credit if credit else None, target_of(raw) if transcodes else None)
    return reference
