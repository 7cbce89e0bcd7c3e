"""BatchTopK (Bussmann et al., 2412.06410): k active latents per token on average over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sae_ray.sae.selection import Gate, SelectionCollectives, Shard, select_above, select_batch_topk


@dataclass(frozen=True)
class BatchTopK:
    """Training keeps the k*B largest of the batch; inference keeps what reaches the running threshold."""

    name: ClassVar[str] = "batchtopk"
    k: int

    def train_gate(self, pre_Bm: torch.Tensor, shard: Shard, collectives: SelectionCollectives) -> Gate:
        return select_batch_topk(pre_Bm, self.k * shard.global_rows, shard, collectives)

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        return select_above(pre_Bm, threshold)
