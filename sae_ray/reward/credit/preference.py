"""Pairwise preferences (Bradley-Terry) between contexts. RESEARCH.md section 1, candidate (d)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, LatentState, RewardBatch, State
from sae_ray.reward.credit.rows import context_pre, context_state, presence_of_rows, row_order, row_state
from sae_ray.reward.credit.trust import common_state, freshness
from sae_ray.reward.evidence import ContextLayout

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams

GOLDEN = (math.sqrt(5) - 1) / 2
PLASTIC = 0.7548776662466927, 0.5698402909980532  # of the two-dimensional sequence of lowest discrepancy


class Preference(CreditEstimator):
    """A context that shows the explanation shall have the larger gate than one that does not.

    With p the probability that the concept is in a context given its verdict (Bayes, with the judge's error rates and
    the presence among the latent's active or inactive rows), w inverse propensities and g = slope * pre / threshold,

        loss = gamma * sum_j c_j fresh_j * sum_ab h_ab softplus(g_b - g_a) / sum_ab h_ab,   h_ab = w_a p_a w_b (1 - p_b)

    the Bradley-Terry likelihood of the preferences that the verdicts imply, expected over the judge's errors: a yes on
    a text that rarely shows the concept is mostly an error and prefers little. A step draws PAIRS_PER_STEP pairs of
    each latent with those weights. The bias cancels: preferences turn a latent and do not move its threshold.
    """

    PAIRS_PER_STEP = 4

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> Preference:
        order = row_order(batch)
        state = common_state(settings, batch, latent)
        state |= row_state(batch, order, latent.W_enc_ND) | context_state(batch, order, latent, x_TD, layout)
        p_V = presence_of_rows(batch, latent.W_enc_ND)[torch.tensor(order, device=latent.W_enc_ND.device)]
        shows_V, total_N = _cumulative(state, state["row_weight"] * p_V)
        lacks_V, lacking_N = _cumulative(state, state["row_weight"] * (1 - p_V))
        # Where everything shows the concept, or nothing does, there is nothing to prefer.
        state["credit_N"] = state["credit_N"] * ((total_N > 0) & (lacking_N > 0))
        return cls(settings, state | {"row_shows": shows_V, "row_lacks": lacks_V})

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        state = self._state
        rows_N = state["latents"] - params.first_latent
        a_V, b_V = self._pairs(params.step)
        pre_V = context_pre(state, torch.cat([a_V, b_V]), params, rows_N)
        latent_V = state["row_latent"][a_V]
        unit_N = state.get("unit_N", threshold.expand_as(params.b_enc_m)[rows_N])
        scale_N = self._settings.slope / unit_N.clamp(min=1e-3)
        behind_V = (pre_V[len(a_V) :] - pre_V[: len(a_V)]) * scale_N[latent_V]
        sum_N = params.b_enc_m.new_zeros(len(rows_N)).index_add(0, latent_V, F.softplus(behind_V))
        weight_N = state["credit_N"] * freshness(self._settings, state, params.W_enc_mD[rows_N], params.step)
        return self._settings.gamma * (weight_N * sum_N / self.PAIRS_PER_STEP).sum()

    def _pairs(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (a, b) of a step's pairs, drawn by a sequence of each latent's own."""
        state, n_pairs = self._state, self.PAIRS_PER_STEP
        device = state["latents"].device
        counts_N = torch.bincount(state["row_latent"], minlength=len(state["latents"]))
        judged = torch.nonzero(counts_N).view(-1)
        turn = step * n_pairs + torch.arange(n_pairs, device=device, dtype=torch.float64)
        start_n = (state["latents"][judged].double() * GOLDEN) % 1
        picked = []
        for name, stride in zip(("row_shows", "row_lacks"), PLASTIC, strict=True):
            place_nP = judged[:, None] + (start_n[:, None] + turn * stride) % 1
            # Cumulative shares of latent j run from j to j + 1.
            ends_V = state["row_latent"] + state[name]
            first_n, last_n = (counts_N.cumsum(0) - counts_N)[judged], counts_N.cumsum(0)[judged] - 1
            found_nP = torch.searchsorted(ends_V, place_nP, right=True)
            picked.append(torch.minimum(torch.maximum(found_nP, first_n[:, None]), last_n[:, None]).view(-1))
        return picked[0], picked[1]


def _cumulative(state: State, weight_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative shares of the weight within each latent's rows (float64 [V]), and each latent's sum [N]."""
    index_V, w_V = state["row_latent"], weight_V.double()
    total_N = w_V.new_zeros(len(state["latents"])).index_add(0, index_V, w_V)
    before_N = total_N.cumsum(0) - total_N
    share_V = (w_V.cumsum(0) - before_N[index_V]) / total_N.clamp(min=1e-12)[index_V]
    return share_V.clamp(0, 1), total_N
