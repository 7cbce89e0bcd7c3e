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

from sae_ray.sae import triton_kernels
from sae_ray.sae.encoder import Pairs
from sae_ray.sae.selection import Gate

CHUNK_PAIRS = 65_536
DENSE_SHARE = 0.08  # of active pairs, above which dense products are faster than lists of pairs
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
        return cls.from_pairs(Pairs(gate.rows_N, gate.cols_N, pre_Bm[gate.rows_N, gate.cols_N]), *pre_Bm.shape)

    @classmethod
    def from_pairs(cls, pairs: Pairs, n_tokens: int, n_latents: int) -> Codes:
        """Codes of pairs in order of token and then latent."""
        return cls(
            *pairs,
            _starts(pairs.rows_N, n_tokens),
            torch.argsort(pairs.cols_N, stable=True),
            _starts(pairs.cols_N, n_latents),
        )

    def dense(self) -> torch.Tensor:
        """[B, m] with zeros where inactive."""
        out = self.vals_N.new_zeros(len(self.row_start_B1) - 1, len(self.latent_start_m1) - 1)
        out[self.rows_N, self.cols_N] = self.vals_N
        return out


class DenseCodes(NamedTuple):
    """Activations of which too many are active to list them. "N" is then [B, m] in every function below."""

    vals_N: torch.Tensor  # [B, m], zero where inactive
    support_N: torch.Tensor  # bool [B, m]

    def dense(self) -> torch.Tensor:
        return self.vals_N


def codes_of(vals_Bm: torch.Tensor, support_Bm: torch.Tensor) -> Codes | DenseCodes:
    """The codes of a dense result, as pairs where that is cheaper. Values outside the support are zero."""
    rows_N, cols_N = torch.nonzero(support_Bm, as_tuple=True)
    if len(rows_N) > DENSE_SHARE * support_Bm.numel():
        return DenseCodes(vals_Bm, support_Bm)
    return Codes.from_pairs(Pairs(rows_N, cols_N, vals_Bm[rows_N, cols_N]), *vals_Bm.shape)


def on_support(codes: Codes | DenseCodes, values_Bm: torch.Tensor) -> torch.Tensor:
    """Values of a [B, m] tensor at the pairs of `codes`, [N]."""
    if isinstance(codes, DenseCodes):
        return torch.where(codes.support_N, values_Bm, 0)
    return values_Bm[codes.rows_N, codes.cols_N]


def per_pair(codes: Codes | DenseCodes, values_m: torch.Tensor) -> torch.Tensor:
    """A number per latent, [m], at each pair."""
    return values_m if isinstance(codes, DenseCodes) else values_m[codes.cols_N]


def per_token(codes: Codes | DenseCodes, values_B: torch.Tensor) -> torch.Tensor:
    """A number per token, [B], at each pair."""
    return values_B[:, None] if isinstance(codes, DenseCodes) else values_B[codes.rows_N]


def decode(codes: Codes | DenseCodes, W_dec_mD: torch.Tensor) -> torch.Tensor:
    """`f @ W_dec`: [B, D], the part of the reconstruction that these latents give (no bias)."""
    if isinstance(codes, DenseCodes):
        return codes.vals_N @ W_dec_mD
    if not len(codes.vals_N):
        return W_dec_mD.new_zeros(len(codes.row_start_B1) - 1, W_dec_mD.shape[1])
    if triton_kernels.usable(W_dec_mD):
        return triton_kernels.decode(codes, W_dec_mD)
    return F.embedding_bag(codes.cols_N, W_dec_mD, codes.row_start_B1[:-1], mode="sum", per_sample_weights=codes.vals_N)


def dot_pairs(codes: Codes | DenseCodes, y_BD: torch.Tensor, W_mD: torch.Tensor) -> torch.Tensor:
    """`<y[row], W[col]>` of every active pair, [N]: the gradient of `decode` by the active values."""
    if isinstance(codes, DenseCodes):
        return (y_BD @ W_mD.T).mul_(codes.support_N)
    if not len(codes.vals_N):
        return codes.vals_N.new_zeros(0)
    if triton_kernels.usable(y_BD):
        return triton_kernels.dot_pairs(codes, y_BD, W_mD)
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


def sum_by_latent(codes: Codes | DenseCodes, weight_N: torch.Tensor, y_BD: torch.Tensor) -> torch.Tensor:
    """`sum over a latent's active tokens of weight * y[row]`: [m, D], zero rows for silent latents."""
    if isinstance(codes, DenseCodes):
        return weight_N.T @ y_BD
    if not len(weight_N):
        return y_BD.new_zeros(len(codes.latent_start_m1) - 1, y_BD.shape[1])
    if triton_kernels.usable(y_BD):
        return triton_kernels.sum_by_latent(codes, weight_N, y_BD)
    order = codes.by_latent_N
    return F.embedding_bag(
        codes.rows_N[order], y_BD, codes.latent_start_m1[:-1], mode="sum", per_sample_weights=weight_N[order]
    )


def sum_scalars_by_latent(codes: Codes | DenseCodes, weight_N: torch.Tensor) -> torch.Tensor:
    """`sum over a latent's active tokens of weight`: [m]."""
    if isinstance(codes, DenseCodes):
        return weight_N.sum(0)
    if triton_kernels.usable(weight_N):
        return triton_kernels.sum_scalars_by_latent(codes, weight_N)
    out_m = weight_N.new_zeros(len(codes.latent_start_m1) - 1)
    return out_m.index_add_(0, codes.cols_N, weight_N)


def sum_scalars_by_token(codes: Codes | DenseCodes, weight_N: torch.Tensor) -> torch.Tensor:
    """`sum over a token's active latents of weight`: [B]."""
    if isinstance(codes, DenseCodes):
        return weight_N.sum(1)
    out_B = weight_N.new_zeros(len(codes.row_start_B1) - 1)
    return out_B.index_add_(0, codes.rows_N, weight_N)


def _starts(index_N: torch.Tensor, size: int) -> torch.Tensor:
    starts = torch.zeros(size + 1, dtype=torch.int64, device=index_N.device)
    torch.cumsum(torch.bincount(index_N, minlength=size), 0, out=starts[1:])
    return starts
