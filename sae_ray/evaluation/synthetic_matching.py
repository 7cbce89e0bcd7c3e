"""Which latent stands for which feature: by decoder direction, one by one or as an optimal assignment.

Suffixes: M latents, F features, D dimensions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Costs = npt.NDArray[np.float64]


def cosines(a_MD: torch.Tensor, b_FD: torch.Tensor) -> torch.Tensor:
    """[M, F]; a row of zeros has cosine 0 with everything."""
    unit_MD = a_MD / a_MD.norm(dim=1, keepdim=True).clamp(min=1e-8)
    return unit_MD @ (b_FD / b_FD.norm(dim=1, keepdim=True).clamp(min=1e-8)).T


def best_features(W_dec_MD: torch.Tensor, directions_FD: torch.Tensor) -> torch.Tensor:
    """The feature that each latent's decoder row is most parallel to (up to sign), int64 [M]."""
    return cosines(W_dec_MD, directions_FD).abs().argmax(1)


def best_by_f1(fires_NM: torch.Tensor, on_NF: torch.Tensor) -> torch.Tensor:
    """The feature that each latent's firing is the best F1 detector of over these samples, int64 [M]."""
    both_MF = fires_NM.float().T @ on_NF.float()
    size_MF = fires_NM.sum(0)[:, None] + on_NF.sum(0)
    return (2 * both_MF / size_MF.clamp(min=1)).argmax(1)


def mcc(W_dec_MD: torch.Tensor, directions_FD: torch.Tensor) -> float:
    """Mean |cosine| of latents and features under the one-to-one assignment that makes it largest (2505.20254)."""
    similarity_MF = cosines(W_dec_MD, directions_FD).abs()
    if len(similarity_MF) > similarity_MF.shape[1]:
        similarity_MF = similarity_MF.T
    column_M = assign(1 - similarity_MF.double().numpy())
    return float(similarity_MF[torch.arange(len(column_M)), torch.from_numpy(column_M)].mean())


def uniqueness(W_dec_MD: torch.Tensor, directions_FD: torch.Tensor) -> float:
    """Distinct best features over latents: 1 where no two latents point at the same feature."""
    return len(best_features(W_dec_MD, directions_FD).unique()) / len(W_dec_MD)


def assign(cost_MF: Costs) -> npt.NDArray[np.int64]:
    """A column for each row, no column twice, at the least total cost; needs M <= F.

    Shortest augmenting paths with dual prices (Jonker & Volgenant, Computing 38, 1987). Rows whose cheapest column no
    other row wants start assigned to it, which is most of them here.
    """
    rows, columns = cost_MF.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot all have one of {columns} columns")
    row_of, column_of = np.full(columns, -1), np.full(rows, -1)
    price_F = np.zeros(columns)  # never above 0, and 0 where a column is free
    cheapest = cost_MF.argmin(1)
    for row in range(rows):
        if row_of[cheapest[row]] < 0:
            row_of[cheapest[row]], column_of[row] = row, cheapest[row]
    for row in np.flatnonzero(column_of < 0):
        _augment(cost_MF, int(row), price_F, row_of, column_of)
    return column_of


def _augment(
    cost_MF: Costs, start: int, price_F: Costs, row_of: npt.NDArray[np.int64], column_of: npt.NDArray[np.int64]
) -> None:
    """Assigns one more row: Dijkstra over reduced costs to the nearest free column, then prices and path in place."""
    distance_F = np.full(len(price_F), np.inf)
    before_F = np.full(len(price_F), -1)  # the row through which a column was reached
    done_F = np.zeros(len(price_F), dtype=bool)
    row, base = start, 0.0
    order: list[int] = []
    while True:
        reduced_F = cost_MF[row] - price_F
        # An assigned row's own column has reduced cost equal to the row's dual; a start's dual is 0.
        dual = 0.0 if row == start else float(reduced_F[column_of[row]])
        through_F = base + reduced_F - dual
        better_F = ~done_F & (through_F < distance_F)
        distance_F[better_F], before_F[better_F] = through_F[better_F], row
        column = int(np.where(done_F, np.inf, distance_F).argmin())
        base = float(distance_F[column])
        if row_of[column] < 0:
            break
        done_F[column] = True
        order.append(column)
        row = int(row_of[column])
    for seen in order:
        price_F[seen] += distance_F[seen] - base
    while True:
        row = int(before_F[column])
        row_of[column], column_of[row], column = row, column, int(column_of[row])
        if row == start:
            return
