"""Which process holds which tokens and which latents.

Ranks form a (dp, tp) grid, tp fastest. The ranks of one tp row see the same tokens and hold different
latents; the ranks of one dp column see different tokens and hold the same latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def share(total: int, parts: int, index: int) -> tuple[int, int]:
    """Bounds of part `index` when `total` items are cut into near-equal consecutive parts."""
    size, extra = divmod(total, parts)
    first = index * size + min(index, extra)
    return first, first + size + (index < extra)


@dataclass(frozen=True)
class Mesh:
    dp: int
    tp: int
    rank: int
    device: torch.device
    groups: DeviceMesh | None  # None: one process, no process group

    @classmethod
    def alone(cls, device: str = "cpu") -> Mesh:
        return cls(1, 1, 0, torch.device(device), None)

    @classmethod
    def connect(cls, dp: int, tp: int, device: str = "cpu") -> Mesh:
        """The mesh over an initialised default process group of dp*tp ranks."""
        place = torch.device(device)
        groups = init_device_mesh(place.type, (dp, tp), mesh_dim_names=("dp", "tp"))
        return cls(dp, tp, dist.get_rank(), place, groups)

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    def rows(self, n_tokens: int) -> tuple[int, int]:
        """Which of a batch's tokens this process trains on."""
        return share(n_tokens, self.dp, self.dp_rank)

    def latents(self, d_sae: int) -> tuple[int, int]:
        """Global ids of the latents that this process holds."""
        return share(d_sae, self.tp, self.tp_rank)
