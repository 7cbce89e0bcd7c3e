"""Simplicity, second part: is what a latent stands for one thing?

A meta-SAE: a small dictionary A of K << M unit atoms, in which every unit
decoder row u is coded with at most k atoms (orthogonal matching pursuit, positively chosen). An atom is *shared* if
it also codes `shared_by` other rows. With S the shared atoms of u's code, P_S the projection on their span,

    composed(u) = max(0, ||P_S u||^2 - max over all its atoms a of (a . u)^2)

the share of u's squared length that two or more atoms explain together beyond what any one atom explains: 0 for a row
that is an atom or a copy of one, 1/2 for the sum of two orthogonal shared atoms, 1 - 1/n for n of them. Random unit
vectors score above 0 too, for k of K directions are chosen to suit them; `null` is their mean.
Reference: Bussmann, Pearce, Leask, Bloom, Sharkey & Nanda, "Showing SAE latents are not atomic using meta-SAEs"
(2024). Coding: Rubinstein, Zibulevsky & Elad, "Efficient implementation of the K-SVD algorithm" (2008), Batch-OMP;
dictionary update: Engan, Aase & Husoy, "Method of optimal directions" (1999).

Given the atoms, a shard needs its own rows alone.

Suffixes: M latents (m: of this shard), D width, K atoms, k atoms per code.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from sae_ray.errors import UserError

_BLOCK_ELEMENTS = 1 << 23  # of a [block, K] or [block, M] float32: 32 MB
_RIDGE = 1e-4


@dataclass(frozen=True)
class MetaDictionary:
    """atoms_KD: unit rows, float32. users_K: how many rows each codes, of all latents. k: atoms per code.
    explained: mean share of the fitted rows' squared length. cpu_s: CPU seconds of the fit."""

    atoms_KD: torch.Tensor
    users_K: torch.Tensor
    k: int
    explained: float
    cpu_s: float


@dataclass(frozen=True)
class Compositions:
    """Per latent, float32 [m]: composed as defined above; explained and single: ||P_S u||^2 and the best single
    atom's share. atom_mk: the code's atoms, -1 where it has fewer. null: mean `composed` of random directions."""

    composed: torch.Tensor
    explained: torch.Tensor
    single: torch.Tensor
    atom_mk: torch.Tensor
    null: float
    cpu_s: float


@torch.no_grad()
def fit_atoms(
    W_dec_MD: torch.Tensor,
    n_atoms: int | None = None,
    k: int = 4,
    rounds: int = 10,
    sample: int = 16_384,
    seed: int = 0,
) -> MetaDictionary:
    """Fits the meta dictionary to decoder rows: of all latents, or of a sample of them from every shard.

    Atoms start as rows that lie far apart. At most `sample` rows are used for fitting (drawn by `seed`; more if there
    are not four per atom), all for counting users.

    Args:
        n_atoms: None takes M / 20, as meta-SAEs have had, at least 2 and at most 4,096.
    Raises:
        UserError: more atoms than rows, or fewer atoms than k.
    """
    began = time.process_time()
    rows_MD, zero_M = unit_rows(W_dec_MD)
    rows_MD = rows_MD[~zero_M]
    n_rows = len(rows_MD)
    n_atoms = min(4096, max(2, k, n_rows // 20)) if n_atoms is None else n_atoms
    if not k <= n_atoms <= n_rows:
        raise UserError(
            f"a meta dictionary of {n_atoms} atoms for {n_rows} latents with {k} per code: needs k <= atoms <= M"
        )
    generator = torch.Generator().manual_seed(seed)
    used_MD = rows_MD[torch.randperm(n_rows, generator=generator)[: max(sample, 4 * n_atoms)].to(rows_MD.device)]
    atoms_KD = _spread_rows(used_MD, n_atoms, generator)
    explained = 0.0
    for step in range(rounds + 1):
        atom_Mk, weight_Mk, share_M = _code(used_MD, atoms_KD, k)
        explained = float(share_M.mean())
        if step < rounds:
            # Atoms that code few rows are stuck where others do their work; late in the fit they are just rare.
            least = len(used_MD) * k / n_atoms / 3 if 2 * step < rounds else 1
            atoms_KD = _updated(used_MD, atom_Mk, weight_Mk, share_M, atoms_KD, least)
    users_K = atom_users(rows_MD, atoms_KD, k)
    return MetaDictionary(atoms_KD, users_K, k, explained, time.process_time() - began)


@torch.no_grad()
def atom_users(W_dec_mD: torch.Tensor, atoms_KD: torch.Tensor, k: int) -> torch.Tensor:
    """How many of these rows each atom codes, int64 [K]. Counts of shards add up."""
    unit_mD, zero_m = unit_rows(W_dec_mD)
    atom_mk = _code(unit_mD[~zero_m], atoms_KD, k)[0]
    return torch.bincount(atom_mk[atom_mk >= 0], minlength=len(atoms_KD))


@torch.no_grad()
def compositions(W_dec_mD: torch.Tensor, meta: MetaDictionary, shared_by: int = 2, seed: int = 0) -> Compositions:
    """How far each row of a shard (or of the whole decoder) is composed; NaN for a row that is zero.

    Args:
        meta: with `users_K` of all latents, these among them.
        shared_by: other rows that an atom must code to count as shared.
    """
    began = time.process_time()
    unit_mD, zero_m = unit_rows(W_dec_mD)
    composed, explained, single, atom_mk = _composed(unit_mD, meta, meta.users_K - 1, shared_by)
    for value in (composed, explained, single):
        value[zero_m] = torch.nan
    generator = torch.Generator().manual_seed(seed)
    random_nD, _ = unit_rows(torch.randn(256, unit_mD.shape[1], generator=generator).to(unit_mD.device))
    null = float(_composed(random_nD, meta, meta.users_K, shared_by)[0].mean())
    return Compositions(composed, explained, single, atom_mk, null, time.process_time() - began)


def _composed(
    unit_mD: torch.Tensor, meta: MetaDictionary, others_K: torch.Tensor, shared_by: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    atom_mk = _code(unit_mD, meta.atoms_KD, meta.k)[0]
    there_mk = atom_mk >= 0
    index_mk = atom_mk.clamp(min=0)
    shared_mk = there_mk & (others_K.to(atom_mk.device)[index_mk] >= shared_by)
    inner_mk, explained_m = torch.empty_like(index_mk, dtype=torch.float32), torch.empty(len(unit_mD))
    for first in range(0, len(unit_mD), _rows(meta.k * unit_mD.shape[1])):
        block = slice(first, first + _rows(meta.k * unit_mD.shape[1]))
        atoms_bkD = meta.atoms_KD[index_mk[block]]
        inner_mk[block] = torch.einsum("bkd,bd->bk", atoms_bkD, unit_mD[block])
        explained_m[block] = _projected(atoms_bkD, inner_mk[block], shared_mk[block])[1].cpu()
    single_m = (inner_mk.square() * there_mk).amax(dim=1)
    explained_m = torch.where(shared_mk.sum(dim=1) >= 2, explained_m.to(single_m.device), 0)
    return (explained_m - single_m).clamp(min=0), explained_m, single_m, atom_mk


def _projected(
    atoms_bkD: torch.Tensor, inner_bk: torch.Tensor, used_bk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [b, k] of the projection on the span of the used atoms, and the share of the square that it keeps."""
    gram_bkk = torch.einsum("bid,bjd->bij", atoms_bkD, atoms_bkD)
    return _solved(gram_bkk, inner_bk, used_bk)


def _solved(gram_bkk: torch.Tensor, inner_bk: torch.Tensor, used_bk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both_bkk = used_bk[:, :, None] & used_bk[:, None, :]
    # Unused atoms become unit rows of their own, with nothing to explain. Float64: atoms may lie close together.
    identity_kk = torch.eye(gram_bkk.shape[1], dtype=torch.float64, device=gram_bkk.device)
    system_bkk = torch.where(both_bkk, gram_bkk.double(), identity_kk) + 1e-9 * identity_kk
    wanted_bk = torch.where(used_bk, inner_bk.double(), 0)
    weight_bk = torch.linalg.solve(system_bkk, wanted_bk)
    return weight_bk.float(), (weight_bk * wanted_bk).sum(dim=1).clamp(0, 1).float()


def _code(unit_MD: torch.Tensor, atoms_KD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes by Batch-OMP: atoms int64 [M, k] (-1: none left that correlates positively), weights, explained share."""
    gram_KK = atoms_KD @ atoms_KD.T
    atoms, weights, shares = [], [], []
    for rows_bD in unit_MD.split(_rows(len(atoms_KD))):
        start_bK = rows_bD @ atoms_KD.T
        atom_bk = torch.full((len(rows_bD), k), -1, dtype=torch.int64, device=rows_bD.device)
        weight_bk, share_b = start_bK.new_zeros(len(rows_bD), k), start_bK.new_zeros(len(rows_bD))
        left_bK = start_bK.clone()
        for step in range(k):
            best_b = left_bK.max(dim=1)
            open_b = best_b.values > 1e-6
            atom_bk[:, step] = torch.where(open_b, best_b.indices, -1)
            index_bk = atom_bk.clamp(min=0)
            gram_bkk = gram_KK[index_bk[:, :, None], index_bk[:, None, :]]
            weight_bk, share_b = _solved(gram_bkk, start_bK.gather(1, index_bk), atom_bk >= 0)
            if step + 1 < k:
                left_bK = start_bK.clone()
                for place in range(step + 1):
                    left_bK.addcmul_(weight_bk[:, place, None], gram_KK[index_bk[:, place]], value=-1)
                # Rounding must not choose an atom twice; a code that ended does not go on.
                left_bK.scatter_(1, index_bk[:, : step + 1], -torch.inf)
                left_bK[~open_b] = -torch.inf
        atoms.append(atom_bk)
        weights.append(weight_bk)
        shares.append(share_b)
    return torch.cat(atoms), torch.cat(weights), torch.cat(shares)


def _updated(
    unit_MD: torch.Tensor,
    atom_Mk: torch.Tensor,
    weight_Mk: torch.Tensor,
    share_M: torch.Tensor,
    atoms_KD: torch.Tensor,
    least: float,
) -> torch.Tensor:
    """The atoms that explain the rows best by these codes (least squares), unit length. One that codes fewer than
    `least` rows becomes what is left of a row that is explained worst."""
    n_atoms, index_Mk = len(atoms_KD), atom_Mk.clamp(min=0)
    weight_Mk = torch.where(atom_Mk >= 0, weight_Mk, 0)
    gram_KK = unit_MD.new_zeros(n_atoms * n_atoms)
    target_KD = torch.zeros_like(atoms_KD)
    for a in range(atom_Mk.shape[1]):
        target_KD.index_add_(0, index_Mk[:, a], weight_Mk[:, a, None] * unit_MD)
        for b in range(atom_Mk.shape[1]):
            gram_KK.index_add_(0, index_Mk[:, a] * n_atoms + index_Mk[:, b], weight_Mk[:, a] * weight_Mk[:, b])
    gram_KK = gram_KK.reshape(n_atoms, n_atoms)
    idle_K = gram_KK.diagonal() < 1e-6
    gram_KK = gram_KK + torch.diag(_RIDGE + idle_K.float())
    solved_KD = torch.cholesky_solve(target_KD, torch.linalg.cholesky(gram_KK))
    users_K = torch.bincount(atom_Mk[atom_Mk >= 0], minlength=n_atoms)
    lost_K = idle_K | (users_K < least) | (solved_KD.norm(dim=1) < 1e-6)
    worst = share_M.argsort()[: int(lost_K.sum())]
    if len(worst):
        left_nD = unit_MD[worst] - torch.einsum("nk,nkd->nd", weight_Mk[worst], atoms_KD[index_Mk[worst]])
        # A row that is explained whole leaves rounding: then the row itself.
        bare_n = left_nD.norm(dim=1) < 1e-3
        left_nD[bare_n] = unit_MD[worst[bare_n]]
        solved_KD[lost_K] = left_nD
    return unit_rows(solved_KD)[0]


def _spread_rows(unit_MD: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """n rows to start from, drawn in up to 64 turns with a probability of 1 - (largest cosine to those before)^2, from
    four times as many (k-means++ on lines, several at a time)."""
    pool_PD = unit_MD[: 4 * n]
    far_P = torch.ones(len(pool_PD), dtype=torch.float64)
    chosen: list[int] = []
    while len(chosen) < n:
        # Copies of chosen rows are at distance 0; where only they are left, they are what there is.
        chance_P = far_P if int((far_P > 1e-6).sum()) >= n - len(chosen) else far_P + 1e-6
        chance_P[chosen] = 0
        turn = min(max(1, n // 64), n - len(chosen))
        picks = torch.multinomial(chance_P, turn, generator=generator)
        chosen += picks.tolist()
        cosine_P = (pool_PD @ pool_PD[picks.to(pool_PD.device)].T).abs().amax(dim=1).cpu().double()
        far_P = torch.minimum(far_P, (1 - cosine_P.square()).clamp(min=0))
    return pool_PD[chosen].clone()


def unit_rows(rows_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of unit length, float32; which of them are zero and stay so)."""
    norm_M = rows_MD.float().norm(dim=1)
    return rows_MD.float() / norm_M.clamp(min=1e-12)[:, None], norm_M <= 1e-12


def _rows(width: int) -> int:
    return max(1, _BLOCK_ELEMENTS // width)
