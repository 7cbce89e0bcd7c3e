"""Where a score becomes a yes: the explanation's own cut, found on the other half of the texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sae_ray.reward.composition import LatentReward
from sae_ray.reward.round_batch import reward_batch
from sae_ray.reward.verdict_cut import LEAST_RATE, at_own_cuts, best_cut

PLANTED = (0.09, 0.42)


def rows(latent: int, gap: float, level: float, each: int = 40) -> list[dict[str, Any]]:
    """Scores of active texts `gap` standard deviations above those of random ones, all far below a planted yes."""
    rng = np.random.default_rng(latent)
    made = []
    for index in range(4 * each):
        positive = index % 2 == 0
        made.append({
            "latent": latent, "explanation": str(latent), "purpose": "select" if index < 2 * each else "score",
            "kind": "positive" if positive else "random", "active": positive, "context": index, "weight": 1.0,
            "token": index, "margin": 0.0, "score": level + gap * positive + rng.normal(), "probability": 0.1,
        })  # fmt: skip
    return made


def test_a_cut_is_where_yes_is_right_most_often_by_trying_all():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 30), rng.normal(0, 1, 17)
    found = best_cut(positive, negative)

    def right(cut: float) -> float:
        return float((positive >= cut).mean() - (negative >= cut).mean())

    assert found is not None
    assert right(found) == max(right(cut) for cut in np.linspace(-5, 5, 4001))
    assert best_cut(positive, negative[:0]) is None


def test_verdicts_follow_scores_that_no_planted_item_calls_a_yes():
    every = rows(3, gap=2.0, level=-9.0)
    found = at_own_cuts(every, {3}, PLANTED)
    active = np.array([row["active"] for row in every])
    assert found.verdict[active].mean() > 0.7
    assert found.verdict[~active].mean() < 0.3
    assert found.false_positive_rate == pytest.approx(found.verdict[~active].mean())
    assert found.false_negative_rate == pytest.approx(1 - found.verdict[active].mean())


def test_scores_that_tell_nothing_get_verdicts_that_tell_nothing():
    """The cut of one half cannot make the other's verdicts agree with where the latent fires."""
    every = [row for latent in range(40) for row in rows(latent, gap=0.0, level=0.0)]
    found = at_own_cuts(every, set(range(40)), PLANTED)
    active = np.array([row["active"] for row in every])
    assert abs(found.verdict[active].mean() - found.verdict[~active].mean()) < 0.03


def test_rates_are_those_of_latents_that_teach_and_the_planted_ones_without_any():
    every = [*rows(1, gap=6.0, level=0.0), *rows(2, gap=0.0, level=0.0)]
    sure = at_own_cuts(every, {1}, PLANTED)
    assert sure.false_positive_rate == LEAST_RATE
    assert sure.false_negative_rate == LEAST_RATE
    assert at_own_cuts(every, {1, 2}, PLANTED).false_negative_rate > 0.1
    assert at_own_cuts(every, (), PLANTED)[1:] == PLANTED


def test_a_half_that_cannot_be_cut_keeps_the_planted_verdicts():
    every = [row for row in rows(5, gap=2.0, level=0.0) if row["purpose"] == "score" or row["active"]]
    found = at_own_cuts(every, {5}, PLANTED)
    half = np.array([row["purpose"] == "score" for row in every])
    assert not found.verdict[half].any()  # the other half has no text that is not active
    assert found.verdict[~half].any()


def test_a_round_sends_verdicts_at_own_cuts_with_their_rates():
    every = rows(3, gap=2.0, level=-9.0)
    reward = LatentReward(3, "3", "llm", 0.9, 0.05, 0.5, 0.4, 40)
    planted, own = (reward_batch(0, 0, [reward], every, PLANTED, own_cuts=own) for own in (False, True))
    assert not planted.row_verdict.any()
    assert (planted.false_positive_rate, planted.false_negative_rate) == PLANTED
    expected = at_own_cuts(every, {3}, PLANTED)
    assert own.row_verdict.tolist() == expected.verdict.tolist()
    assert (own.false_positive_rate, own.false_negative_rate) == expected[1:]
