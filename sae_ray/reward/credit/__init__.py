"""Credit estimators: a round's rewards in, gradients on the local shard's latents out. See `base` for the interface."""

from __future__ import annotations

from sae_ray.reward.credit.bank_gate import BankGate
from sae_ray.reward.credit.base import (
    CreditEstimator,
    CreditSettings,
    Deltas,
    LatentState,
    RewardBatch,
    Rollouts,
    State,
)
from sae_ray.reward.credit.evolution import Evolution
from sae_ray.reward.credit.gates import debias, gate_logit, gate_units, observed, posterior
from sae_ray.reward.credit.policy_gradient import PolicyGradient
from sae_ray.reward.credit.preference import Preference
from sae_ray.reward.credit.reward_model import RewardModel
from sae_ray.reward.credit.selection_bonus import SelectionBonus
from sae_ray.reward.credit.summed import TeacherAndPolicy
from sae_ray.reward.credit.teacher_gate import TeacherGate
from sae_ray.reward.credit.threshold import Threshold
from sae_ray.reward.credit.whitening import MIN_CONFIRMED, projections, whitener

ESTIMATORS: dict[str, type[CreditEstimator]] = {
    "teacher_gate": TeacherGate,
    "bank_gate": BankGate,
    "threshold": Threshold,
    "selection_bonus": SelectionBonus,
    "reward_model": RewardModel,
    "evolution": Evolution,
    "preference": Preference,
    "policy_gradient": PolicyGradient,
    "teacher_gate+policy_gradient": TeacherAndPolicy,
}

__all__ = [
    "ESTIMATORS",
    "MIN_CONFIRMED",
    "BankGate",
    "CreditEstimator",
    "CreditSettings",
    "Deltas",
    "Evolution",
    "LatentState",
    "PolicyGradient",
    "Preference",
    "RewardBatch",
    "RewardModel",
    "Rollouts",
    "SelectionBonus",
    "State",
    "TeacherAndPolicy",
    "TeacherGate",
    "Threshold",
    "debias",
    "gate_logit",
    "gate_units",
    "observed",
    "posterior",
    "projections",
    "restore_credit",
    "whitener",
]


def restore_credit(name: str, settings: CreditSettings, state: State) -> CreditEstimator:
    """An estimator from the state that a checkpoint kept of it."""
    return ESTIMATORS[name](settings, state)
