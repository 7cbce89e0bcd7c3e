"""Rewards: what a latent's verdicts are worth, minus what a shuffled explanation would have got.

The reward of a latent is its soft detection AUROC minus the AUROC of another latent's explanation on the
same texts (the shuffled null), so a lenient judge earns nothing. Simplicity and causality rewards join in
`reward.parts`, with a weight and a log of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LatentReward:
    latent: int
    explanation: str
    explainer: str
    auroc: float
    standard_error: float
    shuffled: float
    interpretability: float  # auroc - shuffled
    n_verdicts: int
    lost_to: int | None = None  # a close latent that has the same explanation with a higher F1 (`reward.sharing`)

    @property
    def credit_weight(self) -> float:
        """How far gradients may trust this explanation, 0 to 1.

        The reward less one standard error, over the largest reward there can be (0.5): an explanation that
        does not detect its latent teaches nothing, nor does one that a close latent has with a better fit.
        """
        if self.lost_to is not None:
            return 0.0
        trusted = min(self.auroc - 0.5, self.interpretability) - self.standard_error
        return float(np.clip(trusted / 0.5, 0.0, 1.0))


def age_weight(age_steps: float, half_life_steps: float) -> float:
    """A reward counts half after `half_life_steps` trainer steps."""
    return 0.5 ** (max(0.0, age_steps) / half_life_steps)
