"""A learned reward model: from activations to presence, with its uncertainty. RESEARCH.md section 1, candidate (c)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, LatentState, RewardBatch, State
from sae_ray.reward.credit.gates import debias, gate_logit, observed
from sae_ray.reward.credit.rows import padded, row_order, row_state, rows_in_turn
from sae_ray.reward.credit.trust import common_state, effective_verdicts, freshness, gate_at, information
from sae_ray.reward.credit.whitening import subspaces
from sae_ray.reward.evidence import ContextLayout

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams

FREE, SHRUNK = 0.01, 1.0  # prior precisions: of the own direction and the offset, of directions that verdicts add
NEWTON_STEPS = 40


class RewardModel(CreditEstimator):
    """Bayesian logistic regression per latent, as teacher of the gate and as control variate of the bank.

    Features phi of a token are 1 and its projections on the latent's whitened subspace (own direction, judged mean
    difference, local principal components). With a the coefficients, the judge's yes has probability
    `p = fpr + (1 - fpr - fnr) sigmoid(a . phi)`; the posterior of a is Laplace's, under a Gaussian prior that leaves
    the own direction and the offset free and shrinks the rest to zero. Rows count by inverse propensity, scaled to
    their effective number. For any token, with mu = a . phi and s^2 = phi' H^-1 phi (MacKay's moderation),

        m = sigmoid(mu / sqrt(1 + pi s^2 / 8)),    u = 1 / (1 + s^2)

    are its pseudo-label and how much that counts. With g the gate's logit, r = E[m] and B the global batch,

        loss = gamma * sum_j c_j fresh_j (  sum_B u (softplus(g) - g m) / max(1, r B)
                                          - k_j * sum_V w g (v - m) / sum_V w active  )

    The second sum is the bank's loss with the model as control variate: BCE is linear in its label, so what the bank
    adds to the model's BCE is the residual of its noise-corrected verdicts v at the judged tokens. With k = 1 the two
    are unbiased and the bank's noise comes in full; k_j is the share of the verdicts' variance that the model
    explains, the coefficient that minimises the variance. Costs a step about 4 times what the teacher gate does.
    """

    ROWS_PER_STEP = 4

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> RewardModel:
        x_TD = x_TD.to(latent.W_enc_ND)
        mean_D, basis_NRD = subspaces(batch, latent, x_TD)
        order = row_order(batch)
        rows = row_state(batch, order, latent.W_enc_ND)
        x_VD = x_TD[torch.tensor(batch.row_token[order], device=x_TD.device)]
        phi_VR = _with_one(torch.einsum("vd,vrd->vr", x_VD - mean_D, basis_NRD[rows["row_latent"]]))
        rates = (batch.false_positive_rate, batch.false_negative_rate)
        kish_N = torch.tensor(effective_verdicts(batch) / information(batch)).to(x_TD)
        a_NR, chol_NRR = _laplace(phi_VR, rows, rates, kish_N)
        model: State = {"mean_D": mean_D, "basis_NRD": basis_NRD, "a_NR": a_NR, "spread_NRR": chol_NRR}
        at_V, _ = _presence(phi_VR[:, None], a_NR[rows["row_latent"]][:, None], chol_NRR[rows["row_latent"]][:, None])
        residual_V = debias(rows["row_verdict"], *rates) - at_V[:, 0]
        state = common_state(settings, batch, latent) | rows | model
        state |= {"row_x": x_VD, "row_residual": residual_V, "k_N": _explained(rows, residual_V, rates)}
        total_N = torch.zeros_like(kish_N)
        for part in x_TD.split(8192):
            total_N += _labels(model, part)[0].sum(0)
        return cls(settings, state | {"rate_N": total_N / len(x_TD)})

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        state, slope = self._state, self._settings.slope
        rows_N = state["latents"] - params.first_latent
        W_ND, b_N = params.W_enc_mD[rows_N], params.b_enc_m[rows_N]
        threshold_N, unit_N = gate_at(self._settings, state, threshold.expand_as(params.b_enc_m)[rows_N])
        label_BN, sure_BN = _labels(state, x_BD)
        logit_BN = gate_logit(torch.addmm(b_N, x_BD - params.b_dec_D, W_ND.T), threshold_N, slope, unit_N)
        bce_BN = F.binary_cross_entropy_with_logits(logit_BN, label_BN, reduction="none")
        taught_N = (sure_BN * bce_BN).mean(0) / state["rate_N"].clamp(min=1 / params.tokens(x_BD))

        pick_V, stands_for_N = rows_in_turn(state["row_latent"], len(rows_N), self.ROWS_PER_STEP, params.step)
        latent_V = state["row_latent"][pick_V]
        pre_V = ((state["row_x"][pick_V] - params.b_dec_D) * W_ND[latent_V]).sum(1) + b_N[latent_V]
        pull_V = gate_logit(pre_V, threshold_N[latent_V], slope, unit_N[latent_V]) * state["row_residual"][pick_V]
        zero_N = torch.zeros_like(b_N)
        banked_N = zero_N.index_add(0, latent_V, pull_V * state["row_weight"][pick_V]) * stands_for_N
        active_N = zero_N.index_add(0, state["row_latent"], state["row_weight"] * state["row_active"])
        each_N = taught_N - state["k_N"] * banked_N / active_N.clamp(min=1)
        weight_N = state["credit_N"] * freshness(self._settings, state, W_ND, params.step)
        return self._settings.gamma * (weight_N * each_N).sum()


def _laplace(
    phi_VR: torch.Tensor, rows: State, rates: tuple[float, float], kish_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mode [N, R] and a factor L [N, R, R] of the covariance `L L'` of every latent's coefficients."""
    index = rows["row_latent"].cpu().numpy()
    places = [torch.from_numpy(index == j).nonzero().view(-1).numpy() for j in range(len(kish_N))]
    columns = [*phi_VR.unbind(1), rows["row_verdict"], rows["row_weight"]]
    *phi_RNV, verdict_NV, weight_NV = padded(columns, places)
    phi_NVR = torch.stack(phi_RNV, dim=2)
    # As many rows as are effective: their weights' sum is a number of texts, which no judge has read.
    weight_NV = weight_NV / weight_NV.sum(1, keepdim=True).clamp(min=1e-9) * _kish(weight_NV)[:, None]
    precision_R = phi_VR.new_full((phi_NVR.shape[2],), SHRUNK)
    precision_R[:2] = FREE  # the offset and the own direction
    a_NR = torch.zeros_like(phi_NVR[:, 0])
    information_NRR = torch.diag(precision_R).expand(len(a_NR), -1, -1)
    for _ in range(NEWTON_STEPS):
        s_NV = torch.sigmoid((phi_NVR @ a_NR[:, :, None])[..., 0])
        p_NV = observed(s_NV, *rates).clamp(1e-4, 1 - 1e-4)
        by_logit_NV = (observed(torch.ones_like(s_NV), *rates) - rates[0]) * s_NV * (1 - s_NV)
        score_NV = weight_NV * (verdict_NV - p_NV) / (p_NV * (1 - p_NV)) * by_logit_NV
        fisher_NV = weight_NV * by_logit_NV.square() / (p_NV * (1 - p_NV))
        information_NRR = (phi_NVR * fisher_NV[..., None]).mT @ phi_NVR + torch.diag(precision_R)
        gradient_NR = (phi_NVR.mT @ score_NV[..., None])[..., 0] - precision_R * a_NR
        step_NR = torch.linalg.solve(information_NRR, gradient_NR[..., None])[..., 0]
        # Fisher's steps are too long where the gate is saturated: none longer than 1.
        a_NR = a_NR + step_NR / torch.linalg.vector_norm(step_NR, dim=1, keepdim=True).clamp(min=1)
    return a_NR, torch.linalg.cholesky(torch.linalg.inv(information_NRR))


def _kish(weight_NV: torch.Tensor) -> torch.Tensor:
    return weight_NV.sum(1).square() / weight_NV.square().sum(1).clamp(min=1e-12)


def _explained(rows: State, residual_V: torch.Tensor, rates: tuple[float, float]) -> torch.Tensor:
    """[N], 0 to 1: the share of the verdicts' variance that the model explains."""
    v, w, j = debias(rows["row_verdict"], *rates), rows["row_weight"], rows["row_latent"]
    zero_N = v.new_zeros(int(j.max()) + 1 if len(j) else 0)
    total_N = zero_N.index_add(0, j, w).clamp(min=1e-9)
    mean_N = zero_N.index_add(0, j, w * v) / total_N
    spread_N = zero_N.index_add(0, j, w * (v - mean_N[j]).square())
    return (1 - zero_N.index_add(0, j, w * residual_V.square()) / spread_N.clamp(min=1e-9)).clamp(0, 1)


def _labels(model: State, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pseudo-labels [B, N] of tokens and how much each counts."""
    n, r, d = model["basis_NRD"].shape
    projected_BNR = ((x_BD - model["mean_D"]) @ model["basis_NRD"].reshape(n * r, d).T).view(-1, n, r)
    return _presence(_with_one(projected_BNR), model["a_NR"], model["spread_NRR"])


def _presence(phi_BNR: torch.Tensor, a_NR: torch.Tensor, chol_NRR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean_BN = (phi_BNR * a_NR).sum(-1)
    variance_BN = (phi_BNR[..., None, :] @ chol_NRR).square().sum((-2, -1))
    return torch.sigmoid(mean_BN / (1 + math.pi / 8 * variance_BN).sqrt()), 1 / (1 + variance_BN)


def _with_one(phi: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(phi[..., :1]), phi], dim=-1)
