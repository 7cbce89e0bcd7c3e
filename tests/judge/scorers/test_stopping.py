from __future__ import annotations

import math

import numpy as np
import pytest
from planted_latents import LENGTH, World

from sae_ray.evidence.examples import for_scorer
from sae_ray.evidence.types import RANDOM, Example
from sae_ray.judge.scorers.sampling import Pattern, deal_patterns, hands, matched, pattern_of, place, spread
from sae_ray.judge.scorers.stopping import error_of, needed, plan_looks, power, set_interval
from sae_ray.judge.scores import auroc


def test_the_expected_error_is_the_published_one_and_that_of_repeated_samples() -> None:
    assert [round(power(n, n, 0.85), 3) for n in (10, 20, 50)] == [0.09, 0.062, 0.039]
    rng = np.random.default_rng(0)
    # Exponential verdicts of rates 1 and r: P(positive > negative) = r / (1 + r), the formula's own case.
    rate = 0.85 / 0.15
    found = [auroc(rng.exponential(1, 20), rng.exponential(1 / rate, 30)).value for _ in range(3000)]
    assert power(20, 30, 0.85) == pytest.approx(np.std(found), rel=0.05)
    assert math.isnan(power(0, 5, 0.8))


@pytest.mark.parametrize(("value", "stderr", "ratio"), [(0.85, 0.05, 1.0), (0.7, 0.03, 2.0), (0.99, 0.2, 0.5)])
def test_needed_is_the_least_that_suffices(value: float, stderr: float, ratio: float) -> None:
    n_pos, n_neg = needed(value, stderr, ratio)
    assert power(n_pos, n_neg, value) <= stderr
    fewer = n_pos - 1
    assert fewer == 0 or power(fewer, max(1, round(fewer * ratio)), value) > stderr


def test_an_error_that_no_number_of_texts_reaches_is_refused() -> None:
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="infinitely"):
            needed(0.8, bad)
    with pytest.raises(ValueError, match="more than 1000000 texts"):
        needed(0.8, 1e-6)


def test_looks_double_and_end_with_everything() -> None:
    looks = plan_looks(20, 40, target=0.05)
    assert looks.sizes == ((5, 10), (10, 20), (20, 40))
    assert looks.level == pytest.approx(1 - 0.05 / 3)
    assert plan_looks(20, 20, target=0).sizes == ((20, 20),)
    assert plan_looks(20, 20, target=0).level == pytest.approx(0.95)
    assert plan_looks(6, 50, target=0.1).sizes == ((6, 50),)
    assert plan_looks(0, 20, target=0.1).sizes == ((0, 20),)
    assert not looks.enough(1, 0.06)
    assert looks.enough(1, 0.05)
    assert looks.enough(3, float("nan"))
    assert not plan_looks(20, 20, target=0.1).enough(1, float("nan"))


def test_perfect_separation_of_five_texts_is_not_a_reason_to_stop() -> None:
    lucky = auroc([5, 6, 7, 8, 9], [0, 1, 2, 3, 4])
    assert lucky.stderr == 0
    assert error_of(lucky, 5, 5) > 0.09
    turned = auroc([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert error_of(turned, 5, 5) == pytest.approx(error_of(lucky, 5, 5))
    rng = np.random.default_rng(0)
    usual = auroc(rng.normal(1, 1, 50), rng.normal(0, 1, 50))
    assert error_of(usual, 50, 50) == pytest.approx(usual.stderr, rel=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.75, 1.5])
def test_the_interval_at_the_stop_holds_the_truth_19_times_in_20(shift: float) -> None:
    """And the interval of a single look, taken at the stop, does not do better than that."""
    truth = 0.5 * (1 + math.erf(shift / 2))
    rng = np.random.default_rng(7)
    looks = plan_looks(40, 40, target=0.07)
    held, stopped = [], []
    for _ in range(800):
        pos, neg = rng.normal(shift, 1, 40), rng.normal(0, 1, 40)
        for look, (n_pos, n_neg) in enumerate(looks.sizes, start=1):
            found = auroc(pos[:n_pos], neg[:n_neg], looks.level)
            if looks.enough(look, error_of(found, n_pos, n_neg)):
                break
        held.append(found.low <= truth <= found.high)
        stopped.append(look)
    assert np.mean(held) >= 0.935
    assert min(stopped) < len(looks.sizes)


def test_the_interval_of_a_set_covers_its_mean_and_leaves_missing_latents_out() -> None:
    rng = np.random.default_rng(1)
    truths = rng.normal(0.7, 0.1, 30)
    fixed, drawn = [], []
    for _ in range(300):
        noise = np.full(30, 0.05)
        measured = truths + rng.normal(0, noise)
        found = set_interval(measured, noise, population=False)
        fixed.append(found.low <= truths.mean() <= found.high)
        wide = set_interval(measured, noise)
        drawn.append(wide.high - wide.low > found.high - found.low)
    assert 0.92 <= np.mean(fixed) <= 0.98
    assert all(drawn)
    some = set_interval([0.6, float("nan"), 0.8], [0.1, 0.1, 0.1], population=False)
    assert some.value == pytest.approx(0.7)
    assert some.n == 2
    assert math.isnan(set_interval([float("nan")], [0.1]).value)


def test_every_beginning_of_a_spread_order_is_a_small_copy_of_the_whole() -> None:
    latent = World(1, 40, 42).latents[0]
    examples = for_scorer(latent, 40, 42, seed=0)
    for seed in range(20):
        ordered = spread(examples, np.random.default_rng(seed))
        assert sorted(e.context for e in ordered) == sorted(e.context for e in examples)
        first = [e.stratum for e in ordered[:41]]
        for stratum in {e.stratum for e in examples}:
            whole = sum(e.stratum == stratum for e in examples)
            assert abs(first.count(stratum) - whole / 2) <= 3


def test_hands_are_dealt_evenly_without_repeats() -> None:
    dealt = hands(7, 4, 10, np.random.default_rng(0))
    assert all(len(set(hand)) == 4 for hand in dealt)
    counts = np.bincount(np.concatenate(dealt), minlength=7)
    assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="hand of 4"):
        hands(3, 4, 1, np.random.default_rng(0))


def test_pairs_are_of_like_length_and_use_no_text_twice() -> None:
    short, long = np.zeros(LENGTH, dtype=np.float32), np.zeros(LENGTH, dtype=np.float32)
    positives = [Example(i, short, RANDOM) for i in range(6)]
    negatives = [Example(10 + i, long, RANDOM) for i in range(6)]
    lengths = [[5, 5, 5, 16, 16, 16], [16, 5, 16, 5, 16, 5]]
    pairs = matched(positives, negatives, lengths, np.random.default_rng(0))
    assert all(lengths[0][p.context] == lengths[1][n.context - 10] for p, n in pairs)
    assert len({n.context for _, n in pairs}) == len({p.context for p, _ in pairs}) == 6
    assert len(matched(positives, negatives[:2], [lengths[0], lengths[1][:2]], np.random.default_rng(0))) == 2


def test_a_pattern_comes_back_where_it_was_and_keeps_clear_of_what_is_forbidden() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 20))
        active = rng.random(n) < 0.3
        pattern, free = pattern_of(active), np.zeros(n, dtype=bool)
        again = place(pattern, n, free)
        assert again is not None
        assert (again == active).all()
        if active.any():
            assert place(pattern, n, active) is None
        longer = place(pattern, n + 7, np.zeros(n + 7, dtype=bool))
        assert longer is None or longer.sum() == active.sum()
    assert place(Pattern(((0, 5),)), 3, np.zeros(3, dtype=bool)) is None
    assert place(Pattern(((-5, 2),)), 3, np.zeros(3, dtype=bool)) is None
    # Two runs that a shorter text would push together.
    assert place(Pattern(((0, 2), (-3, 2))), 5, np.zeros(5, dtype=bool)) is None


def test_in_a_longer_text_early_runs_stay_early_and_the_last_token_stays_last() -> None:
    ends = np.array([False, True, False, False, True])
    longer = place(pattern_of(ends), 8, np.zeros(8, dtype=bool))
    assert longer is not None
    assert np.flatnonzero(longer).tolist() == [1, 7]


def test_patterns_are_dealt_equally_often_and_to_as_many_texts_as_can_take_one() -> None:
    early, late = np.zeros(10, dtype=bool), np.zeros(10, dtype=bool)
    early[:2], late[7:9] = True, True
    own = [early] * 3 + [late] * 3
    for seed in range(10):
        marks, left = deal_patterns([pattern_of(m) for m in own], own, 12, np.random.default_rng(seed))
        assert all(m is not None and not (m & o).any() for m, o in zip(marks, own, strict=True))
        every = [pattern_of(m) for m in marks if m is not None] + left
        assert len(every) == 12
        assert every.count(pattern_of(early)) == every.count(pattern_of(late)) == 6
    marks, left = deal_patterns([pattern_of(early)], [early], 2, np.random.default_rng(0))
    assert marks == [None]
    assert len(left) == 2
