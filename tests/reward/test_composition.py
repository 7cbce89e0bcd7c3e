import numpy as np
import pytest

from sae_ray.reward.composition import LatentReward, age_weight, choose_explanation, soft_f1


def reward(auroc: float, shuffled: float, error: float = 0.05) -> LatentReward:
    return LatentReward(1, "x", "llm", auroc, error, shuffled, auroc - shuffled, 20)


def test_a_broad_explanation_loses_once_random_texts_count_as_often_as_they_occur():
    active = np.array([True] * 4 + [False] * 4)
    weight = np.array([1.0] * 4 + [50.0] * 4)
    broad = np.array([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5])
    specific = np.array([0.8, 0.8, 0.8, 0.8, 0.0, 0.0, 0.0, 0.0])
    assert choose_explanation([broad, specific], active, weight, [3, 3]) == 1
    assert soft_f1(specific, active, weight) == pytest.approx(2 * 3.2 / (3.2 + 4))


def test_among_equals_the_shorter_explanation_wins_and_missing_verdicts_do_not_count():
    active, weight = np.array([True, False]), np.ones(2)
    same = np.array([0.9, 0.1])
    assert choose_explanation([same, same], active, weight, [9, 2]) == 1
    assert choose_explanation([np.array([np.nan, np.nan]), same], active, weight, [1, 9]) == 1


@pytest.mark.parametrize(("auroc", "shuffled"), [(0.5, 0.5), (0.9, 0.9), (0.52, 0.3)])
def test_chance_and_leniency_earn_no_credit(auroc, shuffled):
    assert reward(auroc, shuffled).credit_weight == 0


def test_credit_grows_with_the_measured_reward_and_shrinks_with_its_error():
    assert reward(1.0, 0.5, 0.0).credit_weight == 1
    assert reward(0.8, 0.5, 0.05).credit_weight == pytest.approx(0.5)
    assert reward(0.8, 0.5, 0.1).credit_weight < 0.5


def test_a_reward_counts_half_after_its_half_life():
    assert age_weight(400, 400) == 0.5
    assert age_weight(-3, 400) == 1
