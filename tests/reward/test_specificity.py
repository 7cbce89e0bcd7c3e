import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sae_ray.reward.specificity import (
    BORROWED,
    Judged,
    JudgedTexts,
    Kept,
    Pair,
    choose_specific,
    far_ratio,
    without_shared,
)

POSITIVES, NEAR, SIBLINGS, RANDOMS = 6, 4, 5, 5
TEXTS = JudgedTexts(
    active=np.array([True] * POSITIVES + [False] * (NEAR + SIBLINGS + RANDOMS)),
    weight=np.array([5.0] * POSITIVES + [8.0] * NEAR + [20.0] * SIBLINGS + [150.0] * RANDOMS),
    kind=np.array(["positive"] * POSITIVES + ["near_miss"] * NEAR + ["sibling"] * SIBLINGS + ["random"] * RANDOMS),
)
N = len(TEXTS.active)
unit = st.floats(0, 1, allow_nan=False)
verdicts = arrays(np.float64, N, elements=unit)
fast = settings(max_examples=150, deadline=None)


def candidates(*probabilities, lengths=None) -> list[Judged]:
    lengths = lengths or [3.0] * len(probabilities)
    return [Judged(np.asarray(p, dtype=float), length) for p, length in zip(probabilities, lengths, strict=True)]


def by_kind(positive, near, sibling, random) -> np.ndarray:
    return np.array([positive] * POSITIVES + [near] * NEAR + [sibling] * SIBLINGS + [random] * RANDOMS, dtype=float)


@fast
@given(narrow=verdicts, raised=verdicts, others=st.lists(verdicts, max_size=3), data=st.data())
def test_a_broader_explanation_never_beats_a_more_specific_one_of_equal_recall(narrow, raised, others, data):
    """Whatever else competes, whoever is shorter or comes first: also if the positives are judged otherwise one by
    one, as long as the recall is the same."""
    broad = np.maximum(narrow, raised)
    broad[TEXTS.active] = data.draw(st.permutations(narrow[TEXTS.active].tolist()))
    assume((TEXTS.weight * (broad - narrow)).sum() > 1e-3)
    order = data.draw(st.permutations(range(2 + len(others))))
    everyone = [narrow, broad, *others]
    lengths = data.draw(st.lists(st.floats(1, 9), min_size=len(everyone), max_size=len(everyone)))
    ratio = data.draw(st.none() | st.floats(0.1, 1))
    chosen = choose_specific(candidates(*(everyone[i] for i in order), lengths=lengths), TEXTS, ratio)
    assert order[chosen.index] != 1
    assert chosen.fits[order.index(0)].f1 >= chosen.fits[order.index(1)].f1


@fast
@given(
    yes=st.floats(0.01, 1),
    lengths=st.lists(st.floats(1, 50), min_size=1, max_size=6),
)
def test_a_judge_that_says_yes_to_everything_gives_no_explanation_an_advantage(yes, lengths):
    chosen = choose_specific(candidates(*[np.full(N, yes)] * len(lengths), lengths=lengths), TEXTS)
    assert {fit.advantage for fit in chosen.fits} == {0.0}
    assert len({fit.f1 for fit in chosen.fits}) == 1
    assert lengths[chosen.index] == min(lengths)


@fast
@given(good=verdicts, yes=st.floats(0.9, 1))
def test_an_explanation_of_everything_loses_to_any_that_tells_more(good, yes):
    everything = np.full(N, yes)
    chosen = choose_specific(candidates(everything, good, lengths=[1, 99]), TEXTS)
    if chosen.fits[1].advantage > 1e-6:
        assert chosen.index == 1
    assert chosen.fits[0].advantage == 0


def test_f1_recall_and_breadth_are_those_of_the_corpus():
    rng = np.random.default_rng(0)
    p = rng.random(N)
    fit = choose_specific(candidates(p), TEXTS).fits[0]
    w, a = TEXTS.weight, TEXTS.active
    assert fit.f1 == pytest.approx(2 * (w * p * a).sum() / ((w * p).sum() + (w * a).sum()))
    assert fit.recall == pytest.approx((w * p * a).sum() / (w * a).sum())
    assert fit.breadth == pytest.approx((w * p).sum() / w.sum())


def test_the_error_of_f1_is_its_spread_over_draws_of_the_texts():
    """Drawn from a corpus of known strata, the linearised error is the standard deviation of the estimate."""
    rng = np.random.default_rng(1)
    n = {"positive": 40, "near_miss": 30, "sibling": 40, "random": 60}
    chance = {"positive": 0.8, "near_miss": 0.4, "sibling": 0.3, "random": 0.03}
    size = {"positive": 300.0, "near_miss": 400.0, "sibling": 800.0, "random": 9000.0}
    kind = np.concatenate([[name] * count for name, count in n.items()])
    texts = JudgedTexts(kind == "positive", np.array([size[k] / n[k] for k in kind]), kind)
    fits = []
    for _ in range(400):
        p = (rng.random(len(kind)) < [chance[k] for k in kind]).astype(float)
        fits.append(choose_specific(candidates(p), texts).fits[0])
    assert np.mean([fit.f1_error for fit in fits]) == pytest.approx(np.std([fit.f1 for fit in fits]), rel=0.15)
    assert np.mean([fit.recall_error for fit in fits]) == pytest.approx(np.std([fit.recall for fit in fits]), rel=0.15)


def test_the_parent_loses_against_siblings_and_wins_against_random_texts_only():
    parent, child = by_kind(0.9, 0.5, 0.9, 0.02), by_kind(0.85, 0.2, 0.05, 0.02)
    assert choose_specific(candidates(parent, child), TEXTS).index == 1
    far = TEXTS.kind != "sibling"
    far &= TEXTS.kind != "near_miss"
    only_random = JudgedTexts(TEXTS.active[far], TEXTS.weight[far], TEXTS.kind[far])
    chosen = choose_specific(candidates(parent[far], by_kind(0.6, 0, 0, 0.02)[far]), only_random)
    assert chosen.index == 0


def test_a_narrow_explanation_that_loses_its_recall_does_not_win():
    rng = np.random.default_rng(2)
    many = JudgedTexts(*(np.repeat(x, 20) for x in (TEXTS.active, TEXTS.weight, TEXTS.kind)))
    good = np.repeat(by_kind(0.9, 0.1, 0.1, 0.0), 20) + rng.uniform(0, 0.05, 20 * N)
    narrow = np.repeat(by_kind(0.4, 0.0, 0.0, 0.0), 20)
    assert choose_specific(candidates(good, narrow), many).index == 0


def test_certainty_of_being_bad_does_not_win():
    """What few random texts leave open is the better explanation's whole error; the broad one's F1 is .14 for sure."""
    broad, good = by_kind(1, 0.5, 0.5, 0.5), by_kind(0.85, 0, 0, 0)
    chosen = choose_specific(candidates(broad, good), TEXTS)
    assert chosen.fits[1].f1_error > chosen.fits[1].f1 - chosen.fits[0].f1
    assert chosen.index == 1


def test_random_texts_borrow_from_near_ones_what_the_round_tells():
    p = np.random.default_rng(3).random(N)
    near = np.isin(TEXTS.kind, ("near_miss", "sibling"))
    filled = p.copy()
    far = TEXTS.kind == "random"
    filled[far] = (RANDOMS * p[far].mean() + BORROWED * 0.3 * p[near].mean()) / (RANDOMS + BORROWED)
    fit = choose_specific(candidates(p), TEXTS, ratio=0.3).fits[0]
    plain = choose_specific(candidates(filled), TEXTS).fits[0]
    assert (fit.f1, fit.recall, fit.breadth) == pytest.approx((plain.f1, plain.recall, plain.breadth))
    only_far = JudgedTexts(TEXTS.active[~near], TEXTS.weight[~near], TEXTS.kind[~near])
    alone = [choose_specific(candidates(p[~near]), only_far, ratio).fits[0].f1 for ratio in (None, 0.3)]
    assert alone[0] == alone[1], "nothing to borrow from"


def test_the_ratio_is_of_all_candidates_that_were_asked_on_both():
    first, second = by_kind(1, 0.4, 0.4, 0.1), by_kind(1, 0.2, 0.2, 0.05)
    blind = by_kind(1, 0.9, 0.9, np.nan)
    assert far_ratio([([first, blind], TEXTS), ([second], TEXTS)]) == pytest.approx(0.15 / 0.6)
    assert far_ratio([([by_kind(1, 0.1, 0.1, 0.3)], TEXTS)]) == 1
    assert far_ratio([([blind], TEXTS)]) is None
    assert far_ratio([]) is None


def test_what_the_round_tells_keeps_parents_from_winning_by_a_few_wrong_verdicts():
    """A child among its siblings, 10% of the verdicts wrong: without the round a few of them decide."""
    n, rng = 8, np.random.default_rng(4)
    kind = np.repeat(["positive", "near_miss", "sibling", "random"], n)
    texts = JudgedTexts(kind == "positive", np.repeat([300.0, 1500, 1200, 27_000], n) / n, kind)
    chances = {"child": (0.8, 0.02, 0.02, 0.001), "parent": (1.0, 0.5, 0.6, 0.03)}

    def told(name: str) -> np.ndarray:
        return ((rng.random(4 * n) < np.repeat(chances[name], n)) ^ (rng.random(4 * n) < 0.1)).astype(float)

    judged = [([told("parent"), told("child")], texts) for _ in range(300)]
    ratio = far_ratio(judged)
    parents = [
        np.mean([choose_specific(candidates(*told), texts, r).index == 0 for told, _ in judged]) for r in (None, ratio)
    ]
    assert parents[0] > 0.2
    assert parents[1] < 0.05


def test_equals_go_to_the_shorter_and_then_to_the_first():
    a = by_kind(0.9, 0.2, 0.2, 0.01)
    assert choose_specific(candidates(a, a, a, lengths=[9, 2, 2]), TEXTS).index == 1


def test_missing_verdicts_are_replaced_by_their_stratum_and_a_blind_candidate_is_not_measured():
    full = by_kind(0.9, 0.2, 0.1, 0.01)
    holes = full.copy()
    holes[[0, POSITIVES, N - 1]] = np.nan
    blind = full.copy()
    blind[TEXTS.kind == "sibling"] = np.nan
    chosen = choose_specific(candidates(full, holes, blind, lengths=[5, 4, 1]), TEXTS)
    assert chosen.fits[1].f1 == pytest.approx(chosen.fits[0].f1)
    assert chosen.fits[2] is None
    assert chosen.index == 1
    assert choose_specific(candidates(blind), TEXTS) is None


def test_agreement_of_few_verdicts_is_not_certainty():
    fit = choose_specific(candidates(by_kind(1, 0, 0, 0)), TEXTS).fits[0]
    assert fit.f1 == pytest.approx(1)
    assert fit.f1_error > 0.1
    assert fit.recall_error == pytest.approx(0.5 / (POSITIVES + 1))


def test_close_latents_do_not_keep_one_explanation():
    kept = [Kept(1, "Dogs.", 0.6), Kept(2, "dogs", 0.8), Kept(3, "dogs", 0.7), Kept(4, "cats", 0.2)]
    by_direction = without_shared(kept, [Pair(1, 2, 0.9, np.nan), Pair(2, 4, 0.9, 0.9)])
    assert [(loss.latent, loss.holder) for loss in by_direction] == [(1, 2)]
    by_firing = without_shared(kept, [Pair(3, 2, 0.1, 0.8), Pair(3, 1, 0.7, 0.0)])
    # 3 lost to 2, so it does not hold the explanation that 1, close to 3 alone, has.
    assert [(loss.latent, loss.holder) for loss in by_firing] == [(3, 2)]
    assert without_shared(kept, [Pair(1, 2, 0.3, 0.2)]) == []


@fast
@given(
    f1=st.lists(unit, min_size=2, max_size=8),
    words=st.lists(st.sampled_from(["a", "A!", "b"]), min_size=8, max_size=8),
    ends=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=15),
)
def test_no_two_close_latents_keep_one_explanation_and_the_best_always_does(f1, words, ends):
    kept = [Kept(i, words[i], value) for i, value in enumerate(f1)]
    pairs = [Pair(a, b, 0.9, 0.0) for a, b in ends]
    losers = {loss.latent: loss for loss in without_shared(kept, pairs)}
    for pair in pairs:
        a, b = pair.first, pair.second
        if a != b and max(a, b) < len(kept) and words[a].strip("!").lower() == words[b].strip("!").lower():
            assert a in losers or b in losers
    for loss in losers.values():
        assert loss.holder not in losers
        assert f1[loss.holder] >= f1[loss.latent]
    assert min(range(len(f1)), key=lambda i: (-f1[i], i)) not in losers
