import math

import numpy as np
import pytest

from sae_ray.reward.causality import (
    JudgedSteering,
    causality_rewards,
    judged_steering,
    questions,
    steered_rollouts,
)


def judged(steered, unsteered, random, latent=1) -> JudgedSteering:
    arrays = [None if value is None else np.asarray(value, dtype=float) for value in (steered, unsteered, random)]
    return JudgedSteering(latent, *arrays)


def test_the_reward_is_the_lesser_paired_difference_with_its_error_over_prompts():
    rng = np.random.default_rng(0)
    steered, unsteered, random = rng.random((8, 3)), rng.random((8, 3)) * 0.2, rng.random((8, 3)) * 0.5
    reward = causality_rewards([judged(steered, unsteered, random)])[1]
    per_prompt = (steered - random).mean(axis=1)
    assert reward.reward == pytest.approx(per_prompt.mean())
    assert reward.standard_error == pytest.approx(per_prompt.std(ddof=1) / 8**0.5)
    assert reward.over_random == (reward.reward, reward.standard_error)
    assert reward.over_unsteered[0] == pytest.approx((steered - unsteered).mean())
    assert reward.prompts == 8


def test_steering_that_does_no_more_than_a_random_push_earns_nothing():
    half, none = np.full((4, 2), 0.6), np.full((4, 2), 0.1)
    assert causality_rewards([judged(half, none, half)])[1].reward == 0
    assert causality_rewards([judged(half, none, none)])[1].reward == pytest.approx(0.5)


def test_a_judge_that_says_yes_to_everything_rewards_nobody():
    yes = np.ones((5, 2))
    assert causality_rewards([judged(yes, yes, yes)])[1].reward == 0


def test_what_could_not_be_steered_or_judged_is_missing_and_not_zero():
    yes, no = np.ones((3, 2)), np.zeros((3, 2))
    one_prompt = np.array([[1.0, 1.0], [np.nan, np.nan], [np.nan, np.nan]])
    cases = [
        judged(None, no, no, 1),
        judged(yes, no, None, 2),
        judged(one_prompt, no, no, 3),
        judged(np.full((3, 2), np.nan), no, no, 4),
        judged(yes, no, no, 5),
    ]
    assert list(causality_rewards(cases)) == [5]


def test_a_missing_verdict_leaves_out_only_its_pair():
    steered = np.array([[1.0, np.nan], [0.6, 0.8], [0.4, 0.4]])
    control = np.array([[0.5, 0.1], [np.nan, 0.2], [0.1, 0.3]])
    reward = causality_rewards([judged(steered, control, control)])[1]
    assert reward.reward == pytest.approx(np.mean([0.5, 0.6, 0.2]))


def test_the_lesser_of_two_noisy_differences_is_as_low_as_it_says():
    rng = np.random.default_rng(3)
    rewards = causality_rewards([judged(*rng.normal(size=(3, 6, 1)), latent=i) for i in range(4000)])
    # The two differences share the steered side: correlation 1/2, so .56 of the error times sqrt(1 - 1/2) * sqrt(2).
    error = np.sqrt(2 / 6)
    assert np.mean([r.reward for r in rewards.values()]) == pytest.approx(-error * math.sqrt(0.5 / math.pi), rel=0.1)


def test_verdicts_find_their_way_back_to_their_texts():
    texts = {"steered": [["a", "b"], ["c", "a"]], "unsteered": [["d", "d"], ["e", "f"]], "random": None}
    asked = questions("x", texts)
    assert asked == [(text, "x") for text in "abcdef"]
    found = judged_steering(4, "x", texts, {(text, "x"): i / 10 for i, (text, _) in enumerate(asked) if text != "c"})
    assert found.latent == 4
    np.testing.assert_allclose(found.steered, [[0.0, 0.1], [np.nan, 0.0]])
    np.testing.assert_allclose(found.unsteered, [[0.3, 0.3], [0.4, 0.5]])
    assert found.random is None


def test_texts_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        causality_rewards([judged(np.ones((2, 2)), np.ones((3, 2)), np.ones((2, 2)))])


def test_rollouts_are_rewarded_beyond_the_control_that_decides_and_what_is_missing_stays_so():
    rng = np.random.default_rng(0)
    unsteered, random = rng.random((2, 3, 2)) * 0.2
    steered = rng.random((3, 2))
    lost = np.where(np.arange(6).reshape(3, 2) == 4, np.nan, steered)
    cases = [
        judged(lost, unsteered + 0.3, random, 8),
        judged(steered, unsteered, random + 0.3, 5),
        judged(None, unsteered, random, 2),
        judged(steered, unsteered, None, 3),
    ]
    gradients = rng.random((3, 2, 7)).astype(np.float32)
    written = {latent: (float(latent), latent * gradients) for latent in (3, 5, 8)}
    rewards = causality_rewards(cases)
    found = steered_rollouts(cases, rewards, written)
    assert found.latent.tolist() == [5] * 6 + [8] * 6
    np.testing.assert_allclose(found.reward[:6], (steered - (random + 0.3).mean()).ravel(), rtol=1e-6)
    assert found.reward[:6].mean() == pytest.approx(rewards[5].reward)
    np.testing.assert_allclose(found.reward[6:], (lost - (unsteered + 0.3).mean()).ravel(), rtol=1e-6)
    assert np.isnan(found.reward[10])
    np.testing.assert_allclose(found.log_prob_grad, np.concatenate([5 * gradients, 8 * gradients]).reshape(12, 7))
    assert found.strength.tolist() == [5.0] * 6 + [8.0] * 6
    assert len(steered_rollouts([], {}, {}).latent) == 0
