"""TopK (Gao et al., 2406.04093): the k largest latents of each token, in training and at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sae_ray.sae.selection import Gate, SelectionCollectives, Shard, select_topk


@dataclass(frozen=True)
class TopK:
    name: ClassVar[str] = "topk"
    k: int

    def train_gate(self, pre_Bm: torch.Tensor, shard: Shard, collectives: SelectionCollectives) -> Gate:
        return select_topk(pre_Bm, self.k, collectives)

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        return select_topk(pre_Bm, self.k, collectives)
