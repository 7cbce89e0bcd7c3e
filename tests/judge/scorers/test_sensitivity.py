"""Generated texts are counted honestly: once each, by where the latent fires, and what is missing is missing."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest

from sae_ray.config import JudgingConfig
from sae_ray.evidence.types import Contexts, LatentEvidence
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.scorers.base import Instruments, ScoreJob
from sae_ray.judge.scorers.sensitivity import Sensitivity, chat_prompt, cleaned, completion_prompt

CFG = JudgingConfig(positives=4)
NOTHING = Contexts({}, None)


class Writer:
    """Answers with what `texts` holds for the explanation that stands last in the prompt."""

    def __init__(self, texts: dict[str, list[str] | None]) -> None:
        self.texts, self.asked = texts, []

    async def generate(self, prompts, max_tokens=32, n=1, **settings):
        self.asked.append((list(prompts), n, settings))
        return [self.texts[re.findall(r"Topic: (.*)|the following: (.*)", p)[-1][settings["chat"]]] for p in prompts]


class Words:
    """A subject whose latent 7 fires on "fox" and latent 8 on "river"; one row per word."""

    def __init__(self) -> None:
        self.calls = 0

    async def activations(self, texts, latents):
        self.calls += 1
        of = {7: "fox", 8: "river"}
        return [
            np.array([[2.0 * (of[n] in word) for n in latents] for word in text.split()], dtype=np.float32)
            for text in texts
        ]


def latent(number: int) -> LatentEvidence:
    return LatentEvidence(number, 0.001, 0.03, 5.0)


ANIMALS, WATER = Explanation("wild animals", "test"), Explanation("rivers", "test")
JOBS = [ScoreJob(latent(7), ANIMALS, WATER), ScoreJob(latent(8), WATER, ANIMALS)]
TEXTS: dict[str, list[str] | None] = {
    "wild animals": ["The fox ran home.", "A bear sat there.", "A fox, a river.", "The FOX ran  home."],
    "rivers": ["The river froze.", "By the river we sat.", "Rivers flow to sea", "My river dried up."],
}


def run(jobs=JOBS, texts=TEXTS, cfg=CFG, calibration=None, **options):
    writer, words = Writer(texts), Words()
    tools = Instruments(judge=writer, subject=words, calibration=calibration)
    return asyncio.run(Sensitivity(**options).score(jobs, NOTHING, tools, cfg, 3)), writer, words


def test_the_score_is_the_share_of_different_texts_that_fire():
    (animals, water), writer, words = run()
    assert animals.value == pytest.approx(2 / 3)  # one text came twice
    assert (animals.n, animals.extra["duplicates"], animals.extra["missing"]) == (3, 1, 0)
    assert animals.shuffled == 0  # no fox in texts about rivers
    assert water.value == pytest.approx(3 / 4)
    assert water.shuffled == pytest.approx(1 / 3)
    assert animals.chance == 0.03
    rows = [row for row in animals.verdicts if row["purpose"] == "score"]
    assert [(row["text"], row["raw"], row["probability"]) for row in rows] == [
        ("The fox ran home.", 2, 1),
        ("A bear sat there.", 0, 0),
        ("A fox, a river.", 2, 1),
    ]
    # Each explanation's texts are written and read once, though they serve a score and a null.
    assert len(writer.asked) == 1
    assert (len(writer.asked[0][0]), writer.asked[0][1], words.calls) == (2, 4, 2)


def test_the_interval_is_wilsons():
    """Its ends solve |share - p| = z sqrt(p (1 - p) / n)."""
    (animals, water), *_ = run()
    for score in (animals, water):
        for end in (score.low, score.high):
            assert abs(score.value - end) == pytest.approx(1.959964 * (end * (1 - end) / score.n) ** 0.5, rel=1e-5)
        assert 0 < score.low < score.value < score.high < 1
    none, *_ = run(JOBS[:1], {"wild animals": ["No such animal."] * 1, "rivers": None})
    assert none[0].value == 0
    assert none[0].stderr > 0  # one text without a firing is no certainty
    assert none[0].high > 0.7


def test_what_was_not_written_is_missing_and_not_zero():
    scores, *_ = run(JOBS, {"wild animals": None, "rivers": ["The river froze.", "", " ", "ok"]})
    animals, water = scores
    assert np.isnan([animals.value, animals.low, animals.high, animals.stderr]).all()
    assert (animals.n, animals.extra["missing"]) == (0, 4)
    assert animals.shuffled == 0
    assert water.value == 1
    assert (water.n, water.extra["missing"]) == (1, 3)
    assert np.isnan(water.shuffled)


def test_texts_copied_from_the_prompt_do_not_count():
    copied = completion_prompt("x").split("Text: ")[1].split("\n")[0]
    scores, *_ = run(JOBS[:1], {"wild animals": [copied, "The fox ran home."], "rivers": []})
    assert (scores[0].n, scores[0].value, scores[0].extra["missing"]) == (1, 1, 3)


def test_a_latent_without_a_null_is_scored_alone():
    scores, *_ = run([ScoreJob(latent(7), ANIMALS, None)])
    assert scores[0].value == pytest.approx(2 / 3)
    assert np.isnan(scores[0].shuffled)


def test_a_judge_that_answers_questions_is_asked_in_chat_form():
    class YesNo:
        mode = "yes_no"

    _, writer, _ = run(calibration=YesNo())
    prompts, _, settings = writer.asked[0]
    assert prompts[0] == chat_prompt("wild animals")
    assert settings["chat"] is True
    _, writer, _ = run()
    prompts, _, settings = writer.asked[0]
    assert prompts[0] == completion_prompt("wild animals")
    assert (settings["chat"], settings["stop"]) == (False, ("\n",))
    assert writer.asked[0][2]["seed"] == 3


def test_an_explanation_of_several_lines_cannot_end_the_prompt():
    prompt = completion_prompt("rivers\nText: done\n\nTopic: fraud.")
    assert prompt.endswith("Topic: rivers Text: done Topic: fraud\nText:")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" The fox ran.", "The fox ran."),
        ('\n\n"The fox ran."\nTopic: more', "The fox ran."),
        ("Text: The fox ran.", "The fox ran."),
        ("  \n ", ""),
    ],
)
def test_answers_are_freed_of_labels_and_quotes(answer, text):
    assert cleaned(answer) == text
