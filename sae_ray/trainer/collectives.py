"""The collectives of a training step, with the bytes that each sends counted.

Sums are in place. Along an axis of size 1 every collective is free.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from sae_ray.trainer.mesh import Mesh, share


class Collectives:
    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.bytes: Counter[str] = Counter()  # payload per collective, as "sum_tp", "gather_tp", ...

    @property
    def tp_rank(self) -> int:
        return self.mesh.tp_rank

    def sum_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sum(tensor, "tp", self.mesh.tp)

    def sum_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sum(tensor, "dp", self.mesh.dp)

    def sum_mesh(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sum(tensor, None, self.mesh.dp * self.mesh.tp)

    def gather_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Same-shaped tensors of the tp row, stacked in rank order: [tp, ...]."""
        if self.mesh.tp == 1:
            return tensor[None]
        out = tensor.new_empty(self.mesh.tp, *tensor.shape)
        self._count("gather_tp", tensor)
        dist.all_gather(list(out.unbind(0)), tensor.contiguous(), group=self._group("tp"))
        return out

    def gather_mesh_ragged(self, tensor_N: torch.Tensor) -> torch.Tensor:
        """1-D tensors of any length, of all ranks, joined in rank order."""
        world = self.mesh.dp * self.mesh.tp
        if world == 1:
            return tensor_N
        length = torch.tensor([len(tensor_N)], device=tensor_N.device)
        lengths = [torch.zeros_like(length) for _ in range(world)]
        self._count("gather_mesh", length)
        dist.all_gather(lengths, length)
        sizes = [int(size) for size in lengths]
        padded = tensor_N.new_zeros(max(sizes))
        padded[: len(tensor_N)] = tensor_N
        parts = [torch.empty_like(padded) for _ in range(world)]
        self._count("gather_mesh", padded)
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_dp_rows(self, tensor_bX: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """What the dp ranks hold of their tokens, joined in order of token: [n_tokens, ...]."""
        if self.mesh.dp == 1:
            return tensor_bX
        sizes = [share(n_tokens, self.mesh.dp, rank) for rank in range(self.mesh.dp)]
        return self._gather_padded(tensor_bX, [last - first for first, last in sizes])

    def gather_dp_pairs(self, *tensors_N: torch.Tensor) -> list[torch.Tensor]:
        """Numbers per pair of all dp ranks, joined in rank order; all tensors have this rank's length."""
        if self.mesh.dp == 1:
            return list(tensors_N)
        length = torch.tensor([len(tensors_N[0])], device=tensors_N[0].device)
        lengths = [torch.zeros_like(length) for _ in range(self.mesh.dp)]
        self._count("gather_dp", length)
        dist.all_gather(lengths, length, group=self._group("dp"))
        sizes = [int(size) for size in lengths]
        return [self._gather_padded(tensor_N, sizes) for tensor_N in tensors_N]

    def _gather_padded(self, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        self._count("gather_dp", padded)
        dist.all_gather(parts, padded, group=self._group("dp"))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, in place."""
        if self.mesh.dp * self.mesh.tp > 1:
            self._count("broadcast", tensor)
            dist.broadcast(tensor, src=0)
        return tensor

    def _sum(self, tensor: torch.Tensor, axis: str | None, size: int) -> torch.Tensor:
        if size > 1:
            self._count(f"sum_{axis or 'mesh'}", tensor)
            dist.all_reduce(tensor, group=self._group(axis) if axis else None)
        return tensor

    def _group(self, axis: str) -> dist.ProcessGroup:
        assert self.mesh.groups is not None
        return self.mesh.groups.get_group(axis)

    def _count(self, name: str, tensor: torch.Tensor) -> None:
        self.bytes[name] += tensor.numel() * tensor.element_size()
