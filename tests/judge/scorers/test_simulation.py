"""Predicted and true activations are correlated as the textbook says, and a bad answer is a failure, not a zero."""

from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import pytest

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import JudgingConfig, ModelConfig
from sae_ray.evidence.types import QUANTILE, RANDOM, Contexts, Example, LatentEvidence
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.scorers.base import Instruments, ScoreJob
from sae_ray.judge.scorers.simulation import (
    Simulation,
    correlate,
    list_prompt,
    parse_list,
    pearson_of,
    quantised,
    window_texts,
)

TEXTS = [
    "The red fox ran over the frozen river at night.",
    "A quick fox and a slow bear met in the wood.",
    "She gave the fox some bread, and it went away.",
    "The judge read the verdict to a silent court.",
    "Prices rose again in the first week of May.",
    "He closed the file and went home early.",
]
ACTIVE = range(3)


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    tokenizer = load_tokenizer(ModelConfig())
    tokens = {}
    for i, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        tokens[i] = np.array(ids + [-1] * (16 - len(ids)), dtype=np.int32)
    return Contexts(tokens, tokenizer)


def evidence(contexts: Contexts, largest: float = 4.0) -> LatentEvidence:
    """Fires with 4 on the token " fox" and with 1 on the token after it."""
    examples = []
    for i in range(len(TEXTS)):
        acts_S = np.zeros(16, dtype=np.float32)
        for at, piece in enumerate(contexts.pieces(i)):
            if piece == " fox":
                acts_S[at : at + 2] = 4, 1
        examples.append(Example(i, acts_S, QUANTILE if i in ACTIVE else RANDOM, weight=2.0))
    return LatentEvidence(7, 0.01, 0.3, largest, score=tuple(examples))


class Judge:
    """Verdicts and lists by a rule on (text, explanation)."""

    def __init__(self, verdict=None, answer=None) -> None:
        self.verdict, self.answer, self.pairs, self.prompts = verdict, answer, [], []

    async def score(self, pairs, mode=None, use_cache=True):
        self.pairs += pairs
        return [self.verdict(*pair) for pair in pairs]

    async def generate(self, prompts, **settings):
        assert (settings["chat"], settings["temperature"]) == (True, 0)
        self.prompts += prompts
        return [self.answer(prompt) for prompt in prompts]


class Halved:
    mode = "likelihood"

    def probability(self, raw: float) -> float:
        return raw / 2


def ends_in(window: str, explanation: str) -> float:
    """The verdict of a judge that sees only how a window ends, and only for the explanation "foxes"."""
    return 2.0 * (window.endswith("fox") and explanation == "foxes") + 0.1 * (len(window) % 3)


FOXES, COURTS = Explanation("foxes", "test"), Explanation("courts", "test")


def score(contexts, judge, calibration=None, shuffled=COURTS, largest=4.0, **options):
    tools = Instruments(judge=judge, calibration=calibration)
    job = ScoreJob(evidence(contexts, largest), FOXES, shuffled)
    (found,) = asyncio.run(Simulation(**options).score([job], contexts, tools, JudgingConfig(), 0))
    return found


def by_hand(contexts, explanation: str) -> tuple[list[float], list[float]]:
    """(predictions, truth) on the scale from 0 to 10, over the real tokens of all texts."""
    predicted, true = [], []
    for i, example in enumerate(evidence(contexts).score):
        ids = [t for t in contexts.tokens[i].tolist() if t >= 0]
        for at in range(len(ids)):
            window = contexts.tokenizer.decode(ids[max(0, at - 3) : at + 1]).strip()
            predicted.append(10 * ends_in(window, explanation) / 2)
            true.append({0.0: 0.0, 1.0: 2.0, 4.0: 10.0}[float(example.acts_S[at])])  # 2.5 rounds to the even 2
    return predicted, true


def test_the_score_is_the_correlation_over_all_real_tokens(contexts):
    judge = Judge(ends_in)
    found = score(contexts, judge, Halved(), window=4)
    predicted, true = by_hand(contexts, "foxes")
    assert found.value == pytest.approx(np.corrcoef(predicted, true)[0, 1])
    assert found.shuffled == pytest.approx(np.corrcoef(by_hand(contexts, "courts")[0], true)[0, 1])
    assert found.n == len(true)
    error = np.mean((np.array(predicted) - true) ** 2)
    assert found.extra["r2"] == pytest.approx(1 - error / np.var(true))
    assert found.extra["spearman"] == pytest.approx(spearman(predicted, true))
    assert found.low < found.value < found.high
    assert (found.scorer, found.chance, found.extra["missing"]) == ("simulation", 0, 0)
    assert len(judge.pairs) == len(set(judge.pairs))
    assert len(found.verdicts) == 2 * len(TEXTS)


def spearman(x: list[float], y: list[float]) -> float:
    """By comparing all pairs: a value's rank is how many are smaller, and half of its equals."""
    ranks = [[sum((b < a) + 0.5 * (b == a) for b in values) for a in values] for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_without_a_calibration_a_verdict_is_a_log_odds(contexts):
    found = score(contexts, Judge(lambda window, explanation: math.log(3)))
    assert [row["probability"] for row in found.verdicts] == pytest.approx([0.75] * 12)


def test_constant_predictions_have_no_correlation(contexts):
    found = score(contexts, Judge(lambda window, explanation: 0.3))
    assert np.isnan([found.value, found.low, found.high, found.stderr, found.shuffled, found.extra["spearman"]]).all()
    assert found.n > 0
    assert math.isfinite(found.extra["r2"])


def test_unanswered_windows_are_left_out(contexts):
    found = score(contexts, Judge(lambda w, e: None if "fox" not in w else ends_in(w, e)), Halved(), window=4)
    assert found.extra["missing"] == 3  # texts without any fox: all windows
    assert 0 < found.n < sum((contexts.tokens[i] >= 0).sum() for i in ACTIVE)
    nothing = score(contexts, Judge(lambda window, explanation: None))
    assert np.isnan([nothing.value, nothing.shuffled]).all()
    assert (nothing.n, nothing.extra["missing"], nothing.verdicts) == (0, 6, ())


def test_windows_end_at_their_token_and_hold_no_padding(contexts):
    windows = window_texts(contexts, 0, 3)
    pieces = contexts.pieces(0)
    assert len(windows) == len(pieces) < 16
    assert windows[:4] == ["The", "The red", "The red fox", "red fox ran"]


def test_no_more_texts_are_simulated_than_asked_for(contexts):
    found = score(contexts, Judge(ends_in), Halved(), texts=2)
    assert len(found.verdicts) == 2 * 4


# ------------------------------------------------------------------ all tokens at once


def answered(prompt: str, value_of) -> list[str]:
    listed = prompt.split("begins.\n")[1].split("\nText ")[0].split("\n")
    tokens = [json.loads(line.removesuffix(": unknown")) for line in listed]
    return ["\n".join(f"{json.dumps(token)}: {value_of(token)}" for token in tokens)]


class Asks(Halved):
    mode = "yes_no"


def test_a_chat_judge_fills_in_the_list(contexts):
    def answer(prompt: str) -> list[str]:
        return answered(prompt, lambda token: 10 * (token == " fox" and "responds to: foxes" in prompt))

    judge = Judge(answer=answer)
    found = score(contexts, judge, Asks())
    predicted = [10.0 * (piece == " fox") for i in range(6) for piece in contexts.pieces(i)]
    assert found.value == pytest.approx(np.corrcoef(predicted, by_hand(contexts, "foxes")[1])[0, 1])
    assert np.isnan(found.shuffled)  # all zero: constant
    assert len(judge.prompts) == 12
    assert found.extra["parse_failures"] == 0


def test_answers_that_do_not_parse_are_counted_and_missing(contexts):
    def answer(prompt: str) -> list[str] | None:
        if "responds to: courts" in prompt:
            return None  # no answer is missing, but no parse failure
        good = answered(prompt, lambda token: int(token == " fox"))
        return ["I think the fox is strongest."] if "bear" in prompt else good

    found = score(contexts, Judge(answer=answer), Asks())
    assert found.extra["parse_failures"] == 1
    assert found.extra["missing"] == 1
    assert found.n == sum(len(contexts.pieces(i)) for i in range(6) if i != 1)
    assert found.value > 0.8
    assert np.isnan(found.shuffled)


PIECES = ["A", " fox", "\n", ' "q":']


def test_lists_are_parsed_strictly():
    good = '"A": 0\n" fox": 10\n"\\n": 1\n" \\"q\\":": 2'
    assert parse_list(good, PIECES).tolist() == [0, 10, 1, 2]
    assert parse_list("```\n" + good + "\n```\n", PIECES).tolist() == [0, 10, 1, 2]
    assert parse_list(good.replace('" fox"', '"fox"'), PIECES).tolist() == [0, 10, 1, 2]
    for bad in (
        good.replace("10", "11"),
        good.replace("10", "-1"),
        good.replace("10", "1.5"),
        good.replace("10", "unknown"),
        good.replace(" fox", " dog"),
        good.split("\n", 1)[1],
        good + '\n"A": 0',
        "Here you are:\n" + good,
        "",
    ):
        assert parse_list(bad, PIECES) is None, bad


def test_every_token_of_the_list_is_one_line():
    prompt = list_prompt(PIECES, "foxes.\nIgnore that")
    listed = prompt.split("begins.\n")[1].split("\nText ")[0].split("\n")
    assert [json.loads(line.removesuffix(": unknown")) for line in listed] == PIECES
    assert "responds to: foxes. Ignore that\n" in prompt


# ------------------------------------------------------------------ numbers


def test_quantised_activations_are_whole_numbers_up_to_the_latents_largest():
    assert quantised(np.array([0, 0.2, 0.26, 2, 4, 9]), 4.0).tolist() == [0, 0, 1, 5, 10, 10]
    assert quantised(np.array([0.0, 1, 2]), float("nan")).tolist() == [0, 5, 10]
    assert quantised(np.zeros(2), 0.0).tolist() == [0, 0]


def test_the_interval_is_the_bootstraps_over_texts():
    rng = np.random.default_rng(0)
    texts = []
    for i in range(12):
        true = rng.integers(0, 10, size=15) * (i < 6)
        texts.append((true * rng.uniform(0.2, 1.2) + rng.normal(size=15) * 3 + 50, true.astype(float), i < 6))
    found = correlate(texts, np.random.default_rng(1))
    values = []
    for _ in range(1000):
        some = [texts[i] for half in (range(6), range(6, 12)) for i in rng.choice(list(half), size=6)]
        values.append(np.corrcoef(*(np.concatenate([t[k] for t in some]) for k in (0, 1)))[0, 1])
    assert found.pearson == pytest.approx(np.corrcoef(*(np.concatenate([t[k] for t in texts]) for k in (0, 1)))[0, 1])
    wider = (6 / 5) ** 0.5  # six texts of a class, drawn from themselves, vary too little
    assert found.stderr == pytest.approx(wider * np.std(values), rel=0.08)
    ends = found.pearson + wider * (np.quantile(values, [0.025, 0.975]) - found.pearson)
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=0.03)


def test_a_single_text_has_a_correlation_and_no_interval():
    found = correlate([(np.array([0.0, 1, 3]), np.array([0.0, 2, 5]), True)], np.random.default_rng(0))
    assert found.pearson > 0.9
    assert np.isnan([found.low, found.high, found.stderr]).all()
    assert np.isnan(correlate([], np.random.default_rng(0)).pearson)


def test_large_constants_are_constant():
    assert math.isnan(pearson_of(np.full(9, 0.1) * 3e8, np.arange(9.0)))
    assert pearson_of(1e6 + np.arange(9.0), np.arange(9.0)) == pytest.approx(1)
