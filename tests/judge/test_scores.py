import numpy as np
import pytest

from sae_ray.judge.scores import (
    auroc,
    balanced_accuracy,
    best_threshold,
    derangement,
    mean_estimate,
    platt,
    shuffled_explanations,
)


def test_auroc_equals_the_pairwise_definition_with_half_ties() -> None:
    rng = np.random.default_rng(0)
    pos, neg = rng.integers(0, 6, 30) + 1.0, rng.integers(0, 6, 50) + 0.0
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in pos for n in neg]
    assert auroc(pos, neg).value == pytest.approx(np.mean(pairs), abs=1e-12)


def test_delong_error_agrees_with_the_spread_over_repeated_samples() -> None:
    rng = np.random.default_rng(1)
    found = [auroc(rng.normal(1, 1, 40), rng.normal(0, 1, 60)) for _ in range(600)]
    spread = np.std([e.value for e in found])
    assert np.mean([e.stderr for e in found]) == pytest.approx(spread, rel=0.1)


def test_the_interval_holds_the_true_auroc_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    truth = 0.7602499389065233  # Phi(1 / sqrt 2)
    held = [e.low <= truth <= e.high for e in (auroc(rng.normal(1, 1, 25), rng.normal(0, 1, 25)) for _ in range(800))]
    assert 0.92 <= np.mean(held) <= 0.98


def test_perfect_separation_of_few_items_is_not_certainty() -> None:
    estimate = auroc([5, 6, 7, 8], [1, 2, 3, 4])
    assert estimate.value == 1
    assert estimate.high == 1
    assert estimate.low == 0.5
    assert auroc(np.arange(50) + 100.0, np.arange(50.0)).low > 0.9


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")]])
def test_missing_verdicts_are_refused_rather_than_counted(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="positives"):
        auroc(bad, [1.0])


def test_best_threshold_is_the_best_of_all_thresholds() -> None:
    rng = np.random.default_rng(3)
    pos, neg = rng.normal(1, 1, 31), rng.normal(0, 2, 57)
    every = np.concatenate([pos, neg, [-9.0, 9.0]])
    best = max(balanced_accuracy(pos, neg, t)[0] for t in every)
    accuracy, false_positive, false_negative = balanced_accuracy(pos, neg, best_threshold(pos, neg))
    assert accuracy == pytest.approx(best)
    assert accuracy == pytest.approx(1 - (false_positive + false_negative) / 2)


def test_platt_recovers_the_log_odds_that_made_the_data() -> None:
    rng = np.random.default_rng(4)
    # Two unit normals one apart: log-odds at balanced classes is v - 1/2.
    a, b = platt(rng.normal(1, 1, 20_000), rng.normal(0, 1, 60_000))
    assert a == pytest.approx(1.0, abs=0.05)
    assert b == pytest.approx(-0.5, abs=0.05)


def test_platt_stays_finite_on_separated_verdicts() -> None:
    a, b = platt([5.0, 6.0, 7.0], [1.0, 2.0, 3.0])
    assert 0 < a < 20
    assert np.isfinite(b)


def test_mean_estimate_covers_the_mean_and_shrinks_with_more_latents() -> None:
    rng = np.random.default_rng(5)
    few, many = mean_estimate(rng.normal(0.7, 0.1, 10)), mean_estimate(rng.normal(0.7, 0.1, 1000))
    assert few.low < 0.7 < few.high
    assert many.high - many.low < few.high - few.low
    assert mean_estimate([0.5]).high == np.inf


def test_a_derangement_leaves_nothing_in_place_and_is_seeded() -> None:
    for n in (2, 3, 17):
        order = derangement(n, seed=n)
        assert sorted(order) == list(range(n))
        assert (order != np.arange(n)).all()
        assert (order == derangement(n, seed=n)).all()
    with pytest.raises(ValueError, match="at least 2"):
        derangement(1, 0)


def test_shuffled_explanations_avoid_handing_a_latent_an_equal_text() -> None:
    dealt = shuffled_explanations(["a", "a", "b", "c", "d"], seed=0)
    assert sorted(dealt) == ["a", "a", "b", "c", "d"]
    assert all(x != y for x, y in zip(dealt, ["a", "a", "b", "c", "d"], strict=True))
