"""JumpReLU (Rajamanoharan et al., 2407.14435): a threshold per latent, learned through a straight-through kernel.

The thresholds are raw float32 parameters: their logarithm freezes under Adam, and bfloat16 ones stall. L0 is
steered to `sae.k` as an equality constraint: `context.l0_price` is the slope of an augmented Lagrangian by the
number of active pairs, which the trainer raises while L0 is above the target and lowers while it is below.

    df/dtheta = -(theta / eps) K((pre - theta) / eps)      dH/dtheta = -(1 / eps) K(...)     K: 1 on (-1/2, 1/2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sae_ray.sae.activation import Active, Parameters, Regular, Slopes, StepContext, Target
from sae_ray.sae.architectures.base import Architecture
from sae_ray.sae.architectures.relu import activation_penalty
from sae_ray.sae.encoder import Encoder, batch_candidates, pairs_above
from sae_ray.sae.selection import Gate, SelectionCollectives, keep_batch_topk
from sae_ray.sae.sparse import Codes, per_pair, sum_scalars_by_latent

if TYPE_CHECKING:
    from sae_ray.sae.inference import TrainedSAE


class JumpReLU(Architecture):
    """Parameter: `theta`, [m]. The kernel's width eps is a share of each threshold."""

    name: ClassVar[str] = "jumprelu"

    def new_parameters(self, m: int, dtype: torch.dtype, device: torch.device) -> Parameters:
        return {"theta": torch.zeros(m, dtype=dtype, device=device)}

    def start(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> None:
        """All thresholds where the first batch has `sae.k` active latents per token."""
        n_keep = context.k * context.shard.global_rows
        candidates = batch_candidates(encoder, n_keep)
        _, threshold = keep_batch_topk(candidates, n_keep, context.shard, context.collectives)
        parameters["theta"].fill_(threshold)

    def width(self, parameters: Parameters) -> torch.Tensor:
        return self.cfg.bandwidth * parameters["theta"].clamp(min=1e-6)

    def forward(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> Active:
        theta_m = parameters["theta"]
        low_m = theta_m - self.width(parameters) / 2
        pairs = pairs_above(encoder, low_m)
        pre_N = pairs.vals_N
        codes = Codes.from_pairs(pairs, len(encoder.centred_BD), len(encoder.b_m))
        f_N = torch.where(pre_N > per_pair(codes, theta_m), pre_N, 0)
        return Active(codes._replace(vals_N=f_N), pre_N.new_zeros(()), (pre_N,))

    def regularise(self, active: Active, context: StepContext, target: Target) -> Regular | None:
        if not self.cfg.sparsity_coef:
            return None
        return activation_penalty(self.cfg, active, context, target)

    def backward(
        self, active: Active, d_f_N: torch.Tensor, d_gate_N: torch.Tensor | None, own: Parameters, context: StepContext
    ) -> Slopes:
        codes, (pre_N,) = active.codes, active.saved
        theta_N = per_pair(codes, own["theta"])
        width_N = per_pair(codes, self.width(own))
        near_N = ((pre_N - theta_N).abs() < width_N / 2).to(pre_N.dtype)
        d_theta_N = -(theta_N * d_f_N + context.l0_price) * near_N / width_N
        d_pre_N = d_f_N * (codes.vals_N > 0)
        return Slopes(d_pre_N, d_pre_N, {"theta": sum_scalars_by_latent(codes, d_theta_N)})

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        rows_N, cols_N = torch.nonzero((pre_Bm > threshold) & (pre_Bm > 0), as_tuple=True)
        return Gate(rows_N, cols_N, threshold)

    @staticmethod
    def trained(tensors: Parameters) -> tuple[torch.Tensor, Parameters]:
        return tensors["theta"], {}

    @classmethod
    def encode_alone(cls, sae: TrainedSAE, pre: torch.Tensor, latents: slice | int) -> torch.Tensor:
        threshold = sae.threshold.to(pre.dtype).expand(sae.d_sae)[latents]
        return torch.where(pre > threshold, pre.relu(), 0)
