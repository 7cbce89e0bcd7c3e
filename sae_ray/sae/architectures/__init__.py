"""The SAE architectures by name. A new one is a file here and a line in `REGISTRY`."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from sae_ray.errors import UserError
from sae_ray.sae.architectures.batchtopk import BatchTopK
from sae_ray.sae.architectures.topk import TopK
from sae_ray.sae.selection import Gate, SelectionCollectives, Shard


class Architecture(Protocol):
    """Decides which latents are active, in training and at inference. Parameters live with the trainer."""

    name: ClassVar[str]

    @property
    def k(self) -> int: ...

    def train_gate(self, pre_Bm: torch.Tensor, shard: Shard, collectives: SelectionCollectives) -> Gate:
        """Active pairs of a training batch; the gate's threshold feeds the running threshold."""
        ...

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        """Active pairs at inference: must not depend on which other tokens share the batch."""
        ...


REGISTRY: dict[str, type[BatchTopK] | type[TopK]] = {cls.name: cls for cls in (BatchTopK, TopK)}


def architecture(name: str, k: int) -> Architecture:
    """The architecture called `name` with `k` active latents per token.

    Raises:
        UserError: no such architecture.
    """
    if name not in REGISTRY:
        raise UserError(f"sae.architecture {name!r} is unknown; known: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name](k)
