"""Which latents are active: exact TopK and BatchTopK over latents that are sharded across processes.

A selection is exact and does not depend on the mesh: ties are broken by (token, latent id), so the same
tokens and weights give the same active set for every (dp, tp). Communication does not grow with d_sae.

Suffixes: B this process's tokens, m this process's latents, N selected pairs.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

DIGIT_BITS = 16


class Shard(NamedTuple):
    """Which part of the global [tokens, d_sae] matrix of pre-activations a process holds."""

    first_row: int
    global_rows: int
    first_latent: int
    d_sae: int


class Gate(NamedTuple):
    """Active (token, latent) pairs, sorted by token and then latent, both local indices."""

    rows_N: torch.Tensor
    cols_N: torch.Tensor
    threshold: torch.Tensor  # 0-dim: the smallest pre-activation that passed (topk: its mean over local tokens)


class SelectionCollectives(Protocol):
    """What a selection needs of the process group. `Alone` is the group of one."""

    @property
    def tp_rank(self) -> int: ...
    def sum_mesh(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def gather_tp(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def gather_mesh_ragged(self, tensor_N: torch.Tensor) -> torch.Tensor: ...


class Alone:
    """Collectives of a single process: each is the identity."""

    tp_rank = 0

    def sum_mesh(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[None]

    def gather_mesh_ragged(self, tensor_N: torch.Tensor) -> torch.Tensor:
        return tensor_N


def select_batch_topk(pre_Bm: torch.Tensor, n_keep: int, shard: Shard, collectives: SelectionCollectives) -> Gate:
    """The `n_keep` largest positive pre-activations of the whole batch, over all shards.

    Radix select: positive IEEE floats sort like their bit patterns, so a histogram of the high bits, summed
    over the mesh, names the bucket that holds the threshold, and a histogram of the next bits splits it. Two
    all-reduces for float32, four for float64. Fewer than `n_keep` are active only where fewer are positive.

    Args:
        pre_Bm: float32 or float64, contiguous, finite.
    """
    bits_F = _bits(pre_Bm).view(-1)
    shift = pre_Bm.element_size() * 8 - DIGIT_BITS
    # Negative floats have the sign bit set and are negative integers: they all land in bucket 0.
    histogram = torch.bincount((bits_F >> shift).clamp_(min=0), minlength=1 << (DIGIT_BITS - 1))
    bucket, above, inside = _bucket_of(collectives.sum_mesh(histogram), n_keep)
    need = n_keep - above
    flat_N = torch.nonzero(bits_F >= max(bucket << shift, 1)).view(-1)
    bits_N = bits_F[flat_N]

    prefix = bucket
    while shift > 0:
        undecided = bits_N[(bits_N >> shift) == prefix]
        shift -= DIGIT_BITS
        digits = (undecided >> shift) & ((1 << DIGIT_BITS) - 1)
        histogram = collectives.sum_mesh(torch.bincount(digits, minlength=1 << DIGIT_BITS))
        if prefix == 0 and int(histogram.sum()) < need:
            return _as_gate(flat_N, pre_Bm, pre_Bm.new_zeros(()))  # every positive value is active
        bucket, above, inside = _bucket_of(histogram, need)
        need -= above
        prefix = (prefix << DIGIT_BITS) | bucket

    threshold_bits = torch.tensor(prefix, dtype=bits_F.dtype, device=bits_F.device)
    threshold = threshold_bits.view(pre_Bm.dtype)
    keep_N = bits_N >= threshold_bits
    if inside > need:
        keep_N &= (bits_N > threshold_bits) | _first_ties(flat_N, bits_N == prefix, need, pre_Bm, shard, collectives)
    return _as_gate(flat_N[keep_N], pre_Bm, threshold)


def select_topk(pre_Bm: torch.Tensor, k: int, collectives: SelectionCollectives) -> Gate:
    """The `k` largest positive pre-activations of each token, over all tp shards; ties by global latent id.

    One all-gather of [B, k] values. `k` must not be larger than the number of latents of all shards.
    """
    local_k = min(k, pre_Bm.shape[1])
    top_Bk = pre_Bm.topk(local_k, dim=1).values
    if local_k < k:
        padding = pre_Bm.new_full((pre_Bm.shape[0], k - local_k), -torch.inf)
        top_Bk = torch.cat([top_Bk, padding], dim=1)
    top_RBk = collectives.gather_tp(top_Bk.contiguous())
    merged = top_RBk.transpose(0, 1).reshape(pre_Bm.shape[0], -1)
    cut_B = merged.topk(k, dim=1).values[:, -1]

    ties_RB = (top_RBk == cut_B[None, :, None]).sum(-1)
    need_B = k - (merged > cut_B[:, None]).sum(1) - ties_RB[: collectives.tp_rank].sum(0)
    rows_N, cols_N = torch.nonzero((pre_Bm >= cut_B[:, None]) & (pre_Bm > 0), as_tuple=True)
    is_tie_N = pre_Bm[rows_N, cols_N] == cut_B[rows_N]
    # Position of a tie among its row's local ties, counted from 1 in order of latent id.
    so_far_N = is_tie_N.cumsum(0)
    before_row_B = torch.zeros_like(need_B).scatter_reduce_(
        0, rows_N, so_far_N - is_tie_N.long(), "amin", include_self=False
    )
    keep_N = ~is_tie_N | (so_far_N - before_row_B[rows_N] <= need_B[rows_N])
    return Gate(rows_N[keep_N], cols_N[keep_N], cut_B.clamp(min=0).mean())


def select_above(pre_Bm: torch.Tensor, threshold: torch.Tensor) -> Gate:
    """Pairs whose pre-activation is positive and at least `threshold` (0-dim or [m]); no communication."""
    rows_N, cols_N = torch.nonzero((pre_Bm >= threshold) & (pre_Bm > 0), as_tuple=True)
    return Gate(rows_N, cols_N, threshold)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)


def _bucket_of(histogram: torch.Tensor, need: int) -> tuple[int, int, int]:
    """The highest bucket at or above which `need` values lie, how many lie above it, how many in it."""
    at_or_above = histogram.flip(0).cumsum(0)
    position = min(int(torch.searchsorted(at_or_above, need)), len(histogram) - 1)
    inside = int(histogram[len(histogram) - 1 - position])
    return len(histogram) - 1 - position, int(at_or_above[position]) - inside, inside


def _first_ties(
    flat_N: torch.Tensor,
    is_tie_N: torch.Tensor,
    need: int,
    pre_Bm: torch.Tensor,
    shard: Shard,
    collectives: SelectionCollectives,
) -> torch.Tensor:
    """Marks the ties that are among the first `need` of the whole mesh, in order of (token, latent id)."""
    width = pre_Bm.shape[1]
    rows_N = flat_N // width + shard.first_row
    order_N = rows_N * shard.d_sae + flat_N % width + shard.first_latent
    cut = collectives.gather_mesh_ragged(order_N[is_tie_N]).sort().values[need - 1]
    return is_tie_N & (order_N <= cut)


def _as_gate(flat_N: torch.Tensor, pre_Bm: torch.Tensor, threshold: torch.Tensor) -> Gate:
    width = pre_Bm.shape[1]
    return Gate(flat_N // width, flat_N % width, threshold)
