"""Reward-weighted sparsity: a higher reward makes a latent cheaper to select. RESEARCH.md section 1, candidate (e)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, LatentState, RewardBatch, of_latents
from sae_ray.reward.credit.gates import debias
from sae_ray.reward.credit.trust import common_state, evidence_share, freshness
from sae_ray.reward.evidence import ContextLayout

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams


class SelectionBonus(CreditEstimator):
    """A bonus at selection of `bonus * advantage` thresholds, applied at every step while it is fresh.

    The advantage of a latent is its reward minus the mean reward of all trusted latents of the round. Without rewards
    in the batch, the reward is the latent's precision: the noise-corrected share of yes among its active contexts,

        R_j = sum_V w (verdict - fpr) / (1 - fpr - fnr) / sum_V w,   shrunk to the mean by n / (n + 32)

    with n its effective verdicts. Sparsity decides what an absorbed parent loses; this attacks that cause: in a
    topk-like SAE latent j is selected where `pre_j + bonus_j * threshold` is among the largest, in jumprelu an active
    pair of it costs `1 - bonus_j` of the common price. The advantages of the round sum to zero, so that L0 at
    inference, which has no bonus, stays near the training's. It decides on which samples a latent learns, and turns no
    direction: rewards for simple directions cured none that were not (docs/credit.md).
    """

    uses_reward: ClassVar[bool] = True

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> SelectionBonus:
        trusted = batch.trusted()
        advantage = of_latents(advantages(trusted), trusted, batch, missing=0.0)
        state = common_state(settings, batch, latent)
        state["bonus_N"] = torch.tensor(settings.bonus * advantage).to(latent.W_enc_ND)
        return cls(settings, state)

    def selection(self, params: CreditParams) -> torch.Tensor | None:
        state = self._state
        rows_N = state["latents"] - params.first_latent
        fresh_N = freshness(self._settings, state, params.W_enc_mD[rows_N], params.step)
        out_m = torch.zeros_like(params.b_enc_m)
        out_m[rows_N] = state["bonus_N"] * fresh_N
        return out_m


def advantages(batch: RewardBatch) -> np.ndarray:
    """float64 [N], between -1 and 1: rewards minus their mean; 0 where a reward is missing."""
    if batch.reward is not None:
        reward = batch.reward.astype(np.float64)
        known = np.isfinite(reward)
        mean = reward[known].mean() if known.any() else 0.0
        return np.where(known, np.clip(reward - mean, -1, 1), 0.0)
    place = np.searchsorted(batch.latents, batch.row_latent)
    weight = np.where(batch.row_active, batch.row_weight, 0).astype(np.float64)
    yes = debias(torch.tensor(batch.row_verdict).double(), batch.false_positive_rate, batch.false_negative_rate)
    total = np.bincount(place, weight, len(batch.latents))
    precision = np.bincount(place, weight * yes.numpy(), len(batch.latents)) / np.maximum(total, 1e-9)
    # A latent without active rows has share 0: its reward is the mean.
    share = evidence_share(batch)
    mean = (share * precision).sum() / max(share.sum(), 1e-9)
    pulled = share * (precision - mean)
    return np.asarray(np.clip(pulled - pulled.mean(), -1, 1))
