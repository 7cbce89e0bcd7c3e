"""Penalties on a token's activations f, and their slopes. Each is a function of two sums over the latents.

    l1      sum f                       l2      ||f||_2, the seed formula of this project
    hoyer   (sum f)^2 / sum f^2         p_norm  sum (f + EPSILON)^p
    cross   (sum f)^2 - sum f^2, which is twice the sum of products of different latents

f is taken in units of the target's root mean square norm about its mean, so that a coefficient means the same
for every model and layer.
"""

from __future__ import annotations

import torch

from sae_ray.sae.activation import StepCollectives
from sae_ray.sae.sparse import Codes, DenseCodes, per_token, sum_scalars_by_token

EPSILON = 1e-3  # keeps the slope of a root finite at 0
KINDS = ("l1", "l2", "hoyer", "p_norm", "cross")


def penalty(
    kind: str, p: float, codes: Codes | DenseCodes, unit: torch.Tensor, collectives: StepCollectives
) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalty summed over this process's tokens (0-dim) and its slope by each activation, [N].

    One all-reduce of [B, 2] over tp.

    Args:
        codes: activations of this shard's latents; 0 where a pair of the support is not active.
        unit: 0-dim, activations are divided by it.
    """
    f_N = codes.vals_N / unit
    on_N = f_N > 0
    first_N = torch.where(on_N, (f_N + EPSILON) ** p, 0) if kind == "p_norm" else f_N
    sums_B2 = torch.stack([sum_scalars_by_token(codes, first_N), sum_scalars_by_token(codes, f_N.square())], dim=1)
    s1_B, s2_B = collectives.sum_tp(sums_B2.contiguous()).unbind(1)
    some_B = s2_B > 0
    if kind in ("l1", "p_norm"):
        value_B = s1_B
        slope_N = torch.ones_like(f_N) if kind == "l1" else p * (f_N + EPSILON) ** (p - 1)
    elif kind == "l2":
        norm_B = s2_B.sqrt()
        value_B = norm_B
        slope_N = f_N / per_token(codes, torch.where(some_B, norm_B, 1))
    elif kind == "hoyer":
        safe_B = torch.where(some_B, s2_B, 1)
        value_B = s1_B.square() / safe_B
        slope_N = 2 * per_token(codes, s1_B / safe_B) * (1 - f_N * per_token(codes, s1_B / safe_B))
    else:
        value_B = s1_B.square() - s2_B
        slope_N = 2 * (per_token(codes, s1_B) - f_N)
    return value_B.sum(), torch.where(on_N, slope_N, 0) / unit
