"""Small SAEs of every architecture with scales, biases and thresholds that matter, and inputs that reach them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sae_ray.sae.architectures import REGISTRY
from sae_ray.sae.inference import TrainedSAE

D, M, OUT, K = 12, 40, 7, 5


def small_sae(
    architecture: str = "batchtopk",
    *,
    d_out: int | None = None,
    input_scale: float = 0.31,
    subtract_b_dec: bool = True,
    margin: float = 0.0,
) -> TrainedSAE:
    """An SAE with unit decoder rows; with `d_out` a transcoder with an output scale of its own."""
    generator = torch.Generator().manual_seed(list(REGISTRY).index(architecture))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    threshold = torch.zeros(())
    if architecture in ("topk", "batchtopk", "matryoshka"):
        threshold = torch.tensor(0.7)
    if architecture == "jumprelu":
        threshold = torch.rand(M, generator=generator)
    gated = architecture == "gated"
    return TrainedSAE(
        torch.nn.functional.normalize(normal(M, D), dim=1),
        torch.nn.functional.normalize(normal(M, d_out or D), dim=1),
        normal(M) / 9,
        normal(d_out or D),
        threshold,
        architecture,
        K,
        input_scale,
        None if d_out is None else 0.83,
        subtract_b_dec and d_out is None,
        {"r_mag": normal(M) / 3, "b_mag": normal(M) / 9} if gated else {},
        margin,
        "sqrt_d",
    )


def raw_activations(n: int = 64) -> torch.Tensor:
    return 8 * torch.randn(n, D, generator=torch.Generator().manual_seed(99))


def as_double(sae: TrainedSAE) -> TrainedSAE:
    tensors = {name: value.double() for name, value in vars(sae).items() if isinstance(value, torch.Tensor)}
    return replace(sae, **tensors, own={name: value.double() for name, value in sae.own.items()})
