from __future__ import annotations

import asyncio
import json
import math
import random
import re

import numpy as np
import pytest
from planted_latents import FakeJudge, World, calibration

from sae_ray.config import JudgingConfig
from sae_ray.judge.scorers.base import Instruments, Score
from sae_ray.judge.scorers.clarity import Clarity, _t_quantile, mean_rating


def rate(world: World, judge: FakeJudge, null: bool = True) -> list[Score]:
    tools = Instruments(judge=judge, calibration=calibration("yes_no"))
    return asyncio.run(Clarity().score(world.jobs(null), world.contexts, tools, JudgingConfig(), seed=0))


def honest(prompt: str) -> str:
    """5 where the explanation names the marked word, otherwise 1 by the strict prompt and 3 by the lenient one."""
    right = re.findall(r"Explanation: it says (\w+)", prompt)[0] in re.findall(r"<<(\w+)>>", prompt)
    return json.dumps({"rating": 5 if right else 1 if "Be strict" in prompt else 3})


def test_a_true_explanation_is_rated_above_another_latents_by_both_prompts() -> None:
    for score in rate(World(), FakeJudge(answer=honest)):
        assert score.value == score.extra["strict"] == score.extra["lenient"] == 5
        assert score.shuffled == score.extra["strict_shuffled"] == 1
        assert score.extra["lenient_shuffled"] == 3
        assert score.low < 5
        assert score.stderr > 0
        assert score.n == 8
        assert {row["stratum"] for row in score.verdicts} == {"strict", "lenient"}
        assert len(score.verdicts) == 16


def test_a_lenient_judge_rates_everything_alike() -> None:
    for score in rate(World(), FakeJudge(answer=lambda prompt: "Rating: 5")):
        assert score.value == score.shuffled == 5


def test_a_guessing_judge_is_at_chance_with_its_interval() -> None:
    rng = random.Random(0)
    found = rate(World(latents=120), FakeJudge(answer=lambda prompt: str(rng.randint(1, 5))))
    assert np.mean([score.value for score in found]) == pytest.approx(found[0].chance, abs=0.15)
    assert np.mean([score.low <= 3 <= score.high for score in found]) >= 0.92


def test_answers_without_a_rating_are_counted_and_never_zero() -> None:
    for score in rate(World(), FakeJudge(answer=lambda prompt: "Excellent, 10/10!")):
        assert math.isnan(score.value)
        assert math.isnan(score.shuffled)
        assert score.n == 0
        assert score.extra["unparsed"] == 16
        assert score.extra["missing"] == 8
    for score in rate(World(), FakeJudge()):
        assert math.isnan(score.value)
        assert score.extra["unparsed"] == 0
    only_strict = lambda prompt: "4" if "Be strict" in prompt else "hm"  # noqa: E731
    for score in rate(World(), FakeJudge(answer=only_strict)):
        assert score.value == 4
        assert math.isnan(score.extra["lenient"])


def test_each_draw_shows_other_examples_and_the_engine_is_held_to_a_rating() -> None:
    world, judge = World(latents=2), FakeJudge(answer=honest)
    rate(world, judge)
    shown = {prompt.split("How well")[0] for prompt in judge.prompts}
    assert len(shown) == 2 * 4
    # What is shown comes first, so the four questions about it share their KV cache.
    assert [p.split("How well")[0] for p in judge.prompts[:4]] == [judge.prompts[0].split("How well")[0]] * 4
    assert judge.schemas[0] is not None
    assert judge.schemas[0]["properties"]["rating"]["enum"] == [1, 2, 3, 4, 5]


def test_without_another_latent_or_texts_there_is_no_null_or_no_score() -> None:
    (score,) = rate(World(1), FakeJudge(answer=honest), null=False)
    assert score.value == 5
    assert math.isnan(score.shuffled)
    (none,) = rate(World(1, positives=0), FakeJudge(answer=honest))
    assert math.isnan(none.value)


def test_the_interval_of_a_few_ratings_is_students() -> None:
    for df, exact in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert _t_quantile(df) == pytest.approx(exact, rel=0.01)
    found = mean_rating([3, 4, 3, 4])
    assert found.stderr == pytest.approx(((1 / 3 + 1 / 12) / 4) ** 0.5)
    assert found.high == pytest.approx(3.5 + 3.182 * found.stderr, rel=0.01)
    assert mean_rating([5, 5, 5, 5]).low < 4.9
    assert mean_rating([5.0]).low == 1
    assert math.isnan(mean_rating([]).value)
