"""What changes over a run, as pure functions of the number of completed steps."""

from __future__ import annotations

import math

from sae_ray.config import SAEConfig, TrainerConfig


def learning_rate(step: int, cfg: TrainerConfig) -> float:
    """Learning rate of the step after `step` completed ones.

    Linear warm-up over `warmup_steps`, constant, linear or cosine decay to `lr_final` over the last
    `decay_fraction` of the reconstruction phase, then `lr_final` (the RLAIF phase;
    with a warm-up of its own where it is the first).
    """
    if step >= cfg.steps:
        # Without a reconstruction phase the optimiser's moments are new when RLAIF begins.
        warms_up = not cfg.steps and step < cfg.warmup_steps
        return cfg.lr_final * (step + 1) / cfg.warmup_steps if warms_up else cfg.lr_final
    decay_steps = cfg.decay_fraction * cfg.steps
    rate = cfg.lr
    if decays(step, cfg):
        left = (cfg.steps - step) / decay_steps
        if cfg.decay == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        rate = cfg.lr_final + (cfg.lr - cfg.lr_final) * left
    return min(rate, cfg.lr * (step + 1) / cfg.warmup_steps) if step < cfg.warmup_steps else rate


def decays(step: int, cfg: TrainerConfig) -> bool:
    """Whether the learning rate falls, or has fallen, at the step after `step` completed ones."""
    decay_steps = cfg.decay_fraction * cfg.steps
    return step >= cfg.steps or (decay_steps > 0 and step >= cfg.steps - decay_steps)


def active_latents(step: int, sae: SAEConfig) -> int:
    """k of the step after `step` completed ones: `k_start` becomes `k` linearly over `k_anneal_steps`."""
    if sae.k_start is None or step >= sae.k_anneal_steps:
        return sae.k
    return round(sae.k_start + (sae.k - sae.k_start) * step / sae.k_anneal_steps)


def sparsity_coefficient(step: int, sae: SAEConfig) -> float:
    """Weight of the sparsity penalty of the step after `step` completed ones."""
    if step >= sae.sparsity_warmup_steps:
        return sae.sparsity_coef
    return sae.sparsity_coef * (step + 1) / sae.sparsity_warmup_steps
