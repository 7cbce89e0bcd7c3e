from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from planted_latents import LENGTH, FakeJudge, World, calibration, in_focus, knows, places_in_focus

from sae_ray.config import JudgingConfig
from sae_ray.evidence.types import QUANTILE, TOP
from sae_ray.judge.prompts import unfocused
from sae_ray.judge.scorers.base import Instruments, Score
from sae_ray.judge.scorers.fuzzing import MISPLACED, Fuzzing, highlighted, highlighted_trials
from sae_ray.judge.scorers.verdicts import Trial

CFG = JudgingConfig(null_share=1)


def fuzz(world: World, verdict: Callable[[str, str], float | None], cfg: JudgingConfig = CFG) -> list[Score]:
    tools = Instruments(judge=FakeJudge(verdict), calibration=calibration())
    return asyncio.run(Fuzzing().score(world.jobs(), world.contexts, tools, cfg, seed=0))


def sees_words_in_focus(text: str, explanation: str) -> float:
    return knows(" ".join(in_focus(text)), explanation)


def early(rng: np.random.Generator) -> Sequence[int]:
    """Places that a latent with a liking for beginnings fires at: 2 or 3, and mostly one more."""
    return [2, 3, 6][: int(rng.integers(1, 4))] if rng.random() < 0.7 else [3, 9]


POSITION_JUDGES = {
    "first": lambda text, _: float(np.argmax(places_in_focus(text))),
    "last": lambda text, _: float(np.argmax(places_in_focus(text)[::-1])),
    "number": lambda text, _: float(sum(places_in_focus(text))),
    "runs": lambda text, _: float(len(in_focus(text))),
    "early": lambda text, _: float(places_in_focus(text)[2]),
}


def test_a_judge_that_knows_the_marked_words_gets_one_on_every_kind_of_negative() -> None:
    for score in fuzz(World(), sees_words_in_focus):
        assert score.value == 1
        assert score.shuffled == 0.5
        assert score.extra[f"auroc_{MISPLACED}"] == 1
        assert score.extra["auroc_near_miss"] == 1
        assert score.n == 40
        assert "soft_f1" not in score.extra


def test_a_judge_that_reads_the_text_but_not_the_marks_is_at_chance_on_misplaced_ones() -> None:
    for score in fuzz(World(), knows):
        assert score.extra[f"auroc_{MISPLACED}"] == 0.5
        assert score.extra["auroc_random"] == 1
        assert 0.7 < score.value < 0.8


@pytest.mark.parametrize("name", POSITION_JUDGES)
@pytest.mark.parametrize("ragged", [False, True])
def test_where_and_how_much_is_highlighted_gives_nothing_away(name: str, ragged: bool) -> None:
    world = World(latents=16, places=early, ragged=ragged, distinct=True)
    values = [score.value for score in fuzz(world, POSITION_JUDGES[name])]
    # Texts of one length carry the very same patterns on both sides, which leaves the judge exactly at chance.
    if not ragged:
        assert values == pytest.approx([0.5] * 16)
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)


def test_highlights_drawn_at_random_would_have_given_it_away() -> None:
    """The position judge can tell: it is the drawing that leaves it at chance."""
    world, rng = World(latents=10, places=early, distinct=True), np.random.default_rng(0)
    values = []
    for latent in world.latents:
        trials = highlighted_trials(latent, world.contexts, 20, 20, seed=0)
        pos = [POSITION_JUDGES["early"](t.text, "") for t in trials if t.positive]
        neg = []
        for trial in trials:
            if not trial.positive:
                at = rng.choice(np.arange(1, LENGTH - 1), size=2, replace=False)
                neg.append(float(2 in at))
        values.append(np.mean([[0.5 * (p == n) + (p > n) for n in neg] for p in pos]))
    assert np.mean(values) > 0.6


def test_negatives_never_mark_the_latents_own_tokens_and_mark_as_many_in_the_same_places() -> None:
    world = World(latents=12, places=early, distinct=True)
    for latent, name in zip(world.latents, world.names, strict=True):
        trials = highlighted_trials(latent, world.contexts, 20, 20, seed=0)
        patterns: dict[bool, Counter] = {True: Counter(), False: Counter()}
        for trial in trials:
            marks = places_in_focus(trial.text)
            marked_words = " ".join(in_focus(trial.text)).split()
            assert set(marked_words) == {name} if trial.positive else name not in marked_words
            assert trial.positive == (trial.stratum in (TOP, QUANTILE))
            patterns[trial.positive][tuple(marks)] += 1
        assert patterns[True] == patterns[False]
        kinds = Counter(trial.stratum for trial in trials if not trial.positive)
        assert kinds[MISPLACED] >= 1
        assert sum(kinds.values()) == 20


def test_the_text_is_the_one_that_detection_reads() -> None:
    world = World(ragged=True)
    for trial in highlighted_trials(world.latents[0], world.contexts, 20, 20, seed=0):
        assert unfocused(trial.text)[1] == world.contexts.text(trial.context)


def test_a_judge_is_told_of_a_few_short_runs_whatever_they_hold() -> None:
    pieces = [" a", "b" * 50, " c", "\n", " <<", " d", "", " e", " f", " g"]
    assert highlighted(pieces, np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0])) == ["a" + "b" * 19, "\\n"]
    assert highlighted(pieces, np.array([1, 0, 1, 0, 0, 1, 0, 1, 0, 1])) == ["a", "c", "d", "e"]
    (quoted,) = highlighted(pieces, np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0]))
    assert quoted == "\\<\\<"


def test_a_latent_that_fires_everywhere_gets_no_misplaced_highlights() -> None:
    world = World(latents=1, places=lambda rng: np.arange(1, LENGTH))
    trials = highlighted_trials(world.latents[0], world.contexts, 20, 20, seed=0)
    assert not any(trial.stratum == MISPLACED for trial in trials)
    assert sum(not trial.positive for trial in trials) == 20


def test_a_lenient_judge_earns_what_its_null_earns_and_a_silent_one_nothing() -> None:
    for score in fuzz(World(), lambda text, explanation: 1.0):
        assert score.value == score.shuffled == 0.5
    for score in fuzz(World(), lambda text, explanation: None):
        assert np.isnan(score.value)
        assert score.n == 0


def test_every_beginning_of_the_trials_has_both_kinds_of_negatives() -> None:
    world = World(latents=8)
    for latent in world.latents:
        trials: list[Trial] = highlighted_trials(latent, world.contexts, 20, 20, seed=0)
        first = [trial.stratum == MISPLACED for trial in trials if not trial.positive][:6]
        assert 2 <= sum(first) <= 4
