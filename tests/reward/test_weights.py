import math

import numpy as np
import pytest

from sae_ray.errors import UserError
from sae_ray.reward.weights import RewardCombiner


def test_a_part_without_weight_is_never_measured():
    def never():
        raise AssertionError("computed although its weight is 0")

    combiner = RewardCombiner({"interpretability": 1, "causality": 0})
    assert combiner.needed == ("interpretability",)
    found = combiner.measure({"interpretability": lambda: {3: 0.2, 5: 0.4}, "causality": never})
    assert found.latents.tolist() == [3, 5]
    assert not any(key.startswith("causality") for key in found.log)


def test_the_advantage_is_the_weighted_sum_of_standardised_parts():
    rng = np.random.default_rng(0)
    parts = {"interpretability": rng.normal(3, 2, 50), "causality": rng.normal(-1, 0.1, 50)}
    found = RewardCombiner({"interpretability": 1.0, "causality": 0.5}).combine(
        {part: dict(enumerate(values)) for part, values in parts.items()}
    )
    expected = sum(
        w * (parts[part] - parts[part].mean()) / parts[part].std()
        for part, w in [("interpretability", 1.0), ("causality", 0.5)]
    )
    np.testing.assert_allclose(found.advantage, expected, rtol=1e-9)
    assert (found.coverage == 1).all()
    assert found.log["causality/baseline"] == pytest.approx(parts["causality"].mean())
    assert found.log["causality/weight"] == 0.5


def test_units_of_a_part_do_not_matter():
    values = {0: 0.1, 1: 0.7, 2: 0.3}
    plain = RewardCombiner({"description": 2}).combine({"description": values})
    scaled = RewardCombiner({"description": 2}).combine({"description": {k: 40 * v - 7 for k, v in values.items()}})
    np.testing.assert_allclose(plain.advantage, scaled.advantage)


def test_a_latent_without_a_part_has_neither_more_nor_less_spread_than_the_others():
    rng = np.random.default_rng(1)
    n = 4000
    parts = {part: dict(enumerate(rng.normal(size=n))) for part in ("interpretability", "causality", "atomicity")}
    parts["causality"] = {latent: v for latent, v in parts["causality"].items() if latent < n // 2}
    parts["atomicity"] |= dict.fromkeys(range(n - 10, n), math.nan)
    found = RewardCombiner({"interpretability": 1, "causality": 1, "atomicity": 0.5}).combine(parts)
    whole, part = found.advantage[: n // 2], found.advantage[n // 2 : -10]
    assert part.std() == pytest.approx(whole.std(), rel=0.08)
    assert abs(part.mean()) < 0.1
    assert found.coverage[n // 2] == pytest.approx(1.5 / 2.5)
    assert found.log["atomicity/missing"] == 10


def test_a_latent_of_which_too_little_is_known_is_missing_and_not_zero():
    combiner = RewardCombiner({"interpretability": 1, "atomicity": 0.2}, min_coverage=0.3)
    found = combiner.combine({"interpretability": {0: 1.0, 1: 0.0}, "atomicity": {0: 1.0, 1: 0.0, 2: 0.5}})
    assert np.isfinite(found.advantage[:2]).all()
    assert math.isnan(found.advantage[2])
    assert found.log["advantage/missing"] == 1


def test_baselines_follow_a_drift_of_the_whole_part():
    combiner = RewardCombiner({"causality": 1}, memory=0.5)
    for _ in range(12):
        found = combiner.combine({"causality": {0: 5.0, 1: 7.0}})
    assert found.log["causality/baseline"] == pytest.approx(6.0)
    assert found.advantage == pytest.approx([-1, 1])
    late = combiner.combine({"causality": {0: 106.0, 1: 108.0}})
    assert late.log["causality/baseline"] == pytest.approx(0.5 * 6 + 0.5 * 107, rel=1e-3)


def test_a_round_without_a_part_leaves_its_baseline_alone_and_a_state_continues_the_same():
    combiner = RewardCombiner({"interpretability": 1, "causality": 1})
    combiner.combine({"interpretability": {0: 0.1, 1: 0.5}, "causality": {0: 2.0, 1: 3.0}})
    other = RewardCombiner({"interpretability": 1, "causality": 1})
    other.load_state(combiner.state_dict())
    next_round = {"interpretability": {0: 0.3, 1: 0.9}}
    a, b = combiner.combine(next_round), other.combine(next_round)
    np.testing.assert_array_equal(a.advantage, b.advantage)
    assert a.log["causality/baseline"] == pytest.approx(2.5)
    assert math.isnan(a.log["causality/mean"])


def test_equal_rewards_give_no_advantage_and_outliers_are_cut():
    assert RewardCombiner({"atomicity": 1}).combine({"atomicity": {0: 0.3, 1: 0.3}}).advantage == pytest.approx([0, 0])
    values = dict(enumerate([0.0] * 99 + [1e9]))
    assert RewardCombiner({"atomicity": 1}, clip=3).combine({"atomicity": values}).advantage.max() == 3


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"clarity": 1}, r"rlaif\.rewards\.weights\.clarity.*known: interpretability"),
        ({"causality": -1}, "from 0 on"),
        ({"causality": math.nan}, "from 0 on"),
        ({"causality": 0}, "every weight is 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, words):
    with pytest.raises(UserError, match=words):
        RewardCombiner(weights)


def test_a_needed_part_that_nobody_measures_is_refused():
    with pytest.raises(UserError, match="causality has a weight"):
        RewardCombiner({"causality": 1}).measure({})
