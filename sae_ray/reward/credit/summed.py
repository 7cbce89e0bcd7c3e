"""Two estimators at once: their losses add up, each with its own gamma and its own trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, LatentState, RewardBatch, State
from sae_ray.reward.credit.policy_gradient import PolicyGradient
from sae_ray.reward.credit.teacher_gate import TeacherGate
from sae_ray.reward.evidence import ContextLayout

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams

_SECOND = "second."


class TeacherAndPolicy(CreditEstimator):
    """`teacher_gate`, from the round's verdicts on texts, and `policy_gradient`, from its rollouts.

        loss = loss of the teacher (gamma) + loss of the policy gradient (rollout_gamma)

    The first aligns when a latent fires, the second what its decoder row does; neither reads what the other does. Each
    fades and is bounded by its own evidence. The state holds both, the second's under names of its own, but for
    `latents`, which says whose rows all of it has (`trainer.credit_state`).
    """

    of_decoder: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = True

    def __init__(self, settings: CreditSettings, state: State):
        super().__init__(settings, state)
        second = {name.removeprefix(_SECOND): value for name, value in state.items() if name.startswith(_SECOND)}
        first = {name: value for name, value in state.items() if not name.startswith(_SECOND)}
        self._parts = (
            TeacherGate(settings, first),
            PolicyGradient(settings, {"latents": state["latents"], **second}),
        )

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> TeacherAndPolicy:
        first, second = (
            kind.fit(settings, batch, latent, x_TD, layout).state_dict() for kind in (TeacherGate, PolicyGradient)
        )
        return cls(settings, first | {_SECOND + name: value for name, value in second.items() if name != "latents"})

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor | None:
        losses = [part.loss(x_BD, params, threshold) for part in self._parts]
        known = [loss for loss in losses if loss is not None]
        return torch.stack(known).sum() if known else None
