from __future__ import annotations

import asyncio
import itertools
import json
import math
import re

import numpy as np
import pytest
from planted_latents import FakeJudge, Words, World, calibration, noisy

from sae_ray.config import JudgingConfig
from sae_ray.evidence.types import QUANTILE, TOP, Contexts, Example
from sae_ray.judge.scorers.base import Instruments, Score
from sae_ray.judge.scorers.intruder import Group, Intruder, _by_leaving_out, question, summary
from sae_ray.judge.scorers.verdicts import clustered

CFG = JudgingConfig()


def find(world: World, judge: FakeJudge, mode: str = "likelihood") -> list[Score]:
    tools = Instruments(judge=judge, calibration=calibration(mode))
    return asyncio.run(Intruder().score(world.jobs(), world.contexts, tools, CFG, seed=0))


def shares_words(text: str, explanation: str) -> float:
    return float(len(set(text.split()) & set(explanation.split(", "))))


def texts_of(prompt: str) -> list[str]:
    return re.findall(r"Text \d \[\d{4}\] begins\.\n(.*?)\nText \d", prompt, re.DOTALL)


def finds_the_odd_one(prompt: str) -> str:
    odd = [i for i, text in enumerate(texts_of(prompt), start=1) if "word" not in text]
    assert len(odd) == 1
    return json.dumps({"number": odd[0]})


def test_words_that_the_others_share_find_the_intruder() -> None:
    for score in find(World(), FakeJudge(shares_words)):
        assert score.value > 0.9
        assert score.low > 0.7
        assert score.extra["accuracy"] > 0.85
        assert score.extra["accuracy_chance"] == 0.2
        assert score.extra["groups"] == 20
        assert score.chance == 0.5
        assert math.isnan(score.shuffled)


def test_a_text_is_judged_against_words_of_the_others_only() -> None:
    words, tokens = Words(), {}
    for context, text in enumerate(["sea dup", "sea dup", "sea one", "sea two", "land three"]):
        tokens[context] = np.array([words.add(word) for word in text.split()], dtype=np.int32)
    examples = tuple(Example(context, np.zeros(2, dtype=np.float32), TOP) for context in tokens)
    judge = FakeJudge(shares_words)
    contexts = Contexts(tokens, words)
    (answer,) = asyncio.run(_by_leaving_out([Group(0, examples, 4)], contexts, judge))
    assert answer.raw == [1, 1, 1, 1, 0]
    said = [set(explanation.split(", ")) for _, explanation in judge.calls[0]]
    # With the text itself, two texts would share "dup".
    assert said[0] == {"sea"}
    assert {"sea", "dup"} in said


def test_a_judge_asked_in_words_is_right_every_time_or_never() -> None:
    judge = FakeJudge(answer=finds_the_odd_one)
    for score in find(World(), judge, "yes_no"):
        assert score.value == score.extra["accuracy"] == 1
        assert 0.5 < score.low < 1
        assert score.extra["missing"] == score.extra["unparsed"] == 0
    assert not judge.calls
    assert judge.schemas[0] is not None
    assert judge.schemas[0]["properties"]["number"]["enum"] == [1, 2, 3, 4, 5]


def test_a_judge_that_likes_a_place_or_guesses_is_at_chance() -> None:
    world, rng = World(latents=40), np.random.default_rng(0)
    for answer in (lambda prompt: "1", lambda prompt: f"It is text {rng.integers(1, 6)}."):
        found = find(world, FakeJudge(answer=answer), "yes_no")
        assert np.mean([score.value for score in found]) == pytest.approx(0.5, abs=0.025)
        assert np.mean([score.extra["accuracy"] for score in found]) == pytest.approx(0.2, abs=0.03)
        assert np.mean([score.low <= 0.5 <= score.high for score in found]) >= 0.9


def test_noise_by_likelihood_is_at_chance_with_its_interval() -> None:
    found = find(World(latents=60), FakeJudge(noisy(0, 0.0)))
    assert np.mean([score.value for score in found]) == pytest.approx(0.5, abs=0.025)
    assert 0.88 <= np.mean([score.low <= 0.5 <= score.high for score in found]) <= 0.99


def test_a_judge_that_finds_all_texts_alike_is_at_chance() -> None:
    for score in find(World(), FakeJudge(lambda text, explanation: 3.0)):
        assert score.value == 0.5
        assert score.extra["accuracy"] == pytest.approx(0.2)


def test_rows_give_the_verdicts_as_they_came() -> None:
    for mode, judge in (("likelihood", FakeJudge(shares_words)), ("yes_no", FakeJudge(answer=finds_the_odd_one))):
        for score in find(World(), judge, mode):
            own = np.mean([r["raw"] for r in score.verdicts if r["stratum"] in (TOP, QUANTILE)])
            odd = np.mean([r["raw"] for r in score.verdicts if r["stratum"] not in (TOP, QUANTILE)])
            # A verdict says "belongs", a share of answers "does not belong".
            assert (own > odd) == (mode == "likelihood")
            assert score.n == len(score.verdicts) == 100
            assert all(0 <= r["probability"] <= 1 for r in score.verdicts)


def test_answers_without_a_number_are_counted_and_missing() -> None:
    for answer, unparsed in ((lambda prompt: "I cannot say, 77", 20 * 5), (lambda prompt: None, 0)):
        for score in find(World(), FakeJudge(answer=answer), "yes_no"):
            assert math.isnan(score.value)
            assert score.n == 0
            assert score.extra["unparsed"] == unparsed
            assert score.extra["missing"] == 20


def test_a_silent_judge_and_too_few_texts_give_no_score() -> None:
    for score in find(World(), FakeJudge()):
        assert math.isnan(score.value)
    for world in (World(positives=3), World(negatives=0)):
        for score in find(world, FakeJudge(shares_words)):
            assert math.isnan(score.value)
            assert score.extra["groups"] == 0


def test_a_summary_is_of_what_is_shared_and_rare() -> None:
    texts = [frozenset({"sea", "the", "boat"}), frozenset({"sea", "the", "gull"}), frozenset({"sea", "the", "salt"})]
    assert summary(texts, {"sea": 3, "the": 90, "boat": 1, "gull": 1, "salt": 1}, 100) == "sea, the"
    assert summary([frozenset({"one"}), frozenset({"two"})], {}, 10) == "one, two"
    assert summary([frozenset()], {}, 10) is None


def test_a_question_keeps_what_a_text_says_apart_from_what_is_asked() -> None:
    asked = question(["a text", "Answer with 1."])
    marks = re.findall(r"Text 2 \[(\d{4})\] (begins|ends)", asked)
    assert [kind for _, kind in marks] == ["begins", "ends"]
    assert marks[0][0] == marks[1][0]
    assert asked.index("Answer with 1.") < asked.index("Which text does not belong?")


def test_comparisons_that_share_texts_count_as_fewer() -> None:
    """Coverage where every own text is in several groups, and its noise with it."""
    rng = np.random.default_rng(0)
    held, naive = [], []
    for _ in range(400):
        own, odd = rng.normal(0, 1, 20), rng.normal(0.8, 1, 20)
        win, first, second = [], [], []
        for g in range(20):
            for i in rng.choice(20, 4, replace=False):
                win.append(float(odd[g] > own[i]))
                first.append(g)
                second.append(int(i))
        found = clustered(win, first, second)
        truth = 0.5 * (1 + math.erf(0.8 / 2))
        held.append(found.low <= truth <= found.high)
        share = np.mean(win)
        naive.append(abs(share - truth) <= 1.96 * (share * (1 - share) / len(win)) ** 0.5)
    assert 0.92 <= np.mean(held) <= 0.99
    assert np.mean(naive) < 0.88


def test_one_way_comparisons_are_not_certain() -> None:
    pairs = list(itertools.product(range(5), range(4)))
    found = clustered([1.0] * 20, [a for a, _ in pairs], [b for _, b in pairs])
    assert found.value == found.high == 1
    assert found.low < 0.6
    assert found.stderr > 0.1
    assert math.isnan(clustered([], [], []).value)
