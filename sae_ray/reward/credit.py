"""Credit estimators: verdicts in, a loss on the local shard's latents out.

Everything is per latent, so a rank builds and applies credit for its own shard and nothing crosses tp.
An estimator is fitted when rewards arrive (`fit`) and then adds a loss to every step (`loss`).

Suffixes: N judged local latents, V verdict rows, T evidence tokens, C contexts, B batch tokens, D d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from sae_ray.reward.composition import age_weight
from sae_ray.reward.evidence import ContextLayout, max_per_context

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams


# Share of the active contexts that verdicts must confirm before a latent's teacher leaves the SAE's own direction.
MIN_CONFIRMED = 0.25
# By how much a teacher may change the share of contexts that a latent marks, in one round.
MAX_RATE_CHANGE = 1.25


@dataclass(frozen=True)
class RewardBatch:
    """What the desk sends to every rank after a round: metadata and numbers, no activations."""

    round: int
    sae_step: int
    latents: np.ndarray  # int64 [N]
    credit_weight: np.ndarray  # float32 [N]: trust in each latent's explanation, over the number of trusted latents
    row_latent: np.ndarray  # int64 [V]: global latent id
    row_context: np.ndarray  # int64 [V]: evidence context
    row_verdict: np.ndarray  # float32 [V]: 1 where the judge held that the explanation is true of the text, else 0
    row_active: np.ndarray  # bool [V]: whether the latent was active
    row_weight: np.ndarray  # float32 [V]: inverse sampling propensity
    row_token: np.ndarray  # int64 [V]: kept-token index of the latent's largest pre-activation
    false_positive_rate: float
    false_negative_rate: float

    def for_shard(self, first: int, last: int) -> RewardBatch:
        """The part that concerns latents first..last-1 and that any gradient would come from."""
        keep = (self.latents >= first) & (self.latents < last) & (self.credit_weight > 0)
        rows = np.isin(self.row_latent, self.latents[keep])
        return RewardBatch(
            self.round, self.sae_step, self.latents[keep], self.credit_weight[keep],
            self.row_latent[rows], self.row_context[rows], self.row_verdict[rows], self.row_active[rows],
            self.row_weight[rows], self.row_token[rows], self.false_positive_rate, self.false_negative_rate,
        )  # fmt: skip


@dataclass(frozen=True)
class LatentState:
    """The judged latents of this rank (rows as in `RewardBatch.latents`), as they are when rewards arrive."""

    W_enc_ND: torch.Tensor
    b_enc_N: torch.Tensor
    b_dec_D: torch.Tensor


@dataclass(frozen=True)
class CreditSettings:
    gamma: float
    slope: float
    shrink: float
    half_life_steps: float


class CreditEstimator(Protocol):
    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        """Scalar, already weighted by gamma, age and trust; differentiable in W_enc and b_enc.

        Args:
            x_BD: scaled inputs of one step.
            params: the local shard (`trainer.sharded_sae.CreditParams`); only its encoder may be touched.
            threshold: of the gate: one for all latents (0-dim) or one for each latent of the shard.
        """
        ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...


def whitener(x_TD: torch.Tensor, ridge: float = 0.02) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [D], covariance [D, D] and ridge-regularised inverse covariance of unlabelled activations."""
    mean_D = x_TD.mean(0)
    centred_TD = x_TD - mean_D
    cov_DD = centred_TD.T @ centred_TD / len(x_TD)
    eye_DD = torch.eye(len(mean_D), dtype=x_TD.dtype)
    return mean_D, cov_DD, torch.linalg.inv(cov_DD + ridge * cov_DD.diagonal().mean() * eye_DD)


def debias(verdict: torch.Tensor, fpr: float, fnr: float) -> torch.Tensor:
    """Unbiased estimate of a concept's presence from a verdict with known error rates; below 0 for a no."""
    return (verdict - fpr) / max(1 - fpr - fnr, 0.05)


def observed(presence: torch.Tensor, fpr: float, fnr: float) -> torch.Tensor:
    """Probability that a judge with these error rates says yes when the concept is present with `presence`."""
    return fpr + max(1 - fpr - fnr, 0.05) * presence


def gate_logit(pre: torch.Tensor, threshold: torch.Tensor, slope: float) -> torch.Tensor:
    """How far a pre-activation is above its threshold, in thresholds, times the slope."""
    return slope * (pre - threshold) / threshold.clamp(min=1e-3)


class TeacherGate:
    """Teacher distillation: RESEARCH.md section 1, candidate (b').

    Per judged latent j, with S the covariance of unlabelled activations and v the noise-corrected verdicts
    on active contexts, the whitened mean difference `d_j = S^-1 (sum v x / sum v - mean)` is shrunk toward
    the encoder's own direction, both at unit S-norm: `t_j = shrink * w_j + (1 - shrink) * d_j`. A Platt map
    of the context's largest `t_j . (x - mean)`, fitted at the natural prior through the judge's error
    rates, says in which share of contexts the concept is present; the teacher's threshold is set to mark that
    share, but never further than a factor of MAX_RATE_CHANGE from what the latent itself marks: a few
    dozen verdicts cannot tell a rare concept from an absent one, and a teacher that marks nothing would
    silence its latent. Tokens above the threshold are pseudo-positives y, expected r_j per token, and the
    gate BCE pulls the encoder's gate toward them on the natural distribution:

        loss = gamma * sum_j c_j * age * sum_B BCE(slope * (pre - thr) / thr, y) / max(1, r_j B)
    """

    def __init__(self, settings: CreditSettings, state: dict[str, torch.Tensor]):
        self._settings = settings
        self._state = state

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> TeacherGate:
        dtype = latent.W_enc_ND.dtype
        x_TD = x_TD.to(dtype)
        mean_D, cov_DD, inverse_DD = whitener(x_TD)
        directions_ND, rows = [], []
        for j, latent_id in enumerate(batch.latents):
            row = np.flatnonzero(batch.row_latent == latent_id)
            rows.append(row)
            seen = row[batch.row_active[row]]
            said_V = torch.from_numpy(batch.row_verdict[seen]).to(dtype)
            v = debias(said_V, batch.false_positive_rate, batch.false_negative_rate)
            weight_V = torch.from_numpy(batch.row_weight[seen]).to(dtype)
            v = v * weight_V
            x_VD = x_TD[torch.from_numpy(batch.row_token[seen])]
            own_D = _unit(latent.W_enc_ND[j], cov_DD)
            if float(v.sum()) <= MIN_CONFIRMED * float(weight_V.sum()):
                directions_ND.append(own_D)
                continue
            judged_D = inverse_DD @ ((v[:, None] * x_VD).sum(0) / v.sum() - mean_D)
            mixed_D = settings.shrink * own_D + (1 - settings.shrink) * _unit(judged_D, cov_DD)
            directions_ND.append(_unit(mixed_D, cov_DD))
        teacher_ND = torch.stack(directions_ND)
        score_TN = (x_TD - mean_D) @ teacher_ND.T
        best_CN = max_per_context(score_TN, layout)
        slope_N, offset_N = _platt(best_CN, rows, batch)
        cut_N = _bounded_threshold(best_CN, slope_N, offset_N, rows, batch)
        return cls(
            settings,
            {
                "latents": torch.from_numpy(batch.latents),
                "W_ND": teacher_ND,
                "b_N": -(teacher_ND @ mean_D) - cut_N,
                "rate_N": (score_TN > cut_N).to(dtype).mean(0),
                "credit_N": torch.from_numpy(batch.credit_weight).to(dtype),
                "W_judged_ND": latent.W_enc_ND.clone(),
                "sae_step": torch.tensor(batch.sae_step),
            },
        )

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        state = self._state
        rows_N = state["latents"] - params.first_latent
        label_BN = (torch.addmm(state["b_N"], x_BD, state["W_ND"].T) > 0).to(x_BD.dtype)
        W_ND, b_N = params.W_enc_mD[rows_N], params.b_enc_m[rows_N]
        pre_BN = torch.addmm(b_N, x_BD - params.b_dec_D, W_ND.T)
        logit_BN = gate_logit(pre_BN, threshold.expand_as(params.b_enc_m)[rows_N], self._settings.slope)
        bce_N = F.binary_cross_entropy_with_logits(logit_BN, label_BN, reduction="none").sum(0)
        bce_N = bce_N / (state["rate_N"] * len(x_BD)).clamp(min=1)
        weight_N = state["credit_N"] * _freshness(self._settings, state, W_ND, params.step)
        return self._settings.gamma * (weight_N * bce_N).sum()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state


class BankGate:
    """Gate BCE on the judged contexts themselves: RESEARCH.md section 1, candidate (b).

    The gate of a context is the largest pre-activation of its tokens. With the judge's error rates,
    `p = fpr + (1 - fpr - fnr) * sigmoid(gate)` is the chance of a yes, and

        loss = gamma * sum_j c_j * age * sum_V w BCE(p, verdict) / sum_V w * active

    over the rows V of latent j, with w their inverse sampling propensities.
    """

    ROWS_PER_STEP = 4  # contexts per latent and step; the seeded choice keeps a step near one batch's cost

    def __init__(self, settings: CreditSettings, state: dict[str, torch.Tensor]):
        self._settings = settings
        self._state = state

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> BankGate:
        dtype = latent.W_enc_ND.dtype
        size = layout.context_tokens
        contexts = np.unique(batch.row_context)
        place = torch.full((layout.n_contexts,), -1, dtype=torch.int64)
        place[torch.from_numpy(contexts)] = torch.arange(len(contexts))
        kept = place[layout.context_T] >= 0
        x_CSD = torch.zeros(len(contexts), size, x_TD.shape[1], dtype=dtype)
        mask_CS = torch.zeros(len(contexts), size, dtype=torch.bool)
        x_CSD[place[layout.context_T[kept]], layout.offset_T[kept]] = x_TD[kept].to(dtype)
        mask_CS[place[layout.context_T[kept]], layout.offset_T[kept]] = True
        order = np.searchsorted(batch.latents, batch.row_latent)
        return cls(
            settings,
            {
                "latents": torch.from_numpy(batch.latents),
                "x_CSD": x_CSD,
                "mask_CS": mask_CS,
                "row_latent": torch.from_numpy(order),
                "row_context": place[torch.from_numpy(batch.row_context)],
                "row_verdict": torch.from_numpy(batch.row_verdict).to(dtype),
                "row_weight": torch.from_numpy(batch.row_weight).to(dtype),
                "row_active": torch.from_numpy(batch.row_active).to(dtype),
                "credit_N": torch.from_numpy(batch.credit_weight).to(dtype),
                "W_judged_ND": latent.W_enc_ND.clone(),
                "sae_step": torch.tensor(batch.sae_step),
                "rates": torch.tensor([batch.false_positive_rate, batch.false_negative_rate], dtype=dtype),
            },
        )

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        state = self._state
        rows_N = state["latents"] - params.first_latent
        n_rows = len(state["row_latent"])
        generator = torch.Generator().manual_seed(params.step)
        pick = torch.randperm(n_rows, generator=generator)[: self.ROWS_PER_STEP * len(rows_N)]
        latent_V, context_V = state["row_latent"][pick], state["row_context"][pick]
        W_ND, b_N = params.W_enc_mD[rows_N], params.b_enc_m[rows_N]
        x_VSD = state["x_CSD"][context_V] - params.b_dec_D
        pre_VS = torch.einsum("vsd,vd->vs", x_VSD, W_ND[latent_V]) + b_N[latent_V, None]
        pre_V = pre_VS.masked_fill(~state["mask_CS"][context_V], -torch.inf).amax(1)
        threshold_V = threshold.expand_as(params.b_enc_m)[rows_N][latent_V]
        logit_V = gate_logit(pre_V, threshold_V, self._settings.slope)
        fpr, fnr = state["rates"].tolist()
        p_V = observed(torch.sigmoid(logit_V), fpr, fnr).clamp(1e-4, 1 - 1e-4)
        bce_V = F.binary_cross_entropy(p_V, state["row_verdict"][pick], reduction="none") * state["row_weight"][pick]
        present_V = state["row_weight"][pick] * state["row_active"][pick]
        zero_N = W_ND.new_zeros(len(rows_N))
        bce_N = zero_N.index_add(0, latent_V, bce_V) / zero_N.index_add(0, latent_V, present_V).clamp(min=1)
        weight_N = state["credit_N"] * _freshness(self._settings, state, W_ND, params.step)
        return self._settings.gamma * (weight_N * bce_N).sum()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state


ESTIMATORS: dict[str, type[TeacherGate] | type[BankGate]] = {
    "teacher_gate": TeacherGate,
    "bank_gate": BankGate,
}


def restore_credit(name: str, settings: CreditSettings, state: dict[str, torch.Tensor]) -> TeacherGate | BankGate:
    """An estimator from the state that a checkpoint kept of it."""
    return ESTIMATORS[name](settings, state)


def _unit(direction_D: torch.Tensor, cov_DD: torch.Tensor) -> torch.Tensor:
    """Scales a direction so that its projection has unit variance."""
    return direction_D / (direction_D @ cov_DD @ direction_D).clamp(min=1e-12).sqrt()


def _freshness(settings: CreditSettings, state: dict[str, torch.Tensor], W_ND: torch.Tensor, step: int) -> torch.Tensor:
    """Down-weights old rewards, and rewards of latents whose direction has moved since they were judged."""
    age = age_weight(step - int(state["sae_step"]), settings.half_life_steps)
    drift_N = F.cosine_similarity(W_ND.detach(), state["W_judged_ND"], dim=1).clamp(min=0)
    return age * drift_N


def _bounded_threshold(
    best_CN: torch.Tensor, slope_N: torch.Tensor, offset_N: torch.Tensor, rows: list[np.ndarray], batch: RewardBatch
) -> torch.Tensor:
    """Teacher thresholds [N] that mark the share of contexts which the verdicts imply, within the trust region."""
    finite_CN = best_CN[torch.isfinite(best_CN).all(1)]
    implied_N = torch.sigmoid(slope_N * finite_CN + offset_N).mean(0)
    own = [
        float(batch.row_weight[row][batch.row_active[row]].sum() / max(batch.row_weight[row].sum(), 1e-9))
        for row in rows
    ]
    own_N = torch.tensor(own, dtype=best_CN.dtype)
    share_N = torch.minimum(torch.maximum(implied_N, own_N / MAX_RATE_CHANGE), own_N * MAX_RATE_CHANGE)
    ordered_CN = finite_CN.sort(dim=0, descending=True).values
    index_N = (share_N * len(ordered_CN)).long().clamp(1, len(ordered_CN) - 1)
    # Halfway between the last context that is marked and the first that is not.
    columns_N = torch.arange(len(own))
    return (ordered_CN[index_N - 1, columns_N] + ordered_CN[index_N, columns_N]) / 2


def _platt(
    best_CN: torch.Tensor, rows: list[np.ndarray], batch: RewardBatch, steps: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per latent (slope, offset) of P(concept | context) = sigmoid(slope * q + offset), judged noise removed.

    Fitted by weighted likelihood of the verdicts under their error rates; a weak pull of the slope toward 1
    keeps latents with few verdicts finite.
    """
    dtype = best_CN.dtype
    width = max(len(row) for row in rows)
    q_NV, y_NV, w_NV = (torch.zeros(len(rows), width, dtype=dtype) for _ in range(3))
    for j, row in enumerate(rows):
        q_NV[j, : len(row)] = best_CN[torch.from_numpy(batch.row_context[row]), j]
        y_NV[j, : len(row)] = torch.from_numpy(batch.row_verdict[row]).to(dtype)
        w_NV[j, : len(row)] = torch.from_numpy(batch.row_weight[row]).to(dtype)
    total_N = w_NV.sum(1).clamp(min=1e-9)
    mu_N = (w_NV * q_NV).sum(1) / total_N
    sd_N = ((w_NV * (q_NV - mu_N[:, None]) ** 2).sum(1) / total_N).sqrt().clamp(min=1e-3)
    z_NV = (q_NV - mu_N[:, None]) / sd_N[:, None]
    raw_N = torch.ones(len(rows), dtype=dtype, requires_grad=True)
    offset_N = torch.zeros(len(rows), dtype=dtype, requires_grad=True)
    optimiser = torch.optim.Adam([raw_N, offset_N], lr=0.1)
    with torch.enable_grad():
        for _ in range(steps):
            presence_NV = torch.sigmoid(F.softplus(raw_N)[:, None] * z_NV + offset_N[:, None])
            p_NV = observed(presence_NV, batch.false_positive_rate, batch.false_negative_rate)
            bce_NV = F.binary_cross_entropy(p_NV.clamp(1e-4, 1 - 1e-4), y_NV, reduction="none")
            loss = ((w_NV * bce_NV).sum(1) / total_N).sum() + 1e-3 * (raw_N - 1).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    slope_N = F.softplus(raw_N.detach()) / sd_N
    return slope_N, offset_N.detach() - slope_N * mu_N
