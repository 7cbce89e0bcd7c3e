"""Teacher distillation: RESEARCH.md section 1, candidate (b')."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, LatentState, RewardBatch, on_device
from sae_ray.reward.credit.cuts import f1_cuts
from sae_ray.reward.credit.gates import gate_logit
from sae_ray.reward.credit.mixing import Directions
from sae_ray.reward.credit.trust import common_state, freshness, gate_at, rate_bound
from sae_ray.reward.credit.whitening import projections, unit, whitener
from sae_ray.reward.evidence import ContextLayout, max_per_context

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams


class TeacherGate(CreditEstimator):
    """Pseudo-labels of a per-latent teacher on the natural distribution.

    Per judged latent j, with S the covariance of unlabelled activations and v the noise-corrected verdicts
    on active contexts, the whitened mean difference `d_j = S^-1 (sum v x / sum v - mean)` is shrunk toward
    the encoder's own direction, both at unit S-norm: `t_j = shrink * w_j + (1 - shrink) * d_j`, the shrinkage of each
    latent chosen by held-out verdicts (`mixing`). A context is marked where a Platt map of its largest
    `t_j . (x - mean)`, fitted through the judge's error rates, gives the concept a probability above .4, where F1 is
    largest (`cuts.f1_cuts`), but the share of marked contexts stays within a factor of MAX_RATE_CHANGE ^ (n / (n + 32))
    of what the latent itself marks, n the effective verdicts: a few dozen cannot tell a rare concept from an absent
    one, and a teacher that marks nothing would silence its latent. Tokens above the cut are pseudo-positives y,
    expected r_j per token, and the gate BCE pulls the encoder's gate toward them on the natural distribution, B the
    tokens of the global batch:

        loss = gamma * sum_j c_j * fresh_j * sum_B BCE(slope * (pre - thr) / thr, y) / max(1, r_j B)
    """

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> TeacherGate:
        layout = on_device(layout, latent.W_enc_ND.device)
        x_TD = x_TD.to(latent.W_enc_ND)
        mean_D, cov_DD, inverse_DD = whitener(x_TD)
        own_ND = torch.stack([unit(w_D, cov_DD) for w_D in latent.W_enc_ND])
        directions = Directions(own_ND, x_TD, layout, mean_D, cov_DD, inverse_DD)
        teacher_ND = directions.best(batch) if settings.shrink is None else directions.mixed(batch, settings.shrink)
        score_TN = projections(x_TD, mean_D, teacher_ND)
        cut_N = f1_cuts(max_per_context(score_TN, layout), batch, rate_bound(batch))
        return cls(
            settings,
            common_state(settings, batch, latent)
            | {
                "W_ND": teacher_ND,
                "b_N": -(teacher_ND @ mean_D) - cut_N,
                "rate_N": (score_TN > cut_N).to(x_TD.dtype).mean(0),
            },
        )

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        if not self._settings.gamma:  # beside a policy gradient with a gamma of its own
            return None
        state = self._state
        rows_N = state["latents"] - params.first_latent
        label_BN = (torch.addmm(state["b_N"], x_BD, state["W_ND"].T) > 0).to(x_BD.dtype)
        W_ND, b_N = params.W_enc_mD[rows_N], params.b_enc_m[rows_N]
        pre_BN = torch.addmm(b_N, x_BD - params.b_dec_D, W_ND.T)
        threshold_N, unit_N = gate_at(self._settings, state, threshold.expand_as(params.b_enc_m)[rows_N])
        logit_BN = gate_logit(pre_BN, threshold_N, self._settings.slope, unit_N)
        bce_N = F.binary_cross_entropy_with_logits(logit_BN, label_BN, reduction="none").mean(0)
        bce_N = bce_N / state["rate_N"].clamp(min=1 / params.tokens(x_BD))
        weight_N = state["credit_N"] * freshness(self._settings, state, W_ND, params.step)
        return self._settings.gamma * (weight_N * bce_N).sum()
