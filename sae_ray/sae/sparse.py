"""Sparse activations and the three products that a sparse decode and its gradients need.

Each product visits the active (token, latent) pairs only: about B*k of them instead of B*m. On CPU,
`embedding_bag` is a row-wise weighted sum without an intermediate [N, D]; results are deterministic.

Suffixes: B tokens, m latents of this shard, D d_in, N active pairs.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sae_ray.sae.selection import Gate

CHUNK_PAIRS = 65_536
# torch says once per process that CSR is beta; only `sampled_addmm` is used, and tested against a gather.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class Codes(NamedTuple):
    """Active pairs sorted by (token, latent), with the offsets of each token and of each latent."""

    rows_N: torch.Tensor
    cols_N: torch.Tensor
    vals_N: torch.Tensor
    row_start_B1: torch.Tensor  # int64 [B+1]
    by_latent_N: torch.Tensor  # permutation that sorts the pairs by (latent, token)
    latent_start_m1: torch.Tensor  # int64 [m+1]

    @classmethod
    def of(cls, pre_Bm: torch.Tensor, gate: Gate) -> Codes:
        """Codes of the pairs that `gate` lets pass, valued by their (positive) pre-activations."""
        n_rows, n_latents = pre_Bm.shape
        vals_N = pre_Bm[gate.rows_N, gate.cols_N]
        return cls(
            gate.rows_N,
            gate.cols_N,
            vals_N,
            _starts(gate.rows_N, n_rows),
            torch.argsort(gate.cols_N, stable=True),
            _starts(gate.cols_N, n_latents),
        )

    def dense(self) -> torch.Tensor:
        """[B, m] with zeros where inactive."""
        out = self.vals_N.new_zeros(len(self.row_start_B1) - 1, len(self.latent_start_m1) - 1)
        out[self.rows_N, self.cols_N] = self.vals_N
        return out


def decode(codes: Codes, W_dec_mD: torch.Tensor) -> torch.Tensor:
    """`f @ W_dec`: [B, D], the part of the reconstruction that these latents give (no bias)."""
    if not len(codes.vals_N):
        return W_dec_mD.new_zeros(len(codes.row_start_B1) - 1, W_dec_mD.shape[1])
    return F.embedding_bag(codes.cols_N, W_dec_mD, codes.row_start_B1[:-1], mode="sum", per_sample_weights=codes.vals_N)


def dot_pairs(codes: Codes, y_BD: torch.Tensor, W_mD: torch.Tensor) -> torch.Tensor:
    """`<y[row], W[col]>` of every active pair, [N]: the gradient of `decode` by the active values."""
    if not len(codes.vals_N):
        return codes.vals_N.new_zeros(0)
    if y_BD.is_cuda or torch.backends.mkl.is_available():
        pattern = torch.sparse_csr_tensor(
            codes.row_start_B1,
            codes.cols_N,
            codes.vals_N,
            (y_BD.shape[0], W_mD.shape[0]),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, y_BD, W_mD.T, beta=0.0).values()
    parts = zip(codes.rows_N.split(CHUNK_PAIRS), codes.cols_N.split(CHUNK_PAIRS), strict=True)
    return torch.cat([(y_BD[rows] * W_mD[cols]).sum(1) for rows, cols in parts])


def sum_by_latent(codes: Codes, weight_N: torch.Tensor, y_BD: torch.Tensor) -> torch.Tensor:
    """`sum over a latent's active tokens of weight * y[row]`: [m, D], zero rows for silent latents."""
    if not len(weight_N):
        return y_BD.new_zeros(len(codes.latent_start_m1) - 1, y_BD.shape[1])
    order = codes.by_latent_N
    return F.embedding_bag(
        codes.rows_N[order], y_BD, codes.latent_start_m1[:-1], mode="sum", per_sample_weights=weight_N[order]
    )


def sum_scalars_by_latent(codes: Codes, weight_N: torch.Tensor) -> torch.Tensor:
    """`sum over a latent's active tokens of weight`: [m]."""
    out_m = weight_N.new_zeros(len(codes.latent_start_m1) - 1)
    return out_m.index_add_(0, codes.cols_N, weight_N)


def _starts(index_N: torch.Tensor, size: int) -> torch.Tensor:
    starts = torch.zeros(size + 1, dtype=torch.int64, device=index_N.device)
    torch.cumsum(torch.bincount(index_N, minlength=size), 0, out=starts[1:])
    return starts
