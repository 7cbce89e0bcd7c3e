"""Directions in the whitened space of unlabelled activations, where mean differences are LDA directions."""

from __future__ import annotations

import numpy as np
import torch

from sae_ray.reward.credit.base import LatentState, RewardBatch
from sae_ray.reward.credit.gates import debias

# Share of the active contexts that verdicts must confirm before a latent's direction is taken from them.
MIN_CONFIRMED = 0.25
RIDGE = 0.02  # of the mean variance
LOCAL_PCS = 2
CHUNK = 65536  # evidence tokens at once: a second copy of all of them would not fit beside the first


def whitener(x_TD: torch.Tensor, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [D], covariance [D, D] and ridge-regularised inverse covariance of unlabelled activations."""
    mean_D = x_TD.mean(0)
    cov_DD = x_TD.new_zeros(x_TD.shape[1], x_TD.shape[1])
    for part_TD in x_TD.split(CHUNK):
        centred_TD = part_TD - mean_D
        cov_DD += centred_TD.T @ centred_TD
    cov_DD /= len(x_TD)
    return mean_D, cov_DD, torch.linalg.inv(_ridged(cov_DD, ridge))


def projections(x_TD: torch.Tensor, centre_D: torch.Tensor, W_ND: torch.Tensor) -> torch.Tensor:
    """`(x - centre) @ W.T`, [T, N], without a centred copy of all tokens."""
    out_TN = x_TD.new_empty(len(x_TD), len(W_ND))
    for part_TD, out in zip(x_TD.split(CHUNK), out_TN.split(CHUNK), strict=True):
        torch.matmul(part_TD - centre_D, W_ND.T, out=out)
    return out_TN


def unit(direction_D: torch.Tensor, cov_DD: torch.Tensor) -> torch.Tensor:
    """Scales a direction so that its projection has unit variance."""
    return direction_D / (direction_D @ cov_DD @ direction_D).clamp(min=1e-12).sqrt()


def confirmed_weights(batch: RewardBatch, rows: np.ndarray, like: torch.Tensor) -> torch.Tensor | None:
    """Noise-corrected verdict times propensity of a latent's active rows; None where too few are confirmed.

    A weight is below 0 where the judge said no: the sum over rows is unbiased, a single one means nothing.
    """
    said_V = torch.tensor(batch.row_verdict[rows]).to(like)
    weight_V = torch.tensor(batch.row_weight[rows]).to(like)
    v = debias(said_V, batch.false_positive_rate, batch.false_negative_rate) * weight_V
    return v if float(v.sum()) > MIN_CONFIRMED * float(weight_V.sum()) else None


def judged_means(batch: RewardBatch, x_TD: torch.Tensor) -> list[torch.Tensor | None]:
    """Per latent the mean [D] of the activations whose contexts show its concept; None where that is not known."""
    means: list[torch.Tensor | None] = []
    for latent in batch.latents:
        rows = np.flatnonzero((batch.row_latent == latent) & batch.row_active)
        v = confirmed_weights(batch, rows, x_TD)
        x_VD = x_TD[torch.tensor(batch.row_token[rows], device=x_TD.device)]
        means.append(None if v is None else (v[:, None] * x_VD).sum(0) / v.sum())
    return means


def subspaces(batch: RewardBatch, latent: LatentState, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and, per latent, a basis [N, 2 + LOCAL_PCS, D] of directions in which it may usefully move.

    Spanned by its own direction (always the first), the judged mean difference, and the leading principal
    components of the tokens it is active on; orthonormal in the whitened space, so that projections
    `basis @ (x - mean)` of unlabelled tokens have unit variance and no correlation.
    """
    x_TD = x_TD.to(latent.W_enc_ND.dtype)
    mean_D, cov_DD, _ = whitener(x_TD)
    power_D, axes_DD = torch.linalg.eigh(_ridged(cov_DD, RIDGE))
    root_DD = (axes_DD * power_D.sqrt()) @ axes_DD.T
    inverse_root_DD = (axes_DD / power_D.sqrt()) @ axes_DD.T
    bases = []
    for j, judged_D in enumerate(judged_means(batch, x_TD)):
        rows = np.flatnonzero((batch.row_latent == batch.latents[j]) & batch.row_active)
        tokens = torch.tensor(batch.row_token[rows], device=x_TD.device)
        active_VD = (x_TD[tokens] - mean_D) @ inverse_root_DD
        spanning = [root_DD @ latent.W_enc_ND[j]]
        spanning.append(torch.zeros_like(mean_D) if judged_D is None else inverse_root_DD @ (judged_D - mean_D))
        bases.append(_orthonormal(spanning, active_VD) @ inverse_root_DD)
    return mean_D, torch.stack(bases)


def _orthonormal(spanning: list[torch.Tensor], active_VD: torch.Tensor) -> torch.Tensor:
    """[2 + LOCAL_PCS, D]: rows orthonormal or, where there is no further direction, zero."""
    rows: list[torch.Tensor] = []

    def rest(x: torch.Tensor) -> torch.Tensor:
        for row in rows:
            x = x - (x @ row)[..., None] * row
        return x

    for direction_D in spanning:
        left_D = rest(direction_D)
        norm = torch.linalg.vector_norm(left_D)
        known = norm > 1e-6 * torch.linalg.vector_norm(direction_D).clamp(min=1e-12)
        rows.append(left_D / norm.clamp(min=1e-12) * known)
    centred_VD = rest(active_VD - active_VD.mean(0)) if len(active_VD) else active_VD
    pcs_PD = active_VD.new_zeros(LOCAL_PCS, active_VD.shape[1])
    if len(centred_VD) > 2:
        _, size, found = torch.linalg.svd(centred_VD, full_matrices=False)
        pcs_PD[: len(found)] = (found * (size > 1e-9 * size[:1].clamp(min=1e-12))[:, None])[:LOCAL_PCS]
    return torch.cat([torch.stack(rows), pcs_PD])


def _ridged(cov_DD: torch.Tensor, ridge: float) -> torch.Tensor:
    eye_DD = torch.eye(len(cov_DD), dtype=cov_DD.dtype, device=cov_DD.device)
    return cov_DD + ridge * cov_DD.diagonal().mean() * eye_DD
