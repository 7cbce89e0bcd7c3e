"""The SAE architectures by name. A new one is a file here and a line in `REGISTRY`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

from sae_ray.config import SAEConfig
from sae_ray.errors import UserError
from sae_ray.sae.activation import Active, Parameters, Regular, Slopes, StepContext, Target
from sae_ray.sae.architectures.batchtopk import BatchTopK, Matryoshka
from sae_ray.sae.architectures.gated import Gated
from sae_ray.sae.architectures.jumprelu import JumpReLU
from sae_ray.sae.architectures.relu import ReLU
from sae_ray.sae.architectures.topk import TopK
from sae_ray.sae.encoder import Encoder
from sae_ray.sae.selection import Gate, SelectionCollectives


class Architecture(Protocol):
    """Which latents are active and with which values, forward and backward. Parameters live with the trainer."""

    name: ClassVar[str]

    @property
    def cfg(self) -> SAEConfig: ...

    @property
    def prefixes(self) -> list[int]:
        """Numbers of latents that must each reconstruct alone; just [d_sae] but for matryoshka."""
        ...

    def new_parameters(self, m: int, dtype: torch.dtype, device: torch.device) -> Parameters: ...

    def start(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> None:
        """Sets its own parameters from the first batch, in place. Called by all ranks together."""
        ...

    def forward(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> Active: ...

    def regularise(self, active: Active, context: StepContext, target: Target) -> Regular | None:
        """Its loss besides the reconstruction's, if it has one."""
        ...

    def backward(
        self, active: Active, d_f_N: torch.Tensor, d_gate_N: torch.Tensor | None, own: Parameters, context: StepContext
    ) -> Slopes: ...

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        """Active pairs at inference: must not depend on which other tokens share the batch."""
        ...


REGISTRY: dict[str, Callable[[SAEConfig], Architecture]] = {
    cls.name: cls for cls in (BatchTopK, TopK, Matryoshka, JumpReLU, Gated, ReLU)
}


def architecture(cfg: SAEConfig) -> Architecture:
    """The architecture that a config names.

    Raises:
        UserError: no such architecture.
    """
    if cfg.architecture not in REGISTRY:
        raise UserError(f"sae.architecture {cfg.architecture!r} is unknown; known: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[cfg.architecture](cfg)
