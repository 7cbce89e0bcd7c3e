from __future__ import annotations

import asyncio
import math
import re

import numpy as np
import pytest
from planted_latents import FakeJudge, World, calibration, knows, noisy

from sae_ray.config import JudgingConfig
from sae_ray.evidence.types import QUANTILE, TOP
from sae_ray.judge.scorers.base import Instruments, Score
from sae_ray.judge.scorers.discrimination import Discrimination, DiscriminationDescribed
from sae_ray.judge.scorers.verdicts import parse_option, wilson

CFG = JudgingConfig()


def choose(
    world: World, judge: FakeJudge, mode: str | None = "likelihood", scorer: Discrimination | None = None
) -> list[Score]:
    tools = Instruments(judge=judge, calibration=calibration(mode) if mode else None)
    return asyncio.run((scorer or Discrimination()).score(world.jobs(), world.contexts, tools, CFG, seed=0))


def read(prompt: str) -> tuple[list[str], str]:
    """(the two texts, the description) of a question."""
    texts = re.findall(r"Text [AB] \[\d{4}\] begins\.\n(.*?)\nText [AB]", prompt, re.DOTALL)
    return texts, re.findall(r"One of them shows this: (.*)\. Which one\?", prompt)[0]


def picks_right(prompt: str) -> str:
    texts, description = read(prompt)
    fits = [knows(text, description) for text in texts]
    return '{"answer": "B"}' if fits[1] > fits[0] else '{"answer": "A"}'


@pytest.mark.parametrize("mode", ["likelihood", "yes_no", None])
def test_a_judge_that_knows_is_right_on_every_pair(mode: str | None) -> None:
    for score in choose(World(), FakeJudge(knows, picks_right), mode):
        assert score.value == score.high == 1
        assert 0.7 < score.low < 0.9
        assert score.stderr > 0.01
        assert score.shuffled == 0.5
        assert score.extra["pairs"] == 20
        assert score.extra["missing"] == 0
        assert score.n == 40


def test_each_pair_is_one_positive_and_one_negative_and_no_text_is_used_twice() -> None:
    for score in choose(World(), FakeJudge(knows)):
        rows = [row for row in score.verdicts if row["purpose"] == "score"]
        assert [row["stratum"] in (TOP, QUANTILE) for row in rows] == [True, False] * 20
        assert len({row["context"] for row in rows}) == 40


def test_a_liking_for_a_place_is_averaged_out_and_reported() -> None:
    for score in choose(World(), FakeJudge(answer=lambda prompt: "A"), "yes_no"):
        assert score.value == score.shuffled == 0.5
        assert score.extra["position_bias"] == 0.5
        assert score.extra["margin"] == 0
    for score in choose(World(), FakeJudge(answer=picks_right), "yes_no"):
        assert score.extra["position_bias"] == 0
        assert score.extra["margin"] == 1


def test_by_likelihood_the_score_is_the_share_of_pairs_whose_real_text_has_the_higher_verdict() -> None:
    for score in choose(World(), FakeJudge(noisy(0, 1.0))):
        rows = [row for row in score.verdicts if row["purpose"] == "score"]
        won = [a["raw"] > b["raw"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
        assert score.value == pytest.approx(np.mean(won))
        margins = [a["probability"] - b["probability"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
        assert score.extra["margin"] == pytest.approx(np.mean(margins))
        assert math.isnan(score.extra["position_bias"])


def test_guessing_is_one_half_with_its_interval() -> None:
    found = choose(World(latents=100), FakeJudge(noisy(1, 0.0)))
    assert np.mean([score.value for score in found]) == pytest.approx(0.5, abs=0.03)
    assert 0.9 <= np.mean([score.low <= 0.5 <= score.high for score in found]) <= 0.99


def test_a_lenient_judge_earns_what_its_null_earns() -> None:
    lenient = lambda text, explanation: 5.0 * ("word" in text)  # noqa: E731
    for score in choose(World(), FakeJudge(lenient)):
        assert score.value == score.shuffled == 1


def test_missing_answers_leave_their_pair_out() -> None:
    for mode in ("likelihood", "yes_no"):
        for score in choose(World(), FakeJudge(), mode):
            assert math.isnan(score.value)
            assert math.isnan(score.shuffled)
            assert score.extra["missing"] == 20
            assert score.n == 0
    one_order = lambda prompt: picks_right(prompt) if "word" in read(prompt)[0][0] else "neither"  # noqa: E731
    for score in choose(World(), FakeJudge(answer=one_order), "yes_no"):
        assert math.isnan(score.value)
        assert score.extra["unparsed"] == 2 * 20 * 3


def describes(prompt: str) -> str:
    """Step 1 and step 2 by one judge that knows."""
    if "Which one?" in prompt:
        return picks_right(prompt)
    return '  "it says ' + re.findall(r"<<(\w+)>>", prompt)[0] + '"\n'


def test_the_second_step_sees_the_description_and_nothing_else_of_the_first() -> None:
    world, judge = World(), FakeJudge(answer=describes)
    found = choose(world, judge, "yes_no", DiscriminationDescribed())
    first = [prompt for prompt in judge.prompts if "Which one?" not in prompt]
    second = [prompt for prompt in judge.prompts if "Which one?" in prompt]
    assert len(first) == 4
    shown = {line.split("] ")[1].replace("<<", "").replace(">>", "") for p in first for line in p.split("\n- [")[1:]}
    for prompt in second:
        texts, description = read(prompt)
        assert re.fullmatch(r"it says word\w+", description)
        assert not any(text[:40] in other for text in texts for other in shown)
        assert "<<" not in prompt
    for score in found:
        assert score.scorer == "discrimination_described"
        assert score.value == 1
        assert score.shuffled == 0.5
        assert score.extra["pairs"] == 15


def test_a_judge_that_describes_nothing_has_no_score() -> None:
    for answer in (None, "  "):
        says = lambda prompt, answer=answer: picks_right(prompt) if "Which one?" in prompt else answer  # noqa: E731
        for score in choose(World(), FakeJudge(answer=says), "yes_no", DiscriminationDescribed()):
            assert math.isnan(score.value)
            assert score.verdicts == ()


def test_answers_are_read_as_json_or_as_their_first_option() -> None:
    options = ("A", "B")
    assert parse_option('{"answer": "B"}', "answer", options) == "B"
    assert parse_option('{"answer": 3}', "answer", ("1", "3")) == "3"
    assert parse_option("Text B, not A.", "answer", options) == "B"
    assert parse_option('{"number": 7, "of": 2}', "number", ("1", "2")) is None
    assert parse_option("about 4.5", "rating", ("4", "5")) is None
    assert parse_option("ABBA", "answer", options) is None
    assert parse_option("42", "number", ("4", "2")) is None
    assert parse_option("", "answer", options) is None
    assert parse_option("[1, 2]", "number", ("1", "2")) == "1"


def test_wilson_covers_shares_and_graded_wins() -> None:
    rng = np.random.default_rng(0)
    for p, graded in ((0.5, False), (0.85, False), (0.7, True)):
        held = []
        for _ in range(1500):
            won = rng.random(20) < p
            found = wilson(float((0.5 * won + 0.5 * (rng.random(20) < p) if graded else won).mean()), 20)
            held.append(found.low <= p <= found.high)
        assert np.mean(held) >= 0.92
    assert math.isnan(wilson(float("nan"), 0).value)
