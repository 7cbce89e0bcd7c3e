"""What a credit does to a training step: a loss, discounts when latents are selected, deltas after the step.

The trainer knows only this side of it; what estimators there are is `reward.credit`'s business. A credit that has
none of the optional parts costs a step two attribute reads. Suffixes as in `sharded_sae`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from sae_ray.sae.activation import Active, Parameters, StepContext
from sae_ray.sae.architectures import Architecture
from sae_ray.sae.architectures.jumprelu import JumpReLU
from sae_ray.sae.encoder import Encoder
from sae_ray.sae.sparse import per_pair, sum_scalars_by_latent
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.gradients import Gradients

if TYPE_CHECKING:
    from sae_ray.reward.credit.base import Deltas


class CreditParams(NamedTuple):
    """What a credit may look at. In a loss, W_enc and b_enc (and W_dec, where given) are leaves that require grad."""

    W_enc_mD: torch.Tensor
    b_enc_m: torch.Tensor
    b_dec_D: torch.Tensor  # what the encoder subtracts: zeros where that is nothing
    first_latent: int
    step: int
    global_tokens: int = 0  # of the batch, over all dp ranks; 0: as many as the rank has
    W_dec_mO: torch.Tensor | None = None  # in a loss, for a credit that says `of_decoder`; None in a transcoder

    def tokens(self, x_BD: torch.Tensor) -> int:
        return self.global_tokens or len(x_BD)


class CreditLoss(Protocol):
    """The third loss. Its weight is its own business; only latents of this shard can be touched.

    It may also have `deltas(params, threshold)`, `selection(params)` and `rows(params)`, and say `of_decoder`: see
    `reward.credit.base`.
    """

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...


def asked(credit: Any, what: str, *about: Any) -> Any:
    """The answer of a part of a credit that it need not have: None where it has not."""
    part = getattr(credit, what, None)
    return None if part is None else part(*about)


def add_credit(
    credit: CreditLoss,
    params: CreditParams,
    threshold: torch.Tensor,
    x_bD: torch.Tensor,
    grads: Gradients,
    collectives: Collectives,
) -> torch.Tensor:
    """Adds the gradient of the credit's loss to `grads`; returns this dp rank's part of the loss (0-dim).

    The dp ranks exchange the rows that the credit says it touches: a shard's whole gradient is hundreds of megabytes.
    """
    of_decoder = params.W_dec_mO is not None and getattr(credit, "of_decoder", False)
    with torch.enable_grad():
        leaves = [params.W_enc_mD.detach().requires_grad_(), params.b_enc_m.detach().requires_grad_()]
        if params.W_dec_mO is not None and of_decoder:
            leaves.append(params.W_dec_mO.detach().requires_grad_())
        params = params._replace(W_enc_mD=leaves[0], b_enc_m=leaves[1], W_dec_mO=leaves[2] if of_decoder else None)
        loss = credit.loss(x_bD, params, threshold)
        if loss is None:
            return torch.zeros((), dtype=x_bD.dtype, device=x_bD.device)
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    # Each dp rank's loss is a mean over its own tokens: their mean by number of tokens is the global batch's.
    share = len(x_bD) / params.tokens(x_bD)
    rows_n = asked(credit, "rows", params)
    if rows_n is None:
        rows_n = torch.arange(len(params.b_enc_m), device=x_bD.device)
    totals = [None if slope is None else collectives.sum_dp(slope[rows_n] * share) for slope in slopes]
    for gradient, total in zip((grads.W_enc_mD, grads.b_enc_m, grads.W_dec_mO), totals, strict=False):
        if total is not None:
            gradient.index_add_(0, rows_n, total)
    if of_decoder and totals[2] is not None:
        grads.along_m.index_add_(0, rows_n, (totals[2] * leaves[2].detach()[rows_n]).sum(1))
    return loss.detach().to(x_bD.dtype) * share


def apply_deltas(deltas: Deltas | None, params: CreditParams) -> None:
    """Moves the weights themselves, in place."""
    if deltas is None:
        return
    for weights, change in ((params.W_enc_mD, deltas.W_enc_nD), (params.b_enc_m, deltas.b_enc_n)):
        if change is not None:
            weights.index_add_(0, deltas.rows_n, change.to(weights.dtype))


def forward_with_bonus(
    architecture: Architecture, encoder: Encoder, own: Parameters, context: StepContext, bonus_m: torch.Tensor
) -> Active:
    """The architecture's forward; latents that compete do so by pre-activation and bonus, valued without it."""
    if not architecture.ranks:
        return architecture.forward(encoder, own, context)
    active = architecture.forward(encoder._replace(b_m=encoder.b_m + bonus_m), own, context)
    codes = active.codes
    vals_N = torch.where(codes.vals_N > 0, (codes.vals_N - per_pair(codes, bonus_m)).clamp(min=0), 0)
    return active._replace(codes=codes._replace(vals_N=vals_N))


def discount_price(
    architecture: JumpReLU,
    grads: Gradients,
    active: Active,
    own: Parameters,
    discount_m: torch.Tensor,
    context: StepContext,
    collectives: Collectives,
) -> None:
    """Takes each latent's discount from what the common price does to its threshold."""
    codes, (pre_N,) = active.codes, active.saved
    width_N = per_pair(codes, architecture.width(own))
    near_N = ((pre_N - per_pair(codes, own["theta"])).abs() < width_N / 2).to(pre_N.dtype) / width_N
    near_m = collectives.sum_dp(sum_scalars_by_latent(codes, near_N))
    grads.own["theta"].addcmul_(near_m, discount_m.clamp(max=1) * context.l0_price)
