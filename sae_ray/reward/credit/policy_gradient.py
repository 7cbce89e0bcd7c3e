"""Policy gradient for causality: RLOO over generations of the steered model. RESEARCH.md section 1, candidate (f)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, LatentState, RewardBatch, Rollouts
from sae_ray.reward.credit.trust import TURN_VERDICTS, common_state, freshness, information, judged_rows
from sae_ray.reward.credit.whitening import whitener
from sae_ray.reward.evidence import ContextLayout

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams

MIN_ROLLOUTS = 2  # fewer have no baseline


class PolicyGradient(CreditEstimator):
    """Turns decoder rows, and encoder rows with them, toward directions whose steering is rewarded.

    A latent's rollouts k = 1..K have rewards R_k and perturbations u_k, uniform on the unit sphere, of its direction by
    sigma. The baseline of each is the mean reward of the others (RLOO, Kool et al. 2019),

        A_k = R_k - sum_{l != k} R_l / (K - 1),      g = sum_k A_k h_k / K

    which is unbiased: A_k's baseline does not depend on rollout k. h_k is the gradient of the rollout's log-probability
    by the direction where one is given (policy gradient through the steered model), else `D / sigma * u_k`, whose
    expectation is the gradient of the reward smoothed over the ball of radius sigma (Flaxman et al. 2005). g is
    clipped to norm 1, and

        loss = - gamma * sum_j c_j ( fresh_dec_j <unit(W_dec_j), g_j> + fresh_enc_j <unit(W_enc_j), e_j> )
        e_j  = |g_j| unit(S^-1 g_j)

    with S the covariance of unlabelled activations: the filter that reads a direction out is its whitened form. Rows
    keep their norms, because only unit vectors enter. Without rollouts there is no loss.

    A latent's evidence, by which its rows may turn, each from what it was when judged, is its judged generations: the
    verdicts on texts say nothing of what its direction does. gamma is `CreditSettings.rollout_gamma` where that is
    given.
    """

    of_decoder: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = True

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> PolicyGradient:
        state = common_state(settings, batch, latent)
        g_ND = torch.zeros_like(latent.W_enc_ND)
        n_N: np.ndarray = np.zeros(len(batch.latents))
        if batch.rollouts is not None:
            for j, latent_id in enumerate(batch.latents):
                g_ND[j] = rloo_gradient(batch.rollouts, int(latent_id), latent.W_enc_ND)
            own = batch.rollouts.of_latents(batch.latents)
            place_K = np.searchsorted(batch.latents, own.latent[np.isfinite(own.reward)])
            n_N = information(batch) * np.bincount(place_K, minlength=len(batch.latents))
        state["turn_N"] = torch.tensor(settings.max_turn * n_N / (n_N + TURN_VERDICTS)).to(latent.W_enc_ND)
        if latent.W_dec_ND is not None:
            state["W_dec_judged_ND"] = judged_rows(batch.judged_decoder_ND, latent.W_dec_ND)
        _, _, inverse_DD = whitener(x_TD.to(latent.W_enc_ND))
        norm_N = torch.linalg.vector_norm(g_ND, dim=1, keepdim=True)
        return cls(settings, state | {"g_ND": g_ND, "e_ND": norm_N * F.normalize(g_ND @ inverse_DD, dim=1)})

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        state, own = self._state, self._settings.rollout_gamma
        gamma = self._settings.gamma if own is None else own
        if not gamma or not state["g_ND"].any():
            return None
        rows_N = state["latents"] - params.first_latent
        W_ND = params.W_enc_mD[rows_N]
        gain_N = (F.normalize(W_ND, dim=1) * state["e_ND"]).sum(1)
        gain_N = gain_N * freshness(self._settings, state, W_ND, params.step)
        if params.W_dec_mO is not None and "W_dec_judged_ND" in state:
            W_dec_ND = params.W_dec_mO[rows_N]
            of_decoder_N = (F.normalize(W_dec_ND, dim=1) * state["g_ND"]).sum(1)
            fresh_N = freshness(self._settings, state, W_dec_ND, params.step, "W_dec_judged_ND")
            gain_N = gain_N + of_decoder_N * fresh_N
        return -gamma * (state["credit_N"] * gain_N).sum()


def rloo_gradient(rollouts: Rollouts, latent: int, like: torch.Tensor) -> torch.Tensor:
    """[D]: the leave-one-out estimate of the reward's gradient by a latent's direction, of norm at most 1."""
    known = np.flatnonzero((rollouts.latent == latent) & np.isfinite(rollouts.reward))
    if len(known) < MIN_ROLLOUTS:
        return like.new_zeros(like.shape[1])
    reward_K = torch.tensor(rollouts.reward[known]).to(like)
    advantage_K = reward_K - (reward_K.sum() - reward_K) / (len(known) - 1)
    if rollouts.log_prob_grad is not None:
        score_KD = torch.tensor(rollouts.log_prob_grad[known]).to(like)
    elif rollouts.perturbation is not None:
        score_KD = torch.tensor(rollouts.perturbation[known]).to(like) * (like.shape[1] / rollouts.sigma)
    else:
        raise ValueError("rollouts need perturbed directions or gradients of their log-probability")
    g_D = (advantage_K[:, None] * score_KD).mean(0)
    return g_D / torch.linalg.vector_norm(g_D).clamp(min=1)
