"""The first SAEs (Bricken et al. 2023; Cunningham et al., 2309.08600): ReLU, and a penalty that makes it sparse."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sae_ray.sae.activation import Active, Parameters, Regular, StepContext, Target
from sae_ray.sae.architectures.base import Architecture
from sae_ray.sae.encoder import Encoder
from sae_ray.sae.selection import Gate, SelectionCollectives, select_above
from sae_ray.sae.sparse import codes_of
from sae_ray.sae.sparsity import penalty

if TYPE_CHECKING:
    from sae_ray.config import SAEConfig


class ReLU(Architecture):
    name: ClassVar[str] = "relu_l1"
    lists_pairs: ClassVar[bool] = False

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        if not cfg.sparsity_coef:
            raise ValueError(f"sae.architecture {cls.name} needs sae.sparsity_coef above 0")

    def forward(self, encoder: Encoder, parameters: Parameters, context: StepContext) -> Active:
        pre_Bm = encoder.pre_activations()
        support_Bm = pre_Bm > 0
        return Active(codes_of(pre_Bm.relu(), support_Bm), pre_Bm.new_zeros(()))

    def regularise(self, active: Active, context: StepContext, target: Target) -> Regular | None:
        return activation_penalty(self.cfg, active, context, target)

    def infer_gate(self, pre_Bm: torch.Tensor, threshold: torch.Tensor, collectives: SelectionCollectives) -> Gate:
        return select_above(pre_Bm, torch.zeros_like(threshold))


def activation_penalty(cfg: SAEConfig, active: Active, context: StepContext, target: Target) -> Regular:
    """The configured penalty on the activations, a mean over the tokens of the global batch."""
    n = context.shard.global_rows
    unit = (target.power / n).sqrt()
    value, slope_N = penalty(cfg.sparsity, cfg.sparsity_p, active.codes, unit, context.collectives)
    weight = context.sparsity_coef / n
    return Regular(value * weight, slope_N * weight)
