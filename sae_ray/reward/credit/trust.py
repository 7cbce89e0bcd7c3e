"""How far a reward may still be trusted: its age, the latent's drift, and the trust region of a round.

A round's verdicts speak of the direction that was judged. With n effective verdicts (Kish's number, times the square
of what a verdict of this judge tells) credit may turn a latent's direction by

    turn = max_turn * n / (n + TURN_VERDICTS)

from it. The weight of its credit is `2^(-age / half life) * cos(angle) * taper`, where the taper is 1 up to half of
`turn` and falls to 0 at `turn`: a loss has no gradient beyond, and deltas are cut to that cone.

What is bounded is what credit does, not where a row ends: at the bound credit stops, while reconstruction goes on
turning the row (with 16 verdicts, continued training alone turns some rows further than credit may), and an
optimiser's momentum adds its last steps. The angle is the encoder row's; a loss's term of the decoder is bounded by
the decoder row's own. Estimators that put a gate somewhere (teacher, threshold, evolution) change the share of
contexts that it marks by at most `rate_bound`. Nothing else is bounded: norms of rows, and the bias that a loss of
gates moves while the direction is within its turn.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from sae_ray.reward.composition import age_weight
from sae_ray.reward.credit.base import CreditSettings, LatentState, RewardBatch, State
from sae_ray.reward.credit.gates import MIN_INFORMATION

TURN_VERDICTS = 32.0  # effective verdicts at which half of `max_turn` is allowed
MAX_RATE_CHANGE = 2.0  # factor on the share of contexts that a latent marks, in a round and with unlimited evidence


def information(batch: RewardBatch) -> float:
    """The share of a perfect verdict's information about a mean that one of this judge's has."""
    return max(1 - batch.false_positive_rate - batch.false_negative_rate, MIN_INFORMATION) ** 2


def effective_verdicts(batch: RewardBatch) -> np.ndarray:
    """float64 [N]: Kish's effective number of verdicts on active contexts, discounted by the judge's errors."""
    place = np.searchsorted(batch.latents, batch.row_latent)
    w = np.where(batch.row_active, batch.row_weight, 0).astype(np.float64)
    total = np.bincount(place, w, len(batch.latents))
    squares = np.bincount(place, w * w, len(batch.latents))
    return information(batch) * total**2 / np.maximum(squares, 1e-12)


def evidence_share(batch: RewardBatch) -> np.ndarray:
    """float64 [N], 0 to 1: which part of a full move a latent's verdicts allow."""
    n = effective_verdicts(batch)
    return n / (n + TURN_VERDICTS)


def rate_bound(batch: RewardBatch) -> np.ndarray:
    """float64 [N]: by which factor a latent's verdicts allow the share of contexts that it marks to change."""
    return np.asarray(MAX_RATE_CHANGE ** evidence_share(batch))


def common_state(settings: CreditSettings, batch: RewardBatch, latent: LatentState) -> State:
    """What every estimator's state holds: whom it is about, how far they are trusted, and what was judged."""
    device, dtype = latent.W_enc_ND.device, latent.W_enc_ND.dtype
    unit: State = {}
    if latent.threshold is not None:
        unit["unit_N"] = latent.threshold.to(latent.W_enc_ND) * torch.ones_like(latent.b_enc_N)
    return unit | {
        "latents": torch.tensor(batch.latents, device=device),
        "credit_N": torch.tensor(batch.credit_weight, dtype=dtype, device=device),
        "W_judged_ND": judged_rows(batch.judged_ND, latent.W_enc_ND),
        "turn_N": torch.tensor(settings.max_turn * evidence_share(batch), dtype=dtype, device=device),
        "sae_step": torch.tensor(batch.sae_step),
    }


def judged_rows(judged_ND: np.ndarray | None, now_ND: torch.Tensor) -> torch.Tensor:
    """[N, D]: the directions that verdicts are about, as long as their rows are now: judging takes many steps.

    Args:
        judged_ND: None: the rows of now.
    """
    if judged_ND is None:
        return now_ND.clone()
    unit_ND = F.normalize(torch.tensor(judged_ND).to(now_ND), dim=1)
    return unit_ND * torch.linalg.vector_norm(now_ND, dim=1, keepdim=True)


def gate_at(settings: CreditSettings, state: State, threshold_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] each: the threshold that gates are pulled to either side of, and the unit of their logits.

    A threshold of the moment is itself moved by the gates: each latent that closes lowers it for all, all are pulled
    below the lower one, and so on, until fewer than k pre-activations a token are positive and L0 falls below k
    (measured: docs/credit.md). The threshold at the fit stays where it is.
    """
    unit_N = state.get("unit_N", threshold_N)
    return (unit_N if settings.fitted_gates else threshold_N), unit_N


def freshness(
    settings: CreditSettings, state: State, W_ND: torch.Tensor, step: int, judged: str = "W_judged_ND"
) -> torch.Tensor:
    """[N]: weights of old rewards, of latents that have moved since they were judged, and none beyond their turn; all
    of them lower where alarms have cooled the round.

    Args:
        W_ND: rows as they are; `judged` names what they were, in the state.
    """
    age = settings.factor * age_weight(step - int(state["sae_step"]), settings.half_life_steps)
    cos_N = F.cosine_similarity(W_ND.detach(), state[judged], dim=1).clamp(0, 1)
    taper_N = (2 - 2 * torch.acos(cos_N) / state["turn_N"].clamp(min=1e-6)).clamp(0, 1)
    return age * cos_N * taper_N


def within_turn(old_ND: torch.Tensor, new_ND: torch.Tensor, turn_N: torch.Tensor) -> torch.Tensor:
    """`new`, turned back toward `old` where the angle between them is larger than `turn`; norms are new's."""
    norm_N = torch.linalg.vector_norm(new_ND, dim=1, keepdim=True)
    a_ND, b_ND = F.normalize(old_ND, dim=1), F.normalize(new_ND, dim=1)
    cos_N = (a_ND * b_ND).sum(1).clamp(-1, 1)
    across_ND = F.normalize(b_ND - cos_N[:, None] * a_ND, dim=1)
    angle_N = torch.minimum(torch.acos(cos_N), turn_N)[:, None]
    return norm_N * (angle_N.cos() * a_ND + angle_N.sin() * across_ND)
