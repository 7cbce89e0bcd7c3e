"""Several rewards become one advantage per latent.

    advantage_l = c_l * sum over the parts i that l has of  w_i * z_li
    z_li = clip((r_li - baseline_i) / scale_i)
    c_l  = sqrt(sum of all w_i^2 / sum of w_i^2 of the parts that l has)

Every part has a running baseline and scale of its own (exponential means over rounds, without the bias toward their
start), so a part's units do not matter and a drift of the whole part is nobody's merit. A missing part drops out. The
factor c keeps the spread of the advantages: scaled by sum(w) / sum(w present), the latents about which least is known
would have the largest advantages by noise alone. It is exact where parts are independent. Latents of which less than
`min_coverage` of the weight is known are missing themselves.

A part of weight 0 is never asked for: `measure` calls only what `needed` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_ray.errors import UserError

# description: minus the length of `reward.description`; atomicity, splitting: minus the penalties of `atomicity` and
# `overlap`; causality: judged steering; logit_effect: the judge-free one.
PARTS = ("interpretability", "description", "atomicity", "splitting", "causality", "logit_effect")
_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Combined:
    """latents: int64 [N], ascending: all that have any part. advantage: float64 [N], NaN where too little is known.
    coverage: float64 [N], share of the weight that is known. log: flat numbers, `part/quantity`."""

    latents: np.ndarray
    advantage: np.ndarray
    coverage: np.ndarray
    log: dict[str, float]

    def rewards_of(self, latents: np.ndarray, unit: float) -> np.ndarray:
        """The advantages of these latents over `unit`, float32 [N], as `RewardBatch.reward`; NaN is missing."""
        by_latent = dict(zip(self.latents.tolist(), self.advantage.tolist(), strict=True))
        return np.array([by_latent.get(int(latent), math.nan) / unit for latent in latents], dtype=np.float32)


class RewardCombiner:
    """Weights, and the running baseline and scale of each part that has one.

    Args:
        weights: by part; 0 turns a part off.
        memory: share of the running mean that a round leaves in place; 0 is each round's own mean.
        clip: largest |z|, so that one outlier does not decide a round.
        min_coverage: least share of the total weight that a latent's known parts must have.
    Raises:
        UserError: an unknown part, a weight that is negative or not finite, or no weight above 0.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        memory: float = 0.9,
        clip: float = 4.0,
        min_coverage: float = 0.3,
        key: str = "rlaif.rewards.weights",
    ) -> None:
        for part, weight in weights.items():
            if part not in PARTS:
                raise UserError(f"{key}.{part}: no such reward; known: {', '.join(PARTS)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"{key}.{part} = {weight}: a weight is a number from 0 on")
        self.weights = {part: float(weights[part]) for part in PARTS if weights.get(part, 0) > 0}
        if not self.weights:
            raise UserError(f"{key}: every weight is 0, so there is nothing to reward")
        if not 0 <= memory < 1:
            raise UserError(f"{key}: memory {memory} is not in [0, 1)")
        self._memory, self._clip, self._min_coverage = memory, clip, min_coverage
        # Of each part: running mean, running mean square, and how much weight they hold (1 - memory^rounds).
        self._moments: dict[str, tuple[float, float, float]] = {}

    @property
    def needed(self) -> tuple[str, ...]:
        """Parts with a weight: what else there is need not be computed."""
        return tuple(self.weights)

    def measure(self, parts: Mapping[str, Callable[[], Mapping[int, float]]]) -> Combined:
        """`combine` of what the needed parts' functions return; the others are not called.

        Raises:
            UserError: a needed part has no function.
        """
        if missing := [part for part in self.needed if part not in parts]:
            raise UserError(f"reward {missing[0]} has a weight, and nothing here measures it")
        return self.combine({part: parts[part]() for part in self.needed})

    def combine(self, rewards: Mapping[str, Mapping[int, float]]) -> Combined:
        """One round. rewards: part -> latent -> reward; an absent latent or NaN is missing. Moves the baselines."""
        known = {
            part: {int(latent): float(value) for latent, value in rewards.get(part, {}).items() if math.isfinite(value)}
            for part in self.needed
        }
        latents = np.array(sorted({latent for values in known.values() for latent in values}), dtype=np.int64)
        total = np.zeros(len(latents))
        weight = np.zeros(len(latents))
        square = np.zeros(len(latents))
        log: dict[str, float] = {}
        for part, w in self.weights.items():
            reward_N = np.array([known[part].get(int(latent), np.nan) for latent in latents])
            has_N = np.isfinite(reward_N)
            baseline, scale = self._move(part, reward_N[has_N])
            z_N = np.clip((reward_N - baseline) / scale, -self._clip, self._clip)
            total += np.where(has_N, w * z_N, 0)
            weight += w * has_N
            square += w * w * has_N
            log |= {
                f"{part}/weight": w,
                f"{part}/mean": float(reward_N[has_N].mean()) if has_N.any() else math.nan,
                f"{part}/baseline": baseline,
                f"{part}/scale": scale,
                f"{part}/known": float(has_N.sum()),
                f"{part}/missing": float((~has_N).sum()),
                f"{part}/contribution": float(np.abs(w * z_N[has_N]).mean()) if has_N.any() else math.nan,
            }
        all_square = sum(w * w for w in self.weights.values())
        coverage_N = weight / sum(self.weights.values())
        enough_N = coverage_N >= self._min_coverage
        spread_N = np.sqrt(all_square / np.where(square > 0, square, 1))
        advantage_N = np.where(enough_N, total * spread_N, np.nan)
        log |= {
            "advantage/mean": float(advantage_N[enough_N].mean()) if enough_N.any() else math.nan,
            "advantage/std": float(advantage_N[enough_N].std()) if enough_N.any() else math.nan,
            "advantage/known": float(enough_N.sum()),
            "advantage/missing": float((~enough_N).sum()),
        }
        return Combined(latents, advantage_N, coverage_N, log)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {part: list(moments) for part, moments in self._moments.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Parts that have lost their weight since are forgotten."""
        self._moments = {
            part: (float(m[0]), float(m[1]), float(m[2])) for part, m in state.items() if part in self.weights
        }

    def _move(self, part: str, values: np.ndarray) -> tuple[float, float]:
        """Baseline and scale with this round in them; NaN before any value was seen."""
        mean, square, mass = self._moments.get(part, (0.0, 0.0, 0.0))
        if len(values):
            keep = self._memory
            mean = keep * mean + (1 - keep) * float(values.mean())
            square = keep * square + (1 - keep) * float((values**2).mean())
            mass = keep * mass + (1 - keep)
            self._moments[part] = (mean, square, mass)
        if mass == 0:
            return math.nan, math.nan
        baseline = mean / mass
        return baseline, max(math.sqrt(max(0.0, square / mass - baseline**2)), _SMALLEST_SCALE)
