"""BatchTopK (Bussmann et al., 2412.06410) and its Matryoshka form (Bussmann et al., 2503.17547)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sae_ray.sae import triton_forward
from sae_ray.sae.activation import Active, Parameters, StepContext
from sae_ray.sae.architectures.topk import TopK
from sae_ray.sae.encoder import Encoder, batch_candidates
from sae_ray.sae.selection import Gate, SelectionCollectives, keep_batch_topk, select_above
from sae_ray.sae.sparse import Codes

if TYPE_CHECKING:
    from sae_ray.sae.inference import TrainedSAE


class BatchTopK(TopK):
    """Training keeps the k*B largest of the batch; inference keeps what reaches the running threshold."""

    name: ClassVar[str] = "batchtopk"

    def forward(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> Active:
        if triton_forward.usable(encoder, context):
            return triton_forward.batch_topk(encoder, context)
        n_keep = context.k * context.shard.global_rows
        candidates = batch_candidates(encoder, n_keep)
        pairs, threshold = keep_batch_topk(candidates, n_keep, context.shard, context.collectives)
        return Active(Codes.from_pairs(pairs, len(encoder.centred_BD), len(encoder.b_m)), threshold)

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        return select_above(pre_Bm, threshold)

    @classmethod
    def encode(cls, sae: TrainedSAE, pre_TM: torch.Tensor) -> torch.Tensor:
        return cls.encode_alone(sae, pre_TM, slice(None))


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents must reconstruct alone, at several lengths: general before specific."""

    name: ClassVar[str] = "matryoshka"

    @property
    def prefixes(self) -> list[int]:
        ends = [max(1, round(share * self.cfg.d_sae)) for share in self.cfg.groups]
        return sorted(set(ends))
