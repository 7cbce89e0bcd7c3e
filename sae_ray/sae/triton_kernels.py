"""Triton forms of the sparse products of `sparse`, for GPUs; `sparse` stays the reference.

Same meaning, same results to rounding, deterministic. Sums are float32, whatever the inputs. What is gained: one
kernel per product instead of several, no float32 copies, both gradients of a latent in one traversal, no host
sync, and a block of columns at a time, so that gathered rows come from L2. Nothing here imports triton until a
kernel is launched.

Pairs after `row_start[-1]` are padding (see `triton_selection`): they count for nothing.

Suffixes: B tokens, m latents of this shard, D d_in, N pairs, S segments (rows or latents), P parts of long ones.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from sae_ray.sae.sparse import Codes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tiles(NamedTuple):
    """Shapes of the work of one program. They change speed, and results only by rounding."""

    sum_block: int = 512  # columns of a gather-sum program
    sum_pairs: int = 8  # pairs it loads at once
    gradient_block: int = 512
    gradient_pairs: int = 4
    dot_block: int = 512
    dot_pairs: int = 8
    long: int = 256  # a row or latent with more pairs is split into parts of this many
    dot_by_latent: bool = True  # visit pairs by latent: a row of W is read from memory once
    one_pass: bool = False  # dot products and gradients in one kernel, while d_in fits in its registers


TILES = Tiles()
ONE_PASS_COLUMNS = 8192


@cache
def available() -> bool:
    """Whether kernels can run: triton is installed, and there is a GPU or Triton's interpreter is on."""
    return importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or interpreted())


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: on a GPU, of a type that they sum in float32."""
    return available() and all(tensor.is_cuda and tensor.dtype in DTYPES for tensor in tensors)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """The one place where kernels start; a grid of nothing is not started."""
    if all(grid):
        with torch.cuda.device_of(args[0]):  # triton launches on the current device, wherever the tensors are
            kernel[grid](*args, **constants)


def decode(codes: Codes, W_dec_mD: torch.Tensor, tiles: Tiles = TILES) -> torch.Tensor:
    """`f @ W_dec`: [B, D] in W_dec's type."""
    start_B1 = codes.row_start_B1
    return _gather_sum(start_B1, codes.cols_N, codes.vals_N, W_dec_mD, tiles)


def decode_topk(
    vals_Bk: torch.Tensor, cols_Bk: torch.Tensor, W_dec_mD: torch.Tensor, tiles: Tiles = TILES
) -> torch.Tensor:
    """`decode` of exactly k pairs per token (value 0 where fewer are active): [B, D], without offsets."""
    from sae_ray.sae import triton_jit as jit

    n_rows, k = vals_Bk.shape
    out_BD = torch.empty(n_rows, W_dec_mD.shape[1], dtype=W_dec_mD.dtype, device=W_dec_mD.device)
    W_dec_mD = W_dec_mD.contiguous()
    _launch_sum(jit, None, cols_Bk.contiguous(), vals_Bk.contiguous(), W_dec_mD, out_BD, None, tiles, k=k)
    return out_BD


def dot_pairs(
    codes: Codes,
    y_BD: torch.Tensor,
    W_mD: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    tiles: Tiles = TILES,
) -> torch.Tensor:
    """`<y[row], W[col]>` of every pair, [N] in y's type; 0 for padding."""
    live = codes.row_start_B1[-1:]
    order = codes.by_latent_N if tiles.dot_by_latent else None
    return _dot(codes.rows_N, codes.cols_N, order, live, y_BD, W_mD, 0, out_dtype or y_BD.dtype, tiles)


def dot_topk(y_BD: torch.Tensor, cols_Bk: torch.Tensor, W_mD: torch.Tensor, tiles: Tiles = TILES) -> torch.Tensor:
    """`<y[row], W[cols[row, j]]>` of exactly k pairs per token: [B, k] in y's type."""
    cols_N = cols_Bk.reshape(-1)
    out_N = _dot(cols_N, cols_N, None, cols_N, y_BD, W_mD, cols_Bk.shape[1], y_BD.dtype, tiles)
    return out_N.view(cols_Bk.shape)


def sum_by_latent(codes: Codes, weight_N: torch.Tensor, y_BD: torch.Tensor, tiles: Tiles = TILES) -> torch.Tensor:
    """`sum over a latent's active tokens of weight * y[row]`: [m, D] in y's type, zero rows for silent latents."""
    order = codes.by_latent_N
    return _gather_sum(codes.latent_start_m1, codes.rows_N[order], weight_N[order], y_BD, tiles)


def sum_scalars_by_latent(codes: Codes, weight_N: torch.Tensor) -> torch.Tensor:
    """`sum over a latent's active tokens of weight`: [m], without the atomic adds of `index_add_`."""
    from sae_ray.sae import triton_jit as jit

    n_latents = len(codes.latent_start_m1) - 1
    out_m = torch.empty(n_latents, dtype=weight_N.dtype, device=weight_N.device)
    weights = weight_N[codes.by_latent_N]
    launch(jit.segment_totals, (n_latents,), codes.latent_start_m1, weights, out_m, BLOCK=64, num_warps=1)
    return out_m


class LatentGradients(NamedTuple):
    W_enc_mD: torch.Tensor
    W_dec_mD: torch.Tensor
    b_enc_m: torch.Tensor  # float32


def gradients_by_latent(
    codes: Codes,
    d_pre_N: torch.Tensor,
    slope_BD: torch.Tensor,
    centred_BD: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    tiles: Tiles = TILES,
) -> LatentGradients:
    """`sum_by_latent` of both weights and `sum_scalars_by_latent`, in one traversal.

    Args:
        d_pre_N: gradient by each active pre-activation; weighs `centred_BD` for W_enc.
        slope_BD: gradient by the reconstruction; weighed with the active values for W_dec.
        out_dtype: of the two matrices; None is the inputs' own.
    """
    from sae_ray.sae import triton_jit as jit

    order, start_m1 = codes.by_latent_N, codes.latent_start_m1
    grads = _empty_gradients(codes, slope_BD, out_dtype)
    rows, weight, value = codes.rows_N[order], d_pre_N[order], codes.vals_N[order]
    second = (value, slope_BD.contiguous(), grads.W_dec_mD, grads.b_enc_m)
    _launch_sum(jit, start_m1, rows, weight, centred_BD.contiguous(), grads.W_enc_mD, second, tiles)
    return grads


def sparse_gradients(
    codes: Codes,
    W_dec_mD: torch.Tensor,
    slope_BD: torch.Tensor,
    centred_BD: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    tiles: Tiles = TILES,
) -> LatentGradients:
    """Gradients by W_enc, W_dec and b_enc of a loss with slope `slope_BD` by the decoded sum.

    `dot_pairs` and `gradients_by_latent`, or (tiles.one_pass) one kernel that does both. For activations whose
    gradient is that of the reconstruction alone; others compute `d_pre_N` themselves.
    """
    if not tiles.one_pass or W_dec_mD.shape[1] > ONE_PASS_COLUMNS:
        d_pre_N = dot_pairs(codes, slope_BD, W_dec_mD, torch.float32, tiles)
        return gradients_by_latent(codes, d_pre_N, slope_BD, centred_BD, out_dtype, tiles)
    from sae_ray.sae import triton_jit as jit

    n_latents, D = W_dec_mD.shape
    start_m1, order = codes.latent_start_m1, codes.by_latent_N
    grads = _empty_gradients(codes, slope_BD, out_dtype)
    rows, values = codes.rows_N[order], codes.vals_N[order]
    sources = (W_dec_mD.contiguous(), slope_BD.contiguous(), centred_BD.contiguous())
    block = max(16, 1 << (D - 1).bit_length())
    constants = {"LONG": tiles.long, "BLOCK_D": block, "num_warps": max(1, min(16, block // 512))}
    whole = (start_m1, start_m1[1:], rows, values, *sources, start_m1, *grads, D)
    launch(jit.latent_gradients, (n_latents,), *whole, OWNED=False, **constants)
    parts = _long_parts(start_m1, len(values), tiles.long)
    if parts is not None:
        piece = _empty_parts(parts, D, slope_BD.device)
        split = (parts.first_P, parts.last_P, rows, values, *sources, parts.latent_P, *piece, D)
        launch(jit.latent_gradients, (len(parts.owner_P),), *split, OWNED=True, **constants)
        _merge(jit, parts, piece, grads, tiles)
    return grads


# ---------------------------------------------------------------------- how a sum by segments is run


class _Parts(NamedTuple):
    """Long segments cut into parts, as many as could exist; owner -1 and no pairs where there are fewer."""

    first_P: torch.Tensor
    last_P: torch.Tensor
    owner_P: torch.Tensor
    latent_P: torch.Tensor  # the owner, or 0


def _long_parts(start_S1: torch.Tensor, n_pairs: int, long: int) -> _Parts | None:
    # A segment of c > long pairs has at most c / long + 1 parts, and there are at most n_pairs / (long + 1) of them.
    capacity = n_pairs // long + n_pairs // (long + 1)
    if n_pairs <= long:
        return None
    count_S = start_S1.diff()
    parts_S = torch.where(count_S > long, (count_S + long - 1) // long, 0)
    end_S = parts_S.cumsum(0)
    part_P = torch.arange(capacity, device=start_S1.device)
    owner_P = torch.searchsorted(end_S, part_P, right=True)
    exists_P = part_P < end_S[-1]
    segment_P = torch.where(exists_P, owner_P, 0)
    first_P = start_S1[segment_P] + (part_P - end_S[segment_P] + parts_S[segment_P]) * long
    last_P = torch.minimum(first_P + long, start_S1[segment_P + 1])
    first_P = torch.where(exists_P, first_P, 0)
    return _Parts(first_P, torch.where(exists_P, last_P, 0), torch.where(exists_P, owner_P, -1), segment_P)


def _gather_sum(
    start_S1: torch.Tensor, index_N: torch.Tensor, weight_N: torch.Tensor, src: torch.Tensor, tiles: Tiles
) -> torch.Tensor:
    from sae_ray.sae import triton_jit as jit

    out = torch.empty(len(start_S1) - 1, src.shape[1], dtype=src.dtype, device=src.device)
    _launch_sum(jit, start_S1, index_N, weight_N, src.contiguous(), out, None, tiles)
    return out


def _launch_sum(
    jit: Any,
    start_S1: torch.Tensor | None,
    index_N: torch.Tensor,
    weight_N: torch.Tensor,
    src: torch.Tensor,
    out_SD: torch.Tensor,
    second: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None,
    tiles: Tiles,
    k: int = 0,
) -> None:
    """Short segments at once; long ones in parts, which a second kernel adds up in order."""
    n_segments, D = out_SD.shape
    block, pairs = (tiles.gradient_block, tiles.gradient_pairs) if second else (tiles.sum_block, tiles.sum_pairs)
    constants = {"BOTH": second is not None, "PAIRS": pairs, "BLOCK_D": block, "num_warps": _warps(block, src)}
    columns = -(-D // block)
    weight2, src2, out2, total = second or (weight_N, src, out_SD, out_SD)
    start = index_N if start_S1 is None else start_S1  # not read when all segments have k pairs
    whole = (start, start[1:], index_N, weight_N, src, out_SD, weight2, src2, out2, total, D)
    long = k if k else tiles.long
    launch(jit.gather_sum, (n_segments, columns), *whole, LONG=long, K=k, **constants)
    parts = None if start_S1 is None else _long_parts(start_S1, len(weight_N), tiles.long)
    if parts is None:
        return
    piece = _empty_parts(parts, D, src.device, both=second is not None)
    args = (parts.first_P, parts.last_P, index_N, weight_N, src, piece[0], weight2, src2, piece[1], piece[2], D)
    launch(jit.gather_sum, (len(parts.owner_P), columns), *args, LONG=long, K=0, **constants)
    _merge(jit, parts, piece, LatentGradients(out_SD, out2, total), tiles, both=second is not None)


def _merge(
    jit: Any,
    parts: _Parts,
    piece: LatentGradients,
    out: LatentGradients,
    tiles: Tiles,
    both: bool = True,
) -> None:
    n_parts, D = piece.W_enc_mD.shape
    args = (parts.owner_P, piece[0], out[0], piece[1], out[1], piece[2], out[2], n_parts, D)
    grid = (n_parts, -(-D // tiles.sum_block))
    launch(
        jit.merge_parts, grid, *args, BOTH=both, BLOCK_D=tiles.sum_block, num_warps=_warps(tiles.sum_block, piece[0])
    )


def _empty_parts(parts: _Parts, D: int, device: torch.device, both: bool = True) -> LatentGradients:
    n_parts = len(parts.owner_P)
    first = torch.empty(n_parts, D, dtype=torch.float32, device=device)
    second = torch.empty_like(first) if both else first
    return LatentGradients(first, second, torch.empty(n_parts, dtype=torch.float32, device=device))


def _empty_gradients(codes: Codes, slope_BD: torch.Tensor, out_dtype: torch.dtype | None) -> LatentGradients:
    n_latents, device = len(codes.latent_start_m1) - 1, slope_BD.device
    enc = torch.empty(n_latents, slope_BD.shape[1], dtype=out_dtype or slope_BD.dtype, device=device)
    return LatentGradients(enc, torch.empty_like(enc), torch.empty(n_latents, dtype=torch.float32, device=device))


def _dot(
    rows_N: torch.Tensor,
    cols_N: torch.Tensor,
    order_N: torch.Tensor | None,
    live: torch.Tensor,
    y_BD: torch.Tensor,
    W_mD: torch.Tensor,
    k: int,
    out_dtype: torch.dtype,
    tiles: Tiles,
) -> torch.Tensor:
    from sae_ray.sae import triton_jit as jit

    n_pairs = len(cols_N)
    out_N = torch.empty(n_pairs, dtype=out_dtype, device=y_BD.device)
    args = (rows_N, cols_N, rows_N if order_N is None else order_N, live, y_BD.contiguous(), W_mD.contiguous(), out_N)
    constants = {"K": k, "ORDERED": order_N is not None, "PAIRS": tiles.dot_pairs, "BLOCK_D": tiles.dot_block}
    grid = (-(-n_pairs // tiles.dot_pairs),)
    launch(jit.dot_pairs, grid, *args, n_pairs, y_BD.shape[1], **constants, num_warps=4)
    return out_N


def _warps(block: int, src: torch.Tensor) -> int:
    """As many as load one row of a tile in 16-byte pieces: the sum over its pairs then stays inside threads."""
    return max(1, min(8, block * src.element_size() // 512))
