"""The three training steps that `trainer_gpu.py` times: Triton kernels, plain PyTorch, dense autograd.

Each returns FVU and the gradients by W_enc, W_dec, b_enc and b_dec of the same loss.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from sae_ray.sae import sparse, triton_kernels, triton_selection
from sae_ray.sae.selection import Alone, Shard
from sae_ray.sae.triton_kernels import TILES, LatentGradients, Tiles

CHUNK_PAIRS = 65_536
Step = tuple[torch.Tensor, LatentGradients, torch.Tensor]


class Problem(NamedTuple):
    x_BD: torch.Tensor
    W_enc_mD: torch.Tensor
    W_dec_mD: torch.Tensor
    b_enc_m: torch.Tensor
    b_dec_D: torch.Tensor
    k: int
    batchwise: bool


def problem(args: argparse.Namespace) -> Problem:
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=args.device, dtype=dtype)

    W_mD = normal(args.d_sae, args.d_in)
    W_mD /= W_mD.norm(dim=1, keepdim=True)
    bias = normal(args.d_sae) * 0.1
    b_dec_D = normal(args.d_in) * 0.1
    return Problem(normal(args.batch, args.d_in), W_mD, W_mD.clone(), bias, b_dec_D, args.k, args.select == "batchtopk")


# ---------------------------------------------------------------------- three steps


def slope_of(p: Problem, decoded_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FVU and its gradient by the reconstruction."""
    error_BD = decoded_BD + p.b_dec_D - p.x_BD
    power = (p.x_BD - p.x_BD.mean(0)).float().square().sum()
    return error_BD.float().square().sum() / power, (error_BD * (2 / power)).to(p.x_BD.dtype)


def select(p: Problem, pre_Bm: torch.Tensor) -> triton_selection.Selected:
    if p.batchwise:
        n_rows, width = pre_Bm.shape
        return triton_selection.select_batch_topk(pre_Bm, n_rows * p.k, Shard(0, n_rows, 0, width), Alone())
    found = triton_selection.select_topk(pre_Bm, p.k, Alone())
    assert found is not None, "k is too large for the row kernel"
    return found


def our_step(p: Problem, tiles: Tiles = TILES) -> Step:
    centred_BD = p.x_BD - p.b_dec_D
    pre_Bm = torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T)
    codes = triton_selection.padded_codes(pre_Bm, select(p, pre_Bm))
    fvu, slope_BD = slope_of(p, triton_kernels.decode(codes, p.W_dec_mD, tiles))
    grads = triton_kernels.sparse_gradients(codes, p.W_dec_mD, slope_BD, centred_BD, tiles=tiles)
    by_b_dec = slope_BD.sum(0) - grads.b_enc_m.to(p.W_enc_mD.dtype) @ p.W_enc_mD
    return fvu, grads, by_b_dec


def plain_codes(p: Problem, pre_Bm: torch.Tensor) -> sparse.Codes:
    """`torch.topk` and `nonzero`, as a trainer without kernels selects."""
    if p.batchwise:
        flat_N = pre_Bm.view(-1).topk(len(pre_Bm) * p.k, sorted=False).indices.sort().values
        rows_N, cols_N = flat_N // pre_Bm.shape[1], flat_N % pre_Bm.shape[1]
    else:
        cols_N = pre_Bm.topk(p.k, dim=1, sorted=False).indices.sort(dim=1).values.view(-1)
        rows_N = torch.arange(len(pre_Bm), device=pre_Bm.device).repeat_interleave(p.k)
    vals_N = pre_Bm[rows_N, cols_N]
    live = vals_N > 0
    rows_N, cols_N, vals_N = rows_N[live], cols_N[live], vals_N[live]
    by_latent_N = torch.argsort(cols_N, stable=True)
    starts = [
        torch.cat([index.new_zeros(1), torch.bincount(index, minlength=size).cumsum(0)])
        for index, size in ((rows_N, pre_Bm.shape[0]), (cols_N, pre_Bm.shape[1]))
    ]
    return sparse.Codes(rows_N, cols_N, vals_N, starts[0], by_latent_N, starts[1])


def plain_dots(codes: sparse.Codes, y_BD: torch.Tensor, W_mD: torch.Tensor) -> torch.Tensor:
    parts = zip(codes.rows_N.split(CHUNK_PAIRS), codes.cols_N.split(CHUNK_PAIRS), strict=True)
    return torch.cat([(y_BD[rows] * W_mD[cols]).sum(1) for rows, cols in parts])


def plain_sum(index_N: torch.Tensor, starts: torch.Tensor, weight_N: torch.Tensor, src: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(index_N, src, starts[:-1], mode="sum", per_sample_weights=weight_N)


def plain_step(p: Problem) -> Step:
    centred_BD = p.x_BD - p.b_dec_D
    codes = plain_codes(p, torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T))
    fvu, slope_BD = slope_of(p, plain_sum(codes.cols_N, codes.row_start_B1, codes.vals_N, p.W_dec_mD))
    d_pre_N = plain_dots(codes, slope_BD, p.W_dec_mD)
    order = codes.by_latent_N
    rows_N, starts = codes.rows_N[order], codes.latent_start_m1
    by_W_enc = plain_sum(rows_N, starts, d_pre_N[order], centred_BD)
    by_W_dec = plain_sum(rows_N, starts, codes.vals_N[order], slope_BD)
    by_b_enc = torch.zeros_like(p.b_enc_m).index_add_(0, codes.cols_N, d_pre_N)
    return fvu, LatentGradients(by_W_enc, by_W_dec, by_b_enc), slope_BD.sum(0) - by_b_enc @ p.W_enc_mD


def dense_step(p: Problem, codes: sparse.Codes | None = None) -> Step:
    """Autograd through [B, d_sae]: two products forward, three backward (none by the inputs).

    Args:
        codes: active pairs to use; None selects them with `torch.topk`.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (p.W_enc_mD, p.W_dec_mD, p.b_enc_m, p.b_dec_D)]
    W_enc_mD, W_dec_mD, b_enc_m, b_dec_D = leaves
    pre_Bm = torch.addmm(b_enc_m, p.x_BD - p.b_dec_D, W_enc_mD.T)
    with torch.no_grad():
        codes = codes or plain_codes(p, pre_Bm.detach())
        mask = torch.zeros_like(pre_Bm, dtype=torch.bool)
        mask[codes.rows_N, codes.cols_N] = True
    x_hat_BD = torch.where(mask, pre_Bm, 0) @ W_dec_mD + b_dec_D
    power = (p.x_BD - p.x_BD.mean(0)).float().square().sum()
    fvu = (x_hat_BD - p.x_BD).float().square().sum() / power
    by_W_enc, by_W_dec, by_b_enc, by_b_dec = torch.autograd.grad(fvu, leaves)
    by_b_dec = by_b_dec - by_b_enc @ p.W_enc_mD
    return fvu.detach(), LatentGradients(by_W_enc, by_W_dec, by_b_enc), by_b_dec
