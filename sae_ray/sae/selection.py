"""Which latents are active: exact TopK and BatchTopK over latents that are sharded across processes.

A selection is exact and does not depend on the mesh: ties are broken by (token, latent id), so the same
tokens and weights give the same active set for every (dp, tp). Communication does not grow with d_sae.

Suffixes: B this process's tokens, m this process's latents, N selected pairs.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sae_ray.sae.encoder import Pairs, top_of

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
    """`keep_batch_topk` of all pre-activations: the `n_keep` largest positive ones of the whole batch."""
    rows_N, cols_N = torch.nonzero(pre_Bm > 0, as_tuple=True)
    pairs, threshold = keep_batch_topk(Pairs(rows_N, cols_N, pre_Bm[rows_N, cols_N]), n_keep, shard, collectives)
    return Gate(pairs.rows_N, pairs.cols_N, threshold)


def keep_batch_topk(
    pairs: Pairs, n_keep: int, shard: Shard, collectives: SelectionCollectives
) -> tuple[Pairs, torch.Tensor]:
    """The `n_keep` largest of the candidates of all shards, and the smallest value among them (0-dim).

    Radix select: positive IEEE floats sort like their bit patterns, so a histogram of the high bits, summed
    over the mesh, names the bucket that holds the threshold, and a histogram of the next bits splits it. Two
    all-reduces for float32, four for float64. Fewer than `n_keep` are kept only where fewer are given, and
    then the threshold is 0.

    Args:
        pairs: positive candidates of this shard, float32 or float64; those that are missing are smaller than
            `n_keep` others.
    """
    shift = pairs.vals_N.element_size() * 8 - DIGIT_BITS
    bits_N = pairs.vals_N.view(torch.int32 if pairs.vals_N.dtype == torch.float32 else torch.int64)
    need, inside, prefix = n_keep, len(bits_N), 0
    undecided = bits_N
    while True:
        digits = (undecided >> shift) & ((1 << DIGIT_BITS) - 1)
        histogram = collectives.sum_mesh(torch.bincount(digits, minlength=1 << DIGIT_BITS).int())
        if prefix == 0 and need == n_keep and int(histogram.sum()) < need:
            return pairs, pairs.vals_N.new_zeros(())
        bucket, above, inside = _bucket_of(histogram, need)
        need -= above
        prefix = (prefix << DIGIT_BITS) | bucket
        if shift == 0:
            break
        undecided = undecided[(undecided >> shift) == prefix]
        shift -= DIGIT_BITS

    threshold_bits = torch.tensor(prefix, dtype=bits_N.dtype, device=bits_N.device)
    keep_N = bits_N >= threshold_bits
    if inside > need:
        keep_N &= (bits_N > threshold_bits) | _first_ties(pairs, bits_N == threshold_bits, need, shard, collectives)
    return Pairs(*(field[keep_N] for field in pairs)), threshold_bits.view(pairs.vals_N.dtype)


def select_topk(pre_Bm: torch.Tensor, k: int, collectives: SelectionCollectives) -> Gate:
    """`keep_topk` of all pre-activations. `k` must not be larger than the number of latents of all shards."""
    pairs, threshold = keep_topk(*top_of(pre_Bm, min(k, pre_Bm.shape[1])), k, collectives)
    return Gate(pairs.rows_N, pairs.cols_N, threshold)


def keep_topk(
    top_Bk: torch.Tensor, latents_Bk: torch.Tensor, k: int, collectives: SelectionCollectives
) -> tuple[Pairs, torch.Tensor]:
    """The `k` largest positive pre-activations of each token, over all tp shards; ties by global latent id.

    Args:
        top_Bk, latents_Bk: the shard's own largest per token, as `encoder.top_rows` gives them; fewer columns
            than `k` where the shard has fewer latents.
    Returns:
        The kept pairs, and the mean over these tokens of the k-th largest value.
    """
    keep_Bk, cut_B = mark_topk(top_Bk, k, collectives)
    order_Bk = latents_Bk.masked_fill(~keep_Bk, torch.iinfo(torch.int64).max).argsort(dim=1)
    rows_N, places_N = torch.nonzero(keep_Bk.gather(1, order_Bk), as_tuple=True)
    where_N = order_Bk[rows_N, places_N]
    return Pairs(rows_N, latents_Bk[rows_N, where_N], top_Bk[rows_N, where_N]), cut_B.mean()


def mark_topk(top_Bk: torch.Tensor, k: int, collectives: SelectionCollectives) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of a shard's largest values per token are among the `k` largest positive ones of all tp shards, and the
    k-th largest of each token. One all-gather of [B, k] values."""
    keep_Bk = top_Bk > 0
    padding = top_Bk.new_zeros(len(top_Bk), k - top_Bk.shape[1])
    top_RBk = collectives.gather_tp(torch.cat([top_Bk, padding], dim=1).contiguous())
    if len(top_RBk) == 1:
        return keep_Bk, top_RBk[0, :, -1]
    merged = top_RBk.transpose(0, 1).reshape(len(top_Bk), -1)
    cut_B = merged.topk(k, dim=1).values[:, -1]
    ties_RB = (top_RBk == cut_B[None, :, None]).sum(-1)
    need_B = k - (merged > cut_B[:, None]).sum(1) - ties_RB[: collectives.tp_rank].sum(0)
    # Largest first and ties in order of latent: the first `above + need` of a row are those to keep.
    n_keep_B = (top_Bk > cut_B[:, None]).sum(1) + need_B.clamp(min=0)
    keep_Bk &= torch.arange(top_Bk.shape[1], device=top_Bk.device) < n_keep_B[:, None]
    return keep_Bk & (top_Bk >= cut_B[:, None]), cut_B


def select_above(pre_Bm: torch.Tensor, threshold: torch.Tensor) -> Gate:
    """Pairs whose pre-activation is positive and at least `threshold` (0-dim or [m]); no communication."""
    rows_N, cols_N = torch.nonzero((pre_Bm >= threshold) & (pre_Bm > 0), as_tuple=True)
    return Gate(rows_N, cols_N, threshold)


def _bucket_of(histogram: torch.Tensor, need: int) -> tuple[int, int, int]:
    """The highest bucket at or above which `need` values lie, how many lie above it, how many in it."""
    at_or_above = histogram.flip(0).cumsum(0)
    position = min(int(torch.searchsorted(at_or_above, need)), len(histogram) - 1)
    inside = int(histogram[len(histogram) - 1 - position])
    return len(histogram) - 1 - position, int(at_or_above[position]) - inside, inside


def _first_ties(
    pairs: Pairs, is_tie_N: torch.Tensor, need: int, shard: Shard, collectives: SelectionCollectives
) -> torch.Tensor:
    """Marks the ties that are among the first `need` of the whole mesh, in order of (token, latent id)."""
    order_N = (pairs.rows_N + shard.first_row) * shard.d_sae + pairs.cols_N + shard.first_latent
    cut = collectives.gather_mesh_ragged(order_N[is_tie_N]).sort().values[need - 1]
    return is_tie_N & (order_N <= cut)
