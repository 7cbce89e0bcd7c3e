"""The learning rate, a pure function of the step."""

from __future__ import annotations

from sae_ray.config import TrainerConfig


def learning_rate(step: int, cfg: TrainerConfig) -> float:
    """Learning rate of the step after `step` completed ones.

    Linear warm-up over `warmup_steps`, constant, linear decay to `lr_final` over the last `decay_fraction` of
    the reconstruction phase, then `lr_final` (the RLAIF phase).
    """
    if step >= cfg.steps:
        return cfg.lr_final
    decay_steps = cfg.decay_fraction * cfg.steps
    rate = cfg.lr
    if decay_steps and step >= cfg.steps - decay_steps:
        left = (cfg.steps - step) / decay_steps
        rate = cfg.lr_final + (cfg.lr - cfg.lr_final) * left
    return min(rate, cfg.lr * (step + 1) / cfg.warmup_steps) if step < cfg.warmup_steps else rate
