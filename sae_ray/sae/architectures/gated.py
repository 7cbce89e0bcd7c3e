"""Gated SAEs (Rajamanoharan et al., 2404.16014): one path decides whether a latent is active, another how much.

    gate  pi = c @ W_enc.T + b_enc                             f = relu(c @ (W_enc * exp(r_mag)).T + b_mag) where pi > 0
    loss  FVU(f) + coef * penalty(relu(pi)) + FVU(relu(pi), decoder frozen)

The penalty is on the gate, so the magnitudes are not shrunk; the second reconstruction teaches the gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sae_ray.sae.activation import Active, Parameters, Regular, Slopes, StepContext, Target
from sae_ray.sae.architectures.relu import ReLU
from sae_ray.sae.encoder import Encoder
from sae_ray.sae.sparse import codes_of, decode, dot_pairs, on_support, per_pair, sum_scalars_by_latent
from sae_ray.sae.sparsity import penalty

if TYPE_CHECKING:
    from sae_ray.sae.inference import TrainedSAE


class Gated(ReLU):
    """Parameters: `r_mag` and `b_mag`, [m] each. b_enc is the gate's bias."""

    name: ClassVar[str] = "gated"

    def new_parameters(self, m: int, dtype: torch.dtype, device: torch.device) -> Parameters:
        return {name: torch.zeros(m, dtype=dtype, device=device) for name in ("r_mag", "b_mag")}

    def forward(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> Active:
        gate_Bm = encoder.pre_activations()
        common_Bm = (gate_Bm - encoder.b_m).mul_(parameters["r_mag"].exp())
        open_Bm = gate_Bm > 0
        f_Bm = torch.where(open_Bm, (common_Bm + parameters["b_mag"]).relu(), 0)
        codes = codes_of(f_Bm, open_Bm)
        return Active(codes, f_Bm.new_zeros(()), (on_support(codes, gate_Bm), on_support(codes, common_Bm)))

    def regularise(self, active: Active, context: StepContext, target: Target) -> Regular:
        gate_N, _ = active.saved
        gate = active.codes._replace(vals_N=gate_N)
        n = context.shard.global_rows
        unit = (target.power / n).sqrt()
        value, slope_N = penalty(self.cfg.sparsity, self.cfg.sparsity_p, gate, unit, context.collectives)
        weight = context.sparsity_coef / n
        y_hat_BO = context.collectives.sum_tp(decode(gate, target.W_dec_mO)) + target.b_dec_O
        error_BO = y_hat_BO - target.y_BO
        loss = value * weight + error_BO.square().sum() / target.power
        d_gate_N = dot_pairs(gate, error_BO * (2 / target.power), target.W_dec_mO) + slope_N * weight
        return Regular(loss, None, d_gate_N)

    def backward(
        self, active: Active, d_f_N: torch.Tensor, d_gate_N: torch.Tensor | None, own: Parameters, context: StepContext
    ) -> Slopes:
        assert d_gate_N is not None
        codes, (_, common_N) = active.codes, active.saved
        d_mag_N = d_f_N * (codes.vals_N > 0)
        scale_N = per_pair(codes, own["r_mag"].exp())
        own_gradients = {
            "r_mag": sum_scalars_by_latent(codes, d_mag_N * common_N),
            "b_mag": sum_scalars_by_latent(codes, d_mag_N),
        }
        return Slopes(d_mag_N * scale_N + d_gate_N, d_gate_N, own_gradients)

    @staticmethod
    def trained(tensors: Parameters) -> tuple[torch.Tensor, Parameters]:
        threshold = torch.zeros((), dtype=tensors["b_enc"].dtype)
        return threshold, {name: tensors[name] for name in ("r_mag", "b_mag")}

    @classmethod
    def encode_alone(cls, sae: TrainedSAE, pre: torch.Tensor, latents: slice | int) -> torch.Tensor:
        magnitude = (pre - sae.b_enc_M[latents]) * sae.own["r_mag"][latents].exp() + sae.own["b_mag"][latents]
        return torch.where(pre > 0, magnitude.relu(), 0)
