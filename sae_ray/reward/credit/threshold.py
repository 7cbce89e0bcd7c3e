"""Threshold calibration at controlled L0: only a latent's gate moves, to where its F1 is best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import (
    CreditEstimator,
    CreditSettings,
    Deltas,
    LatentState,
    RewardBatch,
    of_latents,
    on_device,
)
from sae_ray.reward.credit.cuts import cut_at, marked_share
from sae_ray.reward.credit.gates import observed, platt
from sae_ray.reward.credit.rows import padded, rows_of
from sae_ray.reward.credit.trust import common_state, freshness, rate_bound
from sae_ray.reward.credit.whitening import projections
from sae_ray.reward.evidence import ContextLayout, max_per_context

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams

GRID = 65
MIN_LIKELIHOOD_GAIN = 1.92  # 95% of one degree of freedom


class Threshold(CreditEstimator):
    """Moves `b_enc` of judged latents once, so that each marks the contexts which F1 asks it to.

    Half of the gap between an SAE and a probe is one scalar per latent (RESEARCH.md section 1). With s the margin of a
    context, `q(s) = sigmoid(a s + b)` the Platt map of the verdicts at the natural prior, judge's errors removed, and w
    the inverse propensities, a latent that marks the contexts above a cut has the expected

        F1(cut) = 2 sum_{s > cut} w q / (sum_{s > cut} w + sum w q)

    Let r_j be the share of contexts that latent j marks now, and m_j the factor by which it shall change:

        max_m  sum_j F1_j(m_j)   with   sum_j m_j r_j = sum_j r_j   and   |log m_j| <= log(MAX_RATE_CHANGE) n / (n + 32)

    n its effective verdicts; a latent whose verdicts do not depend on its margin stays where it is. The sum is over all
    trusted latents of the round, so L0 stays what it was: the price of a mark that holds it (the constraint's
    multiplier) is found by bisection, latents that over-fire pay for those that under-fire. All ranks solve the same
    problem from `row_margin` of the whole batch; where the batch has no margins, the sum is over the shard's latents.
    Then the pre-activations of all evidence contexts say which change of the bias makes the share m_j r_j. Only
    relative changes are applied: what the global threshold did since then stays.

    The activation's value changes with its bias, by as much as the gate does; the decoder follows by training.
    """

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> Threshold:
        x_TD = x_TD.to(latent.W_enc_ND)
        score_TN = projections(x_TD, latent.b_dec_D, latent.W_enc_ND)
        score_CN = max_per_context(score_TN, on_device(layout, score_TN.device))
        source = batch.trusted()
        if source.row_margin is None:
            # The order of contexts and Platt's map are the same for scores without bias and threshold.
            column_V = np.searchsorted(batch.latents, batch.row_latent)
            source, margin_V = batch, score_CN.cpu().double().numpy()[batch.row_context, column_V]
        else:
            margin_V = source.row_margin.astype(np.float64)
        factor = of_latents(rate_factors(source, margin_V), source, batch, missing=1.0)
        finite_CN = score_CN[torch.isfinite(score_CN).all(1)]
        count_N = torch.tensor(marked_share(batch)).to(score_CN) * len(finite_CN)
        now_N, then_N = (cut_at(finite_CN, count_N * f) for f in (1.0, torch.tensor(factor).to(score_CN)))
        state = common_state(settings, batch, latent)
        return cls(settings, state | {"shift_N": now_N - then_N, "given": torch.tensor(False)})

    def deltas(self, params: CreditParams, threshold: torch.Tensor) -> Deltas | None:
        state = self._state
        if bool(state["given"]):
            return None
        state["given"] = torch.tensor(True)
        rows_N = state["latents"] - params.first_latent
        fresh_N = freshness(self._settings, state, params.W_enc_mD[rows_N], params.step)
        return Deltas(rows_N, None, state["shift_N"] * fresh_N)


def rate_factors(batch: RewardBatch, margin_V: np.ndarray) -> np.ndarray:
    """[N]: by which factor each latent's share of marked contexts shall change; the shares' sum does not."""
    margin, verdict, weight = (
        torch.tensor(values, dtype=torch.float64) for values in (margin_V, batch.row_verdict, batch.row_weight)
    )
    rows = rows_of(batch)
    margin_NV, verdict_NV, weight_NV = padded([margin, verdict, weight], rows)
    rates = batch.false_positive_rate, batch.false_negative_rate
    slope_N, offset_N = platt(margin_NV, verdict_NV, weight_NV, rates)
    presence_NV = torch.sigmoid(slope_N[:, None] * margin_NV + offset_N[:, None])
    bound_N = np.log(rate_bound(batch)) * _informed(verdict_NV, presence_NV, weight_NV, rates)
    hits_NV = (weight_NV * presence_NV).numpy()
    share = marked_share(batch)
    log_factor_NG = bound_N[:, None] * np.linspace(-1, 1, GRID)
    f1_NG = np.empty_like(log_factor_NG)
    for j, row in enumerate(rows):
        order = np.argsort(-margin_V[row], kind="stable")
        mass = np.concatenate([[0.0], weight_NV[j].numpy()[: len(row)][order].cumsum()])
        hits = np.concatenate([[0.0], hits_NV[j, : len(row)][order].cumsum()])
        marked_G = share[j] * np.exp(log_factor_NG[j]) * mass[-1]
        f1_NG[j] = 2 * np.interp(marked_G, mass, hits) / np.maximum(marked_G + hits[-1], 1e-12)
    return np.exp(_at_equal_sum(f1_NG, log_factor_NG, share))


def _informed(
    verdict_NV: torch.Tensor, presence_NV: torch.Tensor, weight_NV: torch.Tensor, rates: tuple[float, float]
) -> np.ndarray:
    """[N], 0 or 1: whether verdicts depend on the margin, by the likelihood ratio against a presence that does not.

    Without a relation F1 has no best point, only one that more or fewer marks would shift to.
    """
    share_NV = weight_NV / weight_NV.sum(1, keepdim=True).clamp(min=1e-9)
    mean_NV = (share_NV * verdict_NV).sum(1, keepdim=True).expand_as(verdict_NV)

    def likelihood(p_NV: torch.Tensor) -> torch.Tensor:
        bce_NV = F.binary_cross_entropy(p_NV.clamp(1e-4, 1 - 1e-4), verdict_NV, reduction="none")
        return -(share_NV * bce_NV).sum(1) / share_NV.square().sum(1).clamp(min=1e-12)

    gain_N = likelihood(observed(presence_NV, *rates)) - likelihood(mean_NV)
    return (gain_N > MIN_LIKELIHOOD_GAIN).double().numpy()


def _at_equal_sum(value_NG: np.ndarray, log_factor_NG: np.ndarray, share_N: np.ndarray) -> np.ndarray:
    """Log factors [N] of the largest summed value at which `sum share * factor` is `sum share`."""
    share_NG = share_N[:, None] * np.exp(log_factor_NG)
    rows = np.arange(len(share_N))

    def best(price: float) -> np.ndarray:
        return np.argmax(value_NG - price * share_NG, axis=1)

    low, high = -1e9, 1e9  # at these prices everything is marked as widely, as narrowly as it may be
    for _ in range(100):
        middle = (low + high) / 2
        if share_NG[rows, best(middle)].sum() > share_N.sum():
            low = middle
        else:
            high = middle
    wide, narrow = log_factor_NG[rows, best(low)], log_factor_NG[rows, best(high)]
    # Neither price hits the sum on a grid: the point between them does.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if (share_N * np.exp((1 - middle) * wide + middle * narrow)).sum() > share_N.sum():
            low = middle
        else:
            high = middle
    return np.asarray((1 - high) * wide + high * narrow)
