"""Rewards for simple features in a cell: what a run's simplicity parts make of the decoder, and no judge is asked.

As `reward.parts` measures and combines them, with its settings of a run that says nothing else:

    atomicity = -composed(row)        splitting = -(duplicate + split + shared explanation)

Each is centred and scaled by `RewardCombiner`, and a latent's reward is their sum in units of `clip` standard
deviations. Here every latent's firing is known, so that all co-firing is.

Suffixes: T samples of the pool, M latents, N judged latents, D d_in.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from sae_ray.config.rewards import RewardsConfig
from sae_ray.reward.atomicity import compositions, fit_atoms
from sae_ray.reward.decoder import COSINE_LIMIT
from sae_ray.reward.overlap import nearest_rows, overlap_penalties, shared_explanations, with_cofiring
from sae_ray.reward.weights import RewardCombiner

Rewarding = Literal["verdicts", "atomicity", "splitting", "simplicity"]
PARTS: dict[Rewarding, tuple[str, ...]] = {
    "verdicts": (),
    "atomicity": ("atomicity",),
    "splitting": ("splitting",),
    "simplicity": ("atomicity", "splitting"),
}


class SimplicityRewards:
    """One per cell: baselines and scales go on from round to round.

    Args:
        rewarding: which parts count, all alike; "verdicts" has none.
    """

    def __init__(self, rewarding: Rewarding, seed: int):
        self._settings, self._seed = RewardsConfig(), seed
        weights = dict.fromkeys(PARTS[rewarding], 1.0)
        usual = self._settings
        self._combiner = RewardCombiner(weights, usual.memory, usual.clip, usual.min_coverage)
        self._unit = usual.clip * math.hypot(*weights.values())

    def rewards(
        self, W_dec_MD: torch.Tensor, fires_TM: torch.Tensor, feature_M: torch.Tensor, latents: np.ndarray
    ) -> np.ndarray:
        """float32 [N], as `RewardBatch.reward`; NaN is missing.

        Args:
            feature_M: what each latent was explained as.
            latents: the judged ones, int64 [N].
        """
        measure = {"atomicity": self._atomicity, "splitting": self._splitting}
        found = {part: measure[part](W_dec_MD, fires_TM, feature_M, latents) for part in self._combiner.needed}
        of_part = {part: dict(zip(latents.tolist(), value_N.tolist(), strict=True)) for part, value_N in found.items()}
        return self._combiner.combine(of_part).rewards_of(latents, self._unit)

    def _atomicity(self, W_dec_MD: torch.Tensor, _: torch.Tensor, __: torch.Tensor, latents: np.ndarray) -> np.ndarray:
        usual = self._settings.atomicity
        meta = fit_atoms(W_dec_MD, usual.atoms, usual.per_code, usual.rounds, seed=self._seed)
        composed_M = compositions(W_dec_MD, meta, seed=self._seed).composed.double().numpy()
        return np.asarray(-composed_M[latents])

    def _splitting(
        self, W_dec_MD: torch.Tensor, fires_TM: torch.Tensor, feature_M: torch.Tensor, latents: np.ndarray
    ) -> np.ndarray:
        sample_P, latent_P = (index_P.numpy() for index_P in torch.nonzero(fires_TM, as_tuple=True))
        near = with_cofiring(nearest_rows(W_dec_MD, 0, [(0, W_dec_MD)]), 0, sample_P, latent_P, len(W_dec_MD))
        overlap = overlap_penalties(near, COSINE_LIMIT)
        shared = shared_explanations({latent: f"feature {feature_M[latent]}" for latent in latents.tolist()})
        shared_N = np.array([shared[latent] for latent in latents.tolist()])
        return np.asarray(-(overlap.duplicate + overlap.split)[latents] - shared_N)
