"""What passes between an architecture and the trainer in one step.

"Pairs" are the support of a batch: the active (token, latent) pairs, and for jumprelu those so near their
threshold that they move it. Where too many are active to list, [N] stands for a dense [B, m].
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sae_ray.sae.selection import SelectionCollectives, Shard
from sae_ray.sae.sparse import Codes, DenseCodes

Parameters = dict[str, torch.Tensor]  # what an architecture adds to W_enc, W_dec, b_enc and b_dec: [m] each


class StepCollectives(SelectionCollectives, Protocol):
    def sum_tp(self, tensor: torch.Tensor) -> torch.Tensor: ...


class StepContext(NamedTuple):
    """What a training step knows besides its tensors."""

    shard: Shard
    collectives: StepCollectives
    k: int  # of this step: the schedule is applied
    sparsity_coef: float  # of this step
    l0_price: torch.Tensor  # 0-dim: what one more active pair costs (jumprelu)


class Target(NamedTuple):
    """What the decoder aims at. A loss is `sum of squares / power` over the global batch."""

    y_BO: torch.Tensor
    W_dec_mO: torch.Tensor
    b_dec_O: torch.Tensor
    power: torch.Tensor  # 0-dim: sum ||y - mean(y)||^2 over the global batch


class Active(NamedTuple):
    """A batch's activations.

    threshold: 0-dim, feeds the running threshold. saved: what `backward` needs, tensors [N].
    """

    codes: Codes | DenseCodes
    threshold: torch.Tensor
    saved: tuple[torch.Tensor, ...] = ()


class Regular(NamedTuple):
    """A further loss (0-dim, over this process's tokens) and its slopes [N] by the activations and by the gate."""

    loss: torch.Tensor
    d_f_N: torch.Tensor | None = None
    d_gate_N: torch.Tensor | None = None


class Slopes(NamedTuple):
    """Slopes of the whole loss by what multiplies `centred @ W_enc.T` ([N]), by b_enc ([N]), and the
    gradients of the architecture's own parameters ([m] each)."""

    d_pre_N: torch.Tensor
    d_b_enc_N: torch.Tensor
    parameters: Parameters
