"""Verdict rows as tensors: padded per latent for fitting, kept per shard for the steps.

A step uses a few rows of each latent, in turn. Which ones depends on the latent and the step alone, so a shard's
other latents (tp) do not change them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_ray.reward.credit.base import LatentState, RewardBatch, State, on_device
from sae_ray.reward.credit.gates import debias, posterior
from sae_ray.reward.evidence import ContextLayout

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams


def rows_of(batch: RewardBatch) -> list[np.ndarray]:
    """Rows of each latent, in order of `batch.latents`."""
    return [np.flatnonzero(batch.row_latent == latent) for latent in batch.latents]


def padded(columns: list[torch.Tensor], rows: list[np.ndarray]) -> list[torch.Tensor]:
    """[V] columns as [N, longest] ones, 0 where a latent has fewer rows."""
    width = max((len(row) for row in rows), default=0)
    out = [column.new_zeros(len(rows), width) for column in columns]
    for j, row in enumerate(rows):
        index = torch.from_numpy(row).to(columns[0].device)
        for column, full_NV in zip(columns, out, strict=True):
            full_NV[j, : len(row)] = column[index]
    return out


def row_order(batch: RewardBatch) -> np.ndarray:
    """Rows by latent, shuffled within each latent."""
    parts = [np.random.default_rng([3, int(latent)]).permutation(np.flatnonzero(batch.row_latent == latent))
             for latent in batch.latents]  # fmt: skip
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def row_state(batch: RewardBatch, order: np.ndarray, like: torch.Tensor) -> State:
    """The verdict columns of an estimator's state, in `row_order`."""

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values[order]).to(like)

    return {
        "row_latent": torch.tensor(np.searchsorted(batch.latents, batch.row_latent[order]), device=like.device),
        "row_verdict": column(batch.row_verdict),
        "row_weight": column(batch.row_weight),
        "row_active": column(batch.row_active),
        "rates": torch.tensor([batch.false_positive_rate, batch.false_negative_rate], dtype=like.dtype),
    }


def context_state(
    batch: RewardBatch, order: np.ndarray, latent: LatentState, x_TD: torch.Tensor, layout: ContextLayout
) -> State:
    """The tokens of the judged contexts, so that gates can be computed anew at every step."""
    device, dtype = latent.W_enc_ND.device, latent.W_enc_ND.dtype
    layout = on_device(layout, device)
    contexts = np.unique(batch.row_context)
    place_C = torch.full((layout.n_contexts,), -1, dtype=torch.int64, device=device)
    place_C[torch.tensor(contexts, device=device)] = torch.arange(len(contexts), device=device)
    x_CSD = torch.zeros(len(contexts), layout.context_tokens, x_TD.shape[1], dtype=dtype, device=device)
    mask_CS = torch.zeros(len(contexts), layout.context_tokens, dtype=torch.bool, device=device)
    kept_T = place_C[layout.context_T] >= 0
    where = place_C[layout.context_T[kept_T]], layout.offset_T[kept_T]
    x_CSD[where] = x_TD[kept_T].to(dtype)
    mask_CS[where] = True
    row_context = place_C[torch.tensor(batch.row_context[order], device=device)]
    return {"x_CSD": x_CSD, "mask_CS": mask_CS, "row_context": row_context}


def context_pre(state: State, pick_V: torch.Tensor, params: CreditParams, rows_N: torch.Tensor) -> torch.Tensor:
    """[picked]: largest pre-activation of each picked row's latent in its context; -inf where no token is kept."""
    latent_V, context_V = state["row_latent"][pick_V], state["row_context"][pick_V]
    W_ND, b_N = params.W_enc_mD[rows_N], params.b_enc_m[rows_N]
    x_VSD = state["x_CSD"][context_V] - params.b_dec_D
    pre_VS = torch.einsum("vsd,vd->vs", x_VSD, W_ND[latent_V]) + b_N[latent_V, None]
    return pre_VS.masked_fill(~state["mask_CS"][context_V], -torch.inf).amax(1)


def rows_in_turn(row_latent: torch.Tensor, n_latents: int, per_latent: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip # noqa: E501
    """The rows of a step: at most `per_latent` of each latent, the next ones at the next step.

    Returns:
        Places of the rows, and per latent how many of its rows each of them stands for.
    """
    counts_N = torch.bincount(row_latent, minlength=n_latents)
    start_N = counts_N.cumsum(0) - counts_N
    turn = torch.arange(per_latent, device=row_latent.device)
    place_NR = start_N[:, None] + (step * per_latent + turn) % counts_N.clamp(min=1)[:, None]
    pick_V = place_NR[turn < counts_N[:, None]]
    return pick_V, counts_N / counts_N.clamp(1, per_latent)


def presence_of_rows(batch: RewardBatch, like: torch.Tensor) -> torch.Tensor:
    """[V]: P(concept present | verdict), its prior the noise-corrected share of yes among the latent's active rows, or
    among its inactive ones: with a judge that errs, a yes on a random text is mostly wrong."""
    rates = (batch.false_positive_rate, batch.false_negative_rate)
    stratum = 2 * np.searchsorted(batch.latents, batch.row_latent) + batch.row_active
    index_V = torch.tensor(stratum, device=like.device)
    verdict_V, weight_V = (torch.tensor(values).to(like) for values in (batch.row_verdict, batch.row_weight))
    none = like.new_zeros(2 * len(batch.latents))
    yes = none.index_add(0, index_V, weight_V * debias(verdict_V, *rates))
    prior = (yes / none.index_add(0, index_V, weight_V).clamp(min=1e-9)).clamp(0, 1)
    return posterior(verdict_V, prior[index_V], rates)
