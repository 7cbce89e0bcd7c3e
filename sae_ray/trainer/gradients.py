"""From the slopes of a step's losses to the gradients of a shard, exchanged over dp.

Suffixes: b tokens of this dp rank (B once exchanged), D d_in, O d_out, m latents of this shard, N pairs, G segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae_ray.config import SAEConfig
from sae_ray.sae import triton_kernels
from sae_ray.sae.activation import Active, Parameters, StepContext
from sae_ray.sae.architectures import Architecture
from sae_ray.sae.encoder import Encoder, Pairs
from sae_ray.sae.losses import aux_k_weight, centred_power
from sae_ray.sae.selection import keep_topk, mark_topk
from sae_ray.sae.sparse import (
    DENSE_SHARE,
    Codes,
    DenseCodes,
    decode,
    dot_pairs,
    sum_by_latent,
    sum_scalars_by_latent,
)
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.reconstruction import Segment, decoder_gradient, segments


class Gradients(NamedTuple):
    """Of the global batch. b_dec's has two parts: one is still to be summed over tp."""

    W_enc_mD: torch.Tensor
    W_dec_mO: torch.Tensor
    b_enc_m: torch.Tensor
    b_dec_O: torch.Tensor  # through the decoder: the same on all tp ranks
    b_dec_shard_O: torch.Tensor  # through this shard's encoder
    along_m: torch.Tensor  # <gradient of a decoder row, the row>
    own: Parameters

    def named(self) -> dict[str, torch.Tensor]:
        named = {"W_enc": self.W_enc_mD, "W_dec": self.W_dec_mO, "b_enc": self.b_enc_m, "b_dec": self.b_dec_O}
        return named | self.own


class Flow(NamedTuple):
    """What the gradients of a step are made of: pairs, their slopes, and the vectors they belong to."""

    active: Active
    d_f_N: torch.Tensor  # slope of all losses by the activations
    d_gate_N: torch.Tensor | None
    d_decoded_N: torch.Tensor  # of the reconstruction loss alone
    centred_bD: torch.Tensor
    slope_GbO: torch.Tensor


def gradients(
    flow: Flow,
    architecture: Architecture,
    own: Parameters,
    W_enc_mD: torch.Tensor,
    bounds: list[tuple[int, int]],
    subtract_b_dec: bool,
    context: StepContext,
    coll: Collectives,
) -> tuple[Gradients, torch.Tensor]:
    """The gradients of the global batch for this shard, and how often each of its latents fired, [m]."""
    if architecture.lists_pairs:
        flow = exchange(flow, context.shard.global_rows, len(W_enc_mD), coll)
    active = flow.active
    codes = active.codes
    slopes = architecture.backward(active, flow.d_f_N, flow.d_gate_N, own, context)
    parts = segments(codes, bounds)
    W_enc_part_mD, W_dec_mO, d_pre_m = _by_latent(codes, parts, slopes.d_pre_N, flow)
    through_encoder = -(d_pre_m @ W_enc_mD) if subtract_b_dec else flow.slope_GbO.new_zeros(W_dec_mO.shape[1])
    same = slopes.d_b_enc_N is slopes.d_pre_N
    found = Gradients(
        W_enc_part_mD,
        W_dec_mO,
        d_pre_m if same else sum_scalars_by_latent(codes, slopes.d_b_enc_N),
        flow.slope_GbO[0].sum(0),
        through_encoder,
        sum_scalars_by_latent(codes, codes.vals_N * flow.d_decoded_N),
        slopes.parameters,
    )
    fired_m = sum_scalars_by_latent(codes, (codes.vals_N > 0).to(codes.vals_N.dtype))
    if not architecture.lists_pairs:
        for tensor in (*found[:-1], *found.own.values(), fired_m):
            coll.sum_dp(tensor)
    return found, fired_m


def _by_latent(
    codes: Codes | DenseCodes, parts: list[Segment], d_pre_N: torch.Tensor, flow: Flow
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over each latent's pairs: encoder rows, decoder rows, and d_pre itself. One traversal where kernels run."""
    if isinstance(codes, Codes) and len(parts) == 1 and triton_kernels.usable(flow.centred_bD, d_pre_N):
        found = triton_kernels.gradients_by_latent(codes, d_pre_N, flow.slope_GbO[0], flow.centred_bD)
        return found.W_enc_mD, found.W_dec_mD, found.b_enc_m.to(d_pre_N.dtype)
    return (
        sum_by_latent(codes, d_pre_N, flow.centred_bD),
        decoder_gradient(parts, flow.slope_GbO),
        sum_scalars_by_latent(codes, d_pre_N),
    )


def exchange(flow: Flow, n_tokens: int, n_latents: int, coll: Collectives) -> Flow:
    """The flow of the global batch, from those of the dp ranks. Its size does not depend on d_sae."""
    if coll.mesh.dp == 1:
        return flow
    codes = flow.active.codes
    assert isinstance(codes, Codes)
    first = coll.mesh.rows(n_tokens)[0]
    numbers = [codes.vals_N, flow.d_f_N, flow.d_decoded_N, *flow.active.saved]
    rows_N, cols_N, vals_N, d_f_N, d_decoded_N, *saved = coll.gather_dp_pairs(
        codes.rows_N + first, codes.cols_N, *numbers
    )
    n_segments, _, width = flow.slope_GbO.shape
    slope_BX = coll.gather_dp_rows(flow.slope_GbO.transpose(0, 1).reshape(-1, n_segments * width), n_tokens)
    return Flow(
        flow.active._replace(
            codes=Codes.from_pairs(Pairs(rows_N, cols_N, vals_N), n_tokens, n_latents), saved=tuple(saved)
        ),
        d_f_N,
        None,
        d_decoded_N,
        coll.gather_dp_rows(flow.centred_bD, n_tokens),
        slope_BX.view(n_tokens, n_segments, width).transpose(0, 1),
    )


def dead_in_turn(dead_m: torch.Tensor, n_dead: int, pool: int, first_latent: int, step: int) -> torch.Tensor:
    """This shard's dead latents that AuxK may choose from in this step, int64: about `pool` of all shards'.

    Reading and ranking the pre-activations of thousands would cost up to a fifth of the step, and a token revives no
    more than `aux_k`. Whether a latent is drawn depends on its id and the step alone, so that the mesh does not matter.

    Args:
        dead_m: bool, of this shard. n_dead: those of all shards.
    """
    if n_dead <= pool:
        return torch.nonzero(dead_m).view(-1)
    latent_m = torch.arange(first_latent, first_latent + len(dead_m), device=dead_m.device)
    return torch.nonzero(dead_m & (_uniform(latent_m, step) < pool / n_dead)).view(-1)


def _uniform(index_m: torch.Tensor, step: int) -> torch.Tensor:
    """A number in [0, 1) for each index, new for every step: murmur3's finaliser on 32 bits."""
    bits = (index_m * 0x9E3779B1 + step * 0x85EBCA6B) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return (bits ^ (bits >> 16)).double() / 2**32


def add_aux_k(
    grads: Gradients,
    residual_bO: torch.Tensor,
    encoder: Encoder,
    dead: torch.Tensor,
    n_dead: int,
    W_dec_mO: torch.Tensor,
    cfg: SAEConfig,
    n_tokens: int,
    subtract_b_dec: bool,
    coll: Collectives,
) -> torch.Tensor:
    """AuxK (Gao et al., 2406.04093, A.2): dead latents reconstruct what the live ones left over.

    The residual is a constant here: only the dead latents learn from it, encoder and decoder alike.

    Args:
        encoder: has watched `dead` in this step's product.
        dead: what `dead_in_turn` gave. n_dead: the dead latents of all shards.
    Returns:
        The loss over this dp rank's tokens, 0-dim.
    """
    W_nO, centred_bD = W_dec_mO[dead], encoder.centred_BD
    k = min(cfg.aux_k, n_dead)
    codes = _dead_codes(encoder, k, coll)
    guess_bO = coll.sum_tp(decode(codes, W_nO))
    weight = aux_k_weight(cfg.aux_coef, n_dead, cfg.aux_k)
    per_power = weight / centred_power(residual_bO, n_tokens, coll.sum_dp)
    left_bO = guess_bO - residual_bO
    slope_bO = left_bO * (2 * per_power)
    d_pre_N = dot_pairs(codes, slope_bO, W_nO)
    flow = Flow(Active(codes, per_power), d_pre_N, None, d_pre_N, centred_bD, slope_bO[None])
    flow = exchange(flow, n_tokens, len(dead), coll)
    everyones = flow.active.codes
    d_b_n = sum_scalars_by_latent(everyones, flow.d_f_N)
    grads.W_enc_mD.index_add_(0, dead, sum_by_latent(everyones, flow.d_f_N, flow.centred_bD))
    grads.W_dec_mO.index_add_(0, dead, sum_by_latent(everyones, everyones.vals_N, flow.slope_GbO[0]))
    grads.b_enc_m.index_add_(0, dead, d_b_n)
    grads.along_m.index_add_(0, dead, sum_scalars_by_latent(everyones, everyones.vals_N * flow.d_f_N))
    if subtract_b_dec:
        grads.b_dec_shard_O.sub_(d_b_n @ encoder.W_mD[dead])
    return left_bO.square().sum() * per_power


def _dead_codes(encoder: Encoder, k: int, coll: Collectives) -> Codes | DenseCodes:
    """The k most active of all shards' dead latents per token, as this shard's codes over its dead latents."""
    assert encoder.watch_n is not None
    n_tokens, n = len(encoder.centred_BD), len(encoder.watch_n)
    top_bk, places_bk = encoder.watched_top(min(k, n))
    # Where few are dead nearly all of them are picked: dense products, unless dp ranks must exchange pairs.
    if coll.mesh.dp > 1 or top_bk.shape[1] <= DENSE_SHARE * n:
        return Codes.from_pairs(keep_topk(top_bk, places_bk, k, coll)[0], n_tokens, n)
    keep_bk, _ = mark_topk(top_bk, k, coll)
    vals_bn = top_bk.new_zeros(n_tokens, n).scatter_(1, places_bk, top_bk * keep_bk)
    return DenseCodes(vals_bn, vals_bn > 0)
