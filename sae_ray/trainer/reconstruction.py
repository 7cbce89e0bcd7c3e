"""The reconstruction loss of sharded codes, and its slopes by the activations and by the decoder's output.

With several prefixes (matryoshka) the loss is the mean FVU of the reconstructions by the first n_1 < n_2 < ...
latents. A latent is in all prefixes that end behind it, so its slope is the sum of theirs: the pairs are
split by segment (the latents between two ends) and each segment meets its own slope.

Suffixes: B tokens of this dp rank, O decoder width, m latents of this shard, N pairs, G segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae_ray.sae.activation import Target
from sae_ray.sae.encoder import Pairs
from sae_ray.sae.sparse import Codes, DenseCodes, decode, dot_pairs, sum_by_latent
from sae_ray.trainer.collectives import Collectives


class Segment(NamedTuple):
    """Some consecutive latents of this shard, and which pairs are theirs."""

    first: int
    last: int
    codes: Codes | DenseCodes  # latents counted from `first`
    places_N: torch.Tensor | None  # where its pairs are among all pairs; None: it is all of them


class Reconstruction(NamedTuple):
    loss: torch.Tensor  # 0-dim, this dp rank's share
    fvu: torch.Tensor  # 0-dim, this dp rank's share, of all latents
    error_BO: torch.Tensor  # y_hat - y, of all latents
    slope_GBO: torch.Tensor  # of the loss by what a segment's latents decode to
    d_f_N: torch.Tensor


def segments(codes: Codes | DenseCodes, bounds: list[tuple[int, int]]) -> list[Segment]:
    """The pairs of each range of local latents. One range is taken to hold them all."""
    if len(bounds) == 1:
        return [Segment(*bounds[0], codes, None)]
    assert isinstance(codes, Codes), "only architectures with listed pairs have several prefixes"
    n_tokens, out = len(codes.row_start_B1) - 1, []
    for first, last in bounds:
        places_N = torch.nonzero((codes.cols_N >= first) & (codes.cols_N < last)).view(-1)
        pairs = Pairs(codes.rows_N[places_N], codes.cols_N[places_N] - first, codes.vals_N[places_N])
        out.append(Segment(first, last, Codes.from_pairs(pairs, n_tokens, last - first), places_N))
    return out


def reconstruct(parts: list[Segment], codes: Codes | DenseCodes, target: Target, coll: Collectives) -> Reconstruction:
    """One all-reduce of [G, B, O] over tp."""
    W_mO = target.W_dec_mO
    decoded_GBO = torch.stack([decode(part.codes, W_mO[part.first : part.last]) for part in parts])
    prefix_GBO = coll.sum_tp(decoded_GBO).cumsum_(0) if len(parts) > 1 else coll.sum_tp(decoded_GBO)
    error_GBO = prefix_GBO.add_(target.b_dec_O - target.y_BO)
    loss_G = error_GBO.square().sum((1, 2)) / target.power
    error_BO = error_GBO[-1]
    slope_GBO = error_GBO * (2 / (target.power * len(parts)))
    if len(parts) > 1:
        slope_GBO = slope_GBO.flip(0).cumsum_(0).flip(0)
    return Reconstruction(
        loss_G.mean(), loss_G[-1], error_BO, slope_GBO, slopes_of_pairs(parts, codes, slope_GBO, W_mO)
    )


def slopes_of_pairs(
    parts: list[Segment], codes: Codes | DenseCodes, slope_GBO: torch.Tensor, W_mO: torch.Tensor
) -> torch.Tensor:
    """The loss's slope by each activation, [N]."""
    if len(parts) == 1:
        return dot_pairs(codes, slope_GBO[0], W_mO)
    out_N = torch.zeros_like(codes.vals_N)
    for part, slope_BO in zip(parts, slope_GBO, strict=True):
        out_N[part.places_N] = dot_pairs(part.codes, slope_BO, W_mO[part.first : part.last])
    return out_N


def decoder_gradient(parts: list[Segment], slope_GBO: torch.Tensor) -> torch.Tensor:
    """The loss's gradient by the decoder's rows, [m, O]."""
    rows = [sum_by_latent(p.codes, p.codes.vals_N, slope_BO) for p, slope_BO in zip(parts, slope_GBO, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def local_bounds(prefixes: list[int], first_latent: int, last_latent: int) -> list[tuple[int, int]]:
    """The part of each segment that lies in this shard, in local latents; all segments, also empty ones."""
    starts = [0, *prefixes[:-1]]
    bounds = [(max(low, first_latent), min(high, last_latent)) for low, high in zip(starts, prefixes, strict=True)]
    return [(low - first_latent, max(low, high) - first_latent) for low, high in bounds]
