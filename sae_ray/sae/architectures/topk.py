"""TopK (Gao et al., 2406.04093): the k largest latents of each token, in training and at inference.

With `sae.margin` above 0, latents that miss the k-th place by no more than the margin are active too: near ties
are not decided by noise, and k becomes the least number instead of the only one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sae_ray.sae import triton_forward
from sae_ray.sae.activation import Active, Parameters, StepContext
from sae_ray.sae.architectures.base import Architecture
from sae_ray.sae.encoder import Encoder, top_of, top_rows
from sae_ray.sae.selection import Alone, Gate, SelectionCollectives, keep_topk, select_topk
from sae_ray.sae.sparse import Codes

if TYPE_CHECKING:
    from sae_ray.config import SAEConfig
    from sae_ray.sae.inference import TrainedSAE


class TopK(Architecture):
    name: ClassVar[str] = "topk"
    ranks: ClassVar[bool] = True

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        if cfg.sparsity_coef:
            raise ValueError(f"sae.sparsity_coef is for relu_l1, gated and jumprelu; {cls.name} has its k")

    def forward(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> Active:
        k, shape = context.k, (len(encoder.centred_BD), len(encoder.b_m))
        if self.cfg.margin:
            pre_Bm = encoder.pre_activations()
            gate = select_within_margin(pre_Bm, k, self.cfg.margin, context.collectives)
            return Active(Codes.of(pre_Bm, gate), gate.threshold)
        if triton_forward.usable(encoder, context):
            active = triton_forward.topk(encoder, context)
            if active is not None:
                return active
        pairs, threshold = keep_topk(*top_rows(encoder, min(k, shape[1])), k, context.collectives)
        return Active(Codes.from_pairs(encoder.widened(pairs), *shape), threshold)

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        return _gate(pre_Bm, self.cfg.k, self.cfg.margin, collectives)

    @staticmethod
    def trained(tensors: Parameters) -> tuple[torch.Tensor, Parameters]:
        return tensors["threshold"], {}

    @classmethod
    def encode(cls, sae: TrainedSAE, pre_TM: torch.Tensor) -> torch.Tensor:
        gate = _gate(pre_TM, sae.k, sae.margin, Alone())
        f_TM = torch.zeros_like(pre_TM)
        f_TM[gate.rows_N, gate.cols_N] = pre_TM[gate.rows_N, gate.cols_N]
        return f_TM


def _gate(pre_Bm: torch.Tensor, k: int, margin: float, collectives: SelectionCollectives) -> Gate:
    if margin:
        return select_within_margin(pre_Bm, k, margin, collectives)
    return select_topk(pre_Bm, k, collectives)


def select_within_margin(pre_Bm: torch.Tensor, k: int, margin: float, collectives: SelectionCollectives) -> Gate:
    """Positive pairs that are at most `margin` below their token's k-th largest pre-activation of all shards."""
    top_Bk, _ = top_of(pre_Bm, min(k, pre_Bm.shape[1]))
    padded_Bk = torch.nn.functional.pad(top_Bk, (0, k - top_Bk.shape[1]))
    all_Bk = collectives.gather_tp(padded_Bk.contiguous()).transpose(0, 1).reshape(len(pre_Bm), -1)
    cut_B = all_Bk.topk(k, dim=1).values[:, -1]
    rows_N, cols_N = torch.nonzero((pre_Bm >= cut_B[:, None] - margin) & (pre_Bm > 0), as_tuple=True)
    return Gate(rows_N, cols_N, cut_B.mean())
