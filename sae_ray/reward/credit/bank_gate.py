"""Gate BCE on the judged contexts themselves: RESEARCH.md section 1, candidate (b)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, LatentState, RewardBatch
from sae_ray.reward.credit.gates import gate_logit, observed
from sae_ray.reward.credit.rows import context_pre, context_state, row_order, row_state, rows_in_turn
from sae_ray.reward.credit.trust import common_state, freshness, gate_at
from sae_ray.reward.evidence import ContextLayout

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams


class BankGate(CreditEstimator):
    """Noise-aware gate BCE on the verdict bank.

    The gate of a context is the largest pre-activation of its tokens. With the judge's error rates,
    `p = fpr + (1 - fpr - fnr) * sigmoid(gate)` is the chance of a yes, and

        loss = gamma * sum_j c_j * fresh_j * sum_V w BCE(p, verdict) / sum_V w * active

    over the rows V of latent j, with w their inverse sampling propensities. A step takes some rows of each latent in
    turn and scales their sum up: over steps that is the loss above.
    """

    ROWS_PER_STEP = 4  # contexts per latent and step, which keeps a step near one batch's cost

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> BankGate:
        order = row_order(batch)
        state = common_state(settings, batch, latent)
        state |= row_state(batch, order, latent.W_enc_ND) | context_state(batch, order, latent, x_TD, layout)
        return cls(settings, state)

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        state = self._state
        rows_N = state["latents"] - params.first_latent
        pick_V, stands_for_N = rows_in_turn(state["row_latent"], len(rows_N), self.ROWS_PER_STEP, params.step)
        latent_V = state["row_latent"][pick_V]
        pre_V = context_pre(state, pick_V, params, rows_N)
        threshold_N, unit_N = gate_at(self._settings, state, threshold.expand_as(params.b_enc_m)[rows_N])
        logit_V = gate_logit(pre_V, threshold_N[latent_V], self._settings.slope, unit_N[latent_V])
        fpr, fnr = state["rates"].tolist()
        p_V = observed(torch.sigmoid(logit_V), fpr, fnr)
        bce_V = F.binary_cross_entropy(p_V.clamp(1e-4, 1 - 1e-4), state["row_verdict"][pick_V], reduction="none")
        zero_N = state["credit_N"].new_zeros(len(rows_N))
        sum_N = zero_N.index_add(0, latent_V, bce_V * state["row_weight"][pick_V]) * stands_for_N
        active_N = zero_N.index_add(0, state["row_latent"], state["row_weight"] * state["row_active"])
        weight_N = state["credit_N"] * freshness(self._settings, state, params.W_enc_mD[rows_N], params.step)
        return self._settings.gamma * (weight_N * sum_N / active_N.clamp(min=1)).sum()
