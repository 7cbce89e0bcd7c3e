from __future__ import annotations

import asyncio
import itertools
import math

import numpy as np
import pytest
from planted_latents import FakeJudge, World, calibration, knows, noisy

from sae_ray.config import JudgingConfig
from sae_ray.errors import UserError
from sae_ray.evidence.types import QUANTILE, TOP
from sae_ray.judge.scorers import REGISTRY, scorers
from sae_ray.judge.scorers.base import Instruments, Score
from sae_ray.judge.scorers.detection import Detection, DetectionByYesNo

CFG = JudgingConfig(null_share=1)


def detect(world: World, judge: FakeJudge, cfg: JudgingConfig = CFG, null: bool = True, tools=None) -> list[Score]:
    tools = tools or Instruments(judge=judge, calibration=calibration())
    return asyncio.run(Detection().score(world.jobs(null), world.contexts, tools, cfg, seed=0))


def of(score: Score, purpose: str) -> tuple[list[float], list[float]]:
    rows = [row for row in score.verdicts if row["purpose"] == purpose and row["raw"] is not None]
    active = [row["stratum"] in (TOP, QUANTILE) for row in rows]
    return [r["raw"] for r, a in zip(rows, active, strict=True) if a], [
        r["raw"] for r, a in zip(rows, active, strict=True) if not a
    ]


def pairwise(positives: list[float], negatives: list[float]) -> float:
    return float(np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]))


def test_a_judge_that_knows_gets_one_and_its_null_one_half() -> None:
    for score in detect(World(), FakeJudge(knows)):
        assert score.value == 1
        assert score.low < 0.9
        assert score.high == 1
        assert score.stderr > 0.01
        assert score.shuffled == 0.5
        assert score.chance == 0.5
        assert score.n == 40
        assert score.extra["soft_f1"] > 0.95
        assert score.extra["balanced_accuracy"] == 1
        assert {score.extra[f"auroc_{kind}"] for kind in ("near_miss", "sibling", "random")} == {1.0}
        assert score.extra["above_shuffled"] == 0.5


def test_scores_and_nulls_are_the_pairwise_share_of_the_verdict_rows() -> None:
    for score in detect(World(), FakeJudge(noisy(1, 1.0))):
        assert score.value == pytest.approx(pairwise(*of(score, "score")))
        assert score.shuffled == pytest.approx(pairwise(*of(score, "shuffled")))
        assert score.extra["above_shuffled"] == pytest.approx(score.value - score.shuffled)
        assert 0.5 < score.low < score.value < score.high


def test_the_null_is_judged_on_the_same_texts() -> None:
    for score in detect(World(), FakeJudge(noisy(1, 1.0))):
        texts = {p: [r["context"] for r in score.verdicts if r["purpose"] == p] for p in ("score", "shuffled")}
        assert texts["score"] == texts["shuffled"]
        assert len(texts["score"]) == len(set(texts["score"])) == 40


@pytest.mark.parametrize(("share", "expected"), [(0.5, 10), (0.26, 6), (0.0, 0)])
def test_the_null_is_judged_on_a_share_of_each_class(share: float, expected: int) -> None:
    judge = FakeJudge(noisy(1, 1.0))
    for score in detect(World(), judge, JudgingConfig(null_share=share)):
        assert [len(side) for side in of(score, "score")] == [20, 20]
        assert [len(side) for side in of(score, "shuffled")] == [expected, expected]
        assert math.isnan(score.shuffled) == math.isnan(score.extra["above_shuffled"]) == (not expected)
        if expected:
            own = {row["context"]: row["raw"] for row in score.verdicts if row["purpose"] == "score"}
            both = {row["context"] for row in score.verdicts if row["purpose"] == "shuffled"}
            paired = [(own[r["context"]], r["stratum"]) for r in score.verdicts if r["context"] in both]
            value = pairwise(*([v for v, s in paired if (s in (TOP, QUANTILE)) is a] for a in (True, False)))
            assert score.extra["above_shuffled"] == pytest.approx(value - score.shuffled)
    assert len(judge.calls[0]) == 4 * (40 + 2 * expected)


def test_soft_f1_counts_a_text_as_often_as_it_stands_for() -> None:
    half = lambda text, explanation: 0.5 + 0.3 * knows(text, explanation)  # noqa: E731
    (score, *_) = detect(World(), FakeJudge(half))
    rows = [row for row in score.verdicts if row["purpose"] == "score"]
    active = np.array([row["stratum"] in (TOP, QUANTILE) for row in rows])
    weight, p = np.array([row["weight"] for row in rows]), np.array([row["probability"] for row in rows])
    assert weight[~active].mean() > 2 * weight[active].mean()
    expected = 2 * (weight * p * active).sum() / ((weight * p).sum() + (weight * active).sum())
    assert score.extra["soft_f1"] == pytest.approx(expected)


def test_a_judge_that_says_yes_to_everything_earns_what_its_null_earns() -> None:
    for score in detect(World(), FakeJudge(lambda text, explanation: 5.0)):
        assert score.value == score.shuffled == 0.5
        assert score.extra["above_shuffled"] == 0


def test_a_judge_that_likes_active_texts_whatever_is_said_of_them_earns_nothing_above_its_null() -> None:
    world = World(latents=24)
    lenient = lambda text, explanation: float("word" in text) + 0.1 * len(text)  # noqa: E731
    found = detect(world, FakeJudge(lenient))
    assert np.mean([score.value for score in found]) > 0.9
    assert all(score.extra["above_shuffled"] == 0 for score in found)


def test_the_interval_of_a_guessing_judge_holds_one_half_19_times_in_20() -> None:
    found = detect(World(latents=150), FakeJudge(noisy(3, 0.0)))
    assert 0.9 <= np.mean([score.low <= 0.5 <= score.high for score in found]) <= 0.99
    difference = [abs(s.extra["above_shuffled"]) <= 1.96 * s.extra["above_shuffled_stderr"] for s in found]
    assert 0.9 <= np.mean(difference) <= 0.99


def test_the_paired_error_shrinks_where_both_explanations_share_the_noise_of_a_text() -> None:
    rng = np.random.default_rng(4)
    mood: dict[str, float] = {}

    def moody(text: str, explanation: str) -> float:
        own = mood.setdefault(text, float(rng.normal()))
        return own + 0.3 * float(rng.normal())

    found = detect(World(latents=150), FakeJudge(moody))
    apart = [(score.stderr**2 + score.extra["shuffled_stderr"] ** 2) ** 0.5 for score in found]
    paired = [score.extra["above_shuffled_stderr"] for score in found]
    assert np.mean(paired) < 0.6 * np.mean(apart)
    assert np.mean(paired) == pytest.approx(np.std([score.extra["above_shuffled"] for score in found]), rel=0.15)


def test_a_silent_judge_gives_no_score_rather_than_zero() -> None:
    for score in detect(World(), FakeJudge()):
        assert all(math.isnan(x) for x in (score.value, score.low, score.high, score.stderr, score.shuffled))
        assert math.isnan(score.extra["soft_f1"])
        assert score.n == 0
        assert score.extra["missing"] == 40
        assert {row["raw"] for row in score.verdicts} == {None}


def test_missing_and_infinite_verdicts_are_left_out() -> None:
    world = World()
    gaps = {world.contexts.text(c): (None, float("nan"), float("inf"))[c % 3] for c in world.tokens if c % 4 == 0}
    judge = FakeJudge(lambda text, explanation: gaps[text] if text in gaps else knows(text, explanation))
    for score in detect(world, judge):
        missing = sum(row["context"] % 4 == 0 for row in score.verdicts if row["purpose"] == "score")
        assert score.extra["missing"] == missing > 0
        assert score.n == 40 - missing
        assert score.value == 1


def test_without_another_latent_there_is_no_null() -> None:
    (score,) = detect(World(latents=1), FakeJudge(knows), null=False)
    assert score.value == 1
    assert math.isnan(score.shuffled)
    assert math.isnan(score.extra["above_shuffled"])
    assert {row["purpose"] for row in score.verdicts} == {"score"}


def test_without_negatives_the_score_is_missing() -> None:
    for score in detect(World(negatives=0), FakeJudge(knows)):
        assert math.isnan(score.value)
    for score in detect(World(), FakeJudge(knows), tools=Instruments(judge=FakeJudge(knows))):
        assert score.value == 1
        assert "soft_f1" not in score.extra
        assert {row["probability"] for row in score.verdicts} == {None}


def test_everything_is_asked_in_one_call_and_the_verdicts_of_a_text_stand_together() -> None:
    judge = FakeJudge(knows)
    detect(World(), judge)
    assert len(judge.calls) == 1
    texts = [text for text, _ in judge.calls[0]]
    blocks = 1 + sum(a != b for a, b in itertools.pairwise(texts))
    assert blocks == len(set(texts))
    assert len(judge.calls[0]) == len(set(judge.calls[0]))


def test_the_calibrated_mode_is_asked_unless_a_mode_is_named() -> None:
    world, judge = World(), FakeJudge(knows)
    detect(world, judge)
    tools = Instruments(judge=judge, calibration=calibration("likelihood"))
    (score, *_) = asyncio.run(DetectionByYesNo().score(world.jobs(), world.contexts, tools, CFG, 0))
    assert judge.modes == [None, "yes_no"]
    assert score.scorer == "detection_yes_no"
    # The likelihood mode's map says nothing about yes/no verdicts.
    assert {row["probability"] for row in score.verdicts} == {None}


def test_easy_latents_are_judged_on_fewer_texts_and_hard_ones_on_all() -> None:
    cfg = JudgingConfig(stop_at_stderr=0.06)
    world, rng = World(latents=6), np.random.default_rng(0)
    easy = set(world.names[:3])

    def verdict(text: str, explanation: str) -> float:
        known = explanation.split()[-1] in easy
        return (10.0 if known else 0.5) * knows(text, explanation) + float(rng.normal())

    judge = FakeJudge(verdict)
    found = detect(world, judge, cfg)
    for score in found[:3]:
        assert score.n < 40
        assert score.stderr <= 0.06
        assert score.extra["looks"] < score.extra["looks_planned"]
    for score in found[3:]:
        assert score.n == 40
        assert score.extra["looks"] == score.extra["looks_planned"]
    asked = [pair for call in judge.calls for pair in call]
    assert len(asked) == len(set(asked)) == sum(len(score.verdicts) for score in found)


def test_an_interval_after_several_looks_is_wider_than_after_one() -> None:
    world = World()
    once = detect(world, FakeJudge(noisy(5, 1.0)))
    looks = detect(world, FakeJudge(noisy(5, 1.0)), JudgingConfig(stop_at_stderr=0.001))
    for a, b in zip(once, looks, strict=True):
        assert b.n == a.n
        assert b.extra["looks"] == 3
        assert (b.high - b.low) > (a.high - a.low) * 0.9
    assert np.mean([b.high - b.low for b in looks]) > np.mean([a.high - a.low for a in once])


def test_scorers_are_found_by_name_and_others_refused() -> None:
    assert {"detection", "fuzzing", "intruder", "discrimination", "clarity"} <= set(REGISTRY)
    assert {"simulation", "surprisal", "embedding", "sensitivity"} <= set(REGISTRY)
    assert [each.name for each in scorers(["fuzzing", "detection"])] == ["fuzzing", "detection"]
    with pytest.raises(UserError, match=r"judging\.scorers: .*'detektion'.*detection, "):
        scorers(["detektion"])
    with pytest.raises(UserError, match="twice"):
        scorers(["fuzzing", "fuzzing"])
    with pytest.raises(UserError, match=r"detection asks a judge"):
        asyncio.run(Detection().score([], World(1).contexts, Instruments(), CFG, 0))
