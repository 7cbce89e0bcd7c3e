"""The causality reward: does text written under a latent's steering show what the latent's explanation says?

    reward = min over the controls of  mean over prompts of  P(shows | steered) - P(shows | control)

The controls are the same prompts without steering, and with a random direction of the same KL (`reward.steering`).
Steered text has to beat both: text that any push of this size makes odd, or that the judge passes whatever it says,
earns nothing. All three are sampled with common random numbers, so they are paired by (prompt, sample); prompts, not
texts, are the independent units of the standard error.

The lesser of two noisy differences is a little low even without an effect (about .56 of their standard error). That is
the same for all latents, and the part's baseline takes it off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sae_ray.reward.credit import Rollouts

CONTROLS = ("unsteered", "random")


@dataclass(frozen=True)
class JudgedSteering:
    """Calibrated probabilities [prompts, samples] that a text shows the latent's explanation; NaN: no verdict.

    None: there are no texts, because no strength of this direction reached the KL that was asked for.
    """

    latent: int
    steered: np.ndarray | None
    unsteered: np.ndarray | None
    random: np.ndarray | None


@dataclass(frozen=True)
class CausalityReward:
    """over_unsteered, over_random: mean differences with their standard errors over prompts. reward: the lesser of
    them; standard_error: its own. prompts: on which that one rests."""

    latent: int
    reward: float
    standard_error: float
    over_unsteered: tuple[float, float]
    over_random: tuple[float, float]
    prompts: int


def causality_rewards(judged: Sequence[JudgedSteering]) -> dict[int, CausalityReward]:
    """By latent. One without texts, or with fewer than two prompts that are judged on both sides, is left out."""
    found: dict[int, CausalityReward] = {}
    for latent in judged:
        contrasts = [_contrast(latent.steered, getattr(latent, control)) for control in CONTROLS]
        if any(prompts < 2 for _, _, prompts in contrasts):
            continue
        reward, error, prompts = min(contrasts)
        (unsteered, unsteered_error, _), (random, random_error, _) = contrasts
        found[latent.latent] = CausalityReward(
            latent.latent, reward, error, (unsteered, unsteered_error), (random, random_error), prompts
        )
    return found


def steered_rollouts(
    judged: Sequence[JudgedSteering],
    rewards: Mapping[int, CausalityReward],
    written: Mapping[int, tuple[float, np.ndarray]],
) -> Rollouts:
    """The steered texts of rewarded latents as rollouts of their decoder directions, in order of latents.

        reward of a text = P(shows | steered) - mean of P(shows | control), the control that decides the latent's reward

    so that a latent's rollouts have its reward for a mean. What is taken off is one number per latent and not the
    control beside each text: that shares the text's random numbers, so it would be no baseline that leaves the gradient
    unbiased, but would cancel with the reward itself where steering changes little.

    Args:
        written: by latent, the strength, and float32 [prompts, samples, D] the gradients of its texts' log-probability
            by the unit direction.
    """
    latent, strength, reward, gradient = [], [], [], []
    for one in sorted(judged, key=lambda each: each.latent):
        found = rewards.get(one.latent)
        if found is None or one.steered is None or one.latent not in written:
            continue
        control = one.unsteered if found.over_unsteered[0] <= found.over_random[0] else one.random
        assert control is not None
        alpha, gradient_PSD = written[one.latent]
        latent.append(np.full(one.steered.size, one.latent, dtype=np.int64))
        strength.append(np.full(one.steered.size, alpha, dtype=np.float32))
        reward.append((one.steered - np.nanmean(control)).ravel().astype(np.float32))
        gradient.append(gradient_PSD.reshape(one.steered.size, -1).astype(np.float32))
    if not latent:
        none = np.empty(0, dtype=np.float32)
        return Rollouts(np.empty(0, dtype=np.int64), None, none, none, 0.0, none.reshape(0, 0))
    return Rollouts(
        np.concatenate(latent), None, np.concatenate(strength), np.concatenate(reward), 0.0, np.concatenate(gradient)
    )


def judged_steering(
    latent: int,
    explanation: str,
    texts: Mapping[str, Sequence[Sequence[str]] | None],
    probability: Mapping[tuple[str, str], float | None],
) -> JudgedSteering:
    """Puts verdicts back to the texts they are about.

    Args:
        texts: steered, unsteered and random: [prompts][samples] each, or None where there are none.
        probability: of (text, explanation); None or absent is a missing verdict.
    """

    def side(name: str) -> np.ndarray | None:
        rows = texts.get(name)
        if rows is None:
            return None
        values = [[probability.get((text, explanation)) for text in row] for row in rows]
        return np.array([[math.nan if value is None else value for value in row] for row in values], dtype=np.float64)

    return JudgedSteering(latent, side("steered"), side("unsteered"), side("random"))


def questions(explanation: str, texts: Mapping[str, Sequence[Sequence[str]] | None]) -> list[tuple[str, str]]:
    """Every distinct (text, explanation) that the judge has to be asked about one latent, in order."""
    pairs = {(text, explanation): None for rows in texts.values() for row in rows or () for text in row}
    return list(pairs)


def _contrast(steered: np.ndarray | None, control: np.ndarray | None) -> tuple[float, float, int]:
    """(mean difference, its standard error over prompts, prompts)."""
    if steered is None or control is None:
        return math.nan, math.nan, 0
    if steered.shape != control.shape:
        raise ValueError(f"steered texts {steered.shape} and their controls {control.shape} are not paired")
    difference = steered - control
    per_prompt = np.array([row[np.isfinite(row)].mean() for row in difference if np.isfinite(row).any()])
    if len(per_prompt) < 2:
        return math.nan, math.nan, len(per_prompt)
    return float(per_prompt.mean()), float(per_prompt.std(ddof=1) / len(per_prompt) ** 0.5), len(per_prompt)
