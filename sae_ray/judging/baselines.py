"""What an SAE must beat: the language model's own activations, read by the same judges in the same way."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from sae_ray.activations.block import Block
from sae_ray.config import HookConfig, RunConfig, SAEVariant
from sae_ray.evidence.baselines import NeuronSource, Transform

MLP = "mlp"  # the variant through which the producers also give the MLP's output


def with_baseline_hooks(config: RunConfig) -> RunConfig:
    """The config with the MLP's output of the same layer among its hook points, where a baseline reads it."""
    if not any(name.startswith("mlp ") for name in config.judging.baselines):
        return config
    update = {"saes": [SAEVariant(name=MLP, hook={"layer": config.hook.layer, "site": "mlp_out"})]}
    return RunConfig.model_validate(config.model_copy(update=update).model_dump())


def baseline_sources(config: RunConfig, first: Block, densities: np.ndarray) -> list[tuple[NeuronSource, str]]:
    """The neurons of each of `judging.baselines`, calibrated on a block, and the hook point that each reads.

    Args:
        densities: one per neuron, as the SAE's latents have them, so that both are judged at equal densities.
    """
    out = []
    for name in config.judging.baselines:
        site, transform = name.split(" ")
        hook = config.hook if site == "residual" else HookConfig(layer=config.hook.layer, site="mlp_out")
        raw_TD = first.acts_TD(torch.float32, hook.name)
        n = min(len(densities), raw_TD.shape[1])
        # The same neurons under each transform.
        neurons = np.sort(np.random.default_rng(config.seed).choice(raw_TD.shape[1], size=n, replace=False))
        source = NeuronSource(neurons, cast(Transform, transform), densities[:n], site)
        out.append((source.calibrate(raw_TD), hook.name))
    return out
