import pytest

from sae_ray.reward.composition import LatentReward, age_weight


def reward(auroc: float, shuffled: float, error: float = 0.05) -> LatentReward:
    return LatentReward(1, "x", "llm", auroc, error, shuffled, auroc - shuffled, 20)


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
