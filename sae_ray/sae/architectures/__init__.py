"""The SAE architectures by name. A new one is a file here and a line in `REGISTRY`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.errors import UserError
from sae_ray.sae.architectures.base import Architecture
from sae_ray.sae.architectures.batchtopk import BatchTopK, Matryoshka
from sae_ray.sae.architectures.gated import Gated
from sae_ray.sae.architectures.jumprelu import JumpReLU
from sae_ray.sae.architectures.relu import ReLU
from sae_ray.sae.architectures.topk import TopK

if TYPE_CHECKING:
    from sae_ray.config import SAEConfig

__all__ = ["REGISTRY", "Architecture", "architecture", "kind_of"]

REGISTRY: dict[str, type[Architecture]] = {
    cls.name: cls for cls in (BatchTopK, TopK, Matryoshka, JumpReLU, Gated, ReLU)
}


def architecture(cfg: SAEConfig) -> Architecture:
    """The architecture that a config names, ready to train."""
    return kind_of(cfg.architecture)(cfg)


def kind_of(name: str) -> type[Architecture]:
    """The architecture of that name.

    Raises:
        UserError: there is none.
    """
    if name not in REGISTRY:
        raise UserError(f"sae.architecture {name!r} is unknown; known: {', '.join(REGISTRY)}")
    return REGISTRY[name]
