"""What explainers and scorers are dealt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sae_ray.evidence.examples import allot, for_explainer, for_scorer
from sae_ray.evidence.types import NEAR_MISS, QUANTILE, RANDOM, SIBLING, TOP, Example, LatentEvidence


def side(first: int, top: int = 10, quantiles: int = 10, per: int = 6, negatives: int = 20) -> tuple[Example, ...]:
    out, context = [], first

    def add(stratum: str, peak: float, **more) -> None:
        nonlocal context
        acts_S = np.zeros(4, dtype=np.float32)
        acts_S[context % 4] = peak
        out.append(Example(context, acts_S, stratum, **more))
        context += 1

    for index in range(top):
        add(TOP, 100 - index)
    for quantile in range(quantiles):
        for index in range(per):
            add(QUANTILE, 1 + quantile + index / 10, weight=5.0, quantile=quantile)
    for stratum, weight in ((NEAR_MISS, 1.0), (SIBLING, 3.0), (RANDOM, 50.0)):
        for _ in range(negatives):
            add(stratum, 0.0, weight=weight)
    return tuple(out)


def evidence(**more) -> LatentEvidence:
    return LatentEvidence(3, 0.01, 0.1, 100.0, explain=side(0), score=side(1000, **more))


def test_the_explainer_sees_the_strongest_and_a_spread_strongest_first():
    latent = evidence()
    shown = for_explainer(latent, 8)
    peaks = [e.acts_S.max() for e in shown]
    assert peaks[0] == 100
    assert peaks == sorted(peaks, reverse=True)
    # A quarter of 310 contexts: the 10 strongest and quantiles 9, 8 and half of 7.
    assert sum(peak > 8 for peak in peaks) == 4
    assert min(peaks) < 3
    assert all(e.context < 1000 for e in shown)
    assert for_explainer(latent, 8) == shown


@pytest.mark.parametrize("n", [0, 1, 2, 5, 69, 70, 500])
def test_the_explainer_sees_as_many_as_it_asks_for_none_twice(n):
    shown = for_explainer(evidence(), n)
    assert len({e.context for e in shown}) == len(shown) == min(n, 70)


def test_a_scorer_gets_all_strata_and_their_whole_weight():
    latent = evidence()
    dealt = for_scorer(latent, 22, 21, seed=1)
    assert len(dealt) == len({e.context for e in dealt}) == 43
    assert all(e.context >= 1000 for e in dealt)
    strata = [e.stratum for e in dealt]
    assert [strata.count(s) for s in (TOP, QUANTILE, NEAR_MISS, SIBLING, RANDOM)] == [2, 20, 7, 7, 7]
    for stratum in (TOP, QUANTILE, NEAR_MISS, SIBLING, RANDOM):
        mine = sum(e.weight for e in dealt if e.stratum == stratum)
        assert mine == pytest.approx(sum(e.weight for e in latent.score if e.stratum == stratum))
    assert {e.quantile for e in dealt if e.stratum == QUANTILE} == set(range(10))
    first = dealt[:20]
    assert 4 <= sum(e.active for e in first) <= 16


def test_fewer_positives_than_groups_are_still_spread():
    dealt = for_scorer(evidence(), 4, 0)
    peaks = sorted(float(e.acts_S.max()) for e in dealt)
    assert len(dealt) == 4
    assert peaks[0] < 4.6
    assert peaks[-1] >= 9
    assert sum(e.weight for e in dealt) == pytest.approx(310)


def test_the_deal_is_a_function_of_latent_and_seed():
    latent = evidence()
    assert for_scorer(latent, 10, 10, 5) == for_scorer(latent, 10, 10, 5)
    assert for_scorer(latent, 10, 10, 5) != for_scorer(latent, 10, 10, 6)
    randoms = [{e.context for e in for_scorer(latent, 4, 12, seed) if e.stratum == RANDOM} for seed in (1, 2)]
    assert randoms[0] == randoms[1]


def test_strata_that_run_short_are_made_up_for():
    latent = evidence()
    few = [e for e in latent.score if e.stratum != SIBLING and not (e.stratum == NEAR_MISS and e.context % 2)]
    dealt = for_scorer(replace(latent, score=tuple(few)), 6, 24)
    strata = [e.stratum for e in dealt]
    assert [strata.count(s) for s in (NEAR_MISS, SIBLING, RANDOM)] == [10, 0, 14]
    only = tuple(e for e in latent.score if e.stratum == TOP)
    assert len(for_scorer(replace(latent, score=only), 6, 24)) == 6
    assert for_scorer(replace(latent, score=()), 6, 24) == []


def test_an_allotment_is_as_equal_as_the_sizes_allow():
    assert allot([10, 10, 10], 10) == [4, 3, 3]
    assert allot([1, 10, 2], 9) == [1, 6, 2]
    assert allot([1, 2], 9) == [1, 2]
    assert allot([], 3) == []
