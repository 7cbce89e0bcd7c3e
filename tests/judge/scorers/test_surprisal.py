"""Knowing what a text is about makes it less surprising; knowing something else does not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import JudgingConfig, ModelConfig, RunConfig
from sae_ray.evidence.types import QUANTILE, RANDOM, Contexts, Example, LatentEvidence
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.scorers.base import Instruments, ScoreJob
from sae_ray.judge.scorers.surprisal import NO_EXPLANATION, Surprisal, prefix_of
from sae_ray.judge.subject_actor import SubjectModel
from sae_ray.sae.inference import TrainedSAE

TEXTS = [
    "Simmer the onions in butter until they are soft.",
    "Add a pinch of salt and stir the soup.",
    "Bake the dough for forty minutes in a hot oven.",
    "Chop the carrots and fry them with garlic.",
    "The telescope saw a galaxy behind the nebula.",
    "Planets orbit their star on ellipses.",
    "The moon passed through the shadow of the earth.",
    "A comet's tail points away from the sun.",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    tokenizer = load_tokenizer(ModelConfig())
    return Contexts({i: np.array(tokenizer.encode(t), dtype=np.int32) for i, t in enumerate(TEXTS)}, tokenizer)


def latent(number: int, positives: range) -> LatentEvidence:
    examples = [
        Example(i, np.array([float(i in positives)], dtype=np.float32), QUANTILE if i in positives else RANDOM)
        for i in range(len(TEXTS))
    ]
    return LatentEvidence(number, 0.01, 0.3, 1.0, score=tuple(examples))


COOKING, STARS = Explanation("cooking recipes", "test"), Explanation("stars and planets", "test")
JOBS = [
    ScoreJob(latent(4, range(4)), COOKING, STARS),
    ScoreJob(latent(9, range(4, 8)), STARS, COOKING),
    ScoreJob(latent(5, range(4)), COOKING, None),
]


class Table:
    """Losses that are looked up: 3 nats, less what the prefix tells about the text."""

    def __init__(self, gain: dict[tuple[str, str], float]) -> None:
        self.gain, self.asked = gain, []

    async def losses(self, prefixes, texts):
        self.asked += list(zip(prefixes, texts, strict=True))
        return [3.0 - self.gain.get((prefix, text), 0.0) for prefix, text in zip(prefixes, texts, strict=True)]


def test_verdicts_are_the_losses_difference_and_the_score_their_auroc(contexts):
    gains = {
        (prefix_of("cooking recipes"), text): gain for text, gain in zip(TEXTS, [4, 3, 2, 0, 1, 0, -1, -2], strict=True)
    }
    scores = asyncio.run(Surprisal().score(JOBS[2:], contexts, Instruments(subject=Table(gains)), JudgingConfig(), 0))
    (score,) = scores
    assert {row["context"]: row["raw"] for row in score.verdicts} == {0: 4, 1: 3, 2: 2, 3: 0, 4: 1, 5: 0, 6: -1, 7: -2}
    assert score.value == pytest.approx((4 + 4 + 4 + 2.5) / 16)  # of 16 pairs; a tie is half
    assert np.isnan(score.shuffled)
    assert (score.scorer, score.chance, score.n) == ("surprisal", 0.5, 8)


def test_each_loss_is_asked_for_once(contexts):
    table = Table({})
    asyncio.run(Surprisal().score(JOBS, contexts, Instruments(subject=table), JudgingConfig(), 0))
    assert len(table.asked) == len(set(table.asked)) == 3 * len(TEXTS)
    assert {prefix for prefix, _ in table.asked} == {NO_EXPLANATION, *map(prefix_of, (COOKING.text, STARS.text))}


def test_a_text_without_a_loss_is_missing_and_not_zero(contexts):
    gains = {(prefix_of("cooking recipes"), text): float(4 - i) for i, text in enumerate(TEXTS)}
    gains[prefix_of("cooking recipes"), TEXTS[0]] = float("nan")
    scores = asyncio.run(Surprisal().score(JOBS[2:], contexts, Instruments(subject=Table(gains)), JudgingConfig(), 0))
    assert (scores[0].n, scores[0].extra["missing"], scores[0].value) == (7, 1, 1)
    assert 0 not in {row["context"] for row in scores[0].verdicts}


def test_the_real_subject_model_is_less_surprised_by_what_it_was_told(contexts):
    cfg = RunConfig.model_validate(
        {"name": "s", "model": {"dtype": "float32"}, "hook": {"layer": 0}, "corpus": {"context_length": 32}}
    )
    unused = TrainedSAE(*(torch.zeros(1, 1),) * 2, *(torch.zeros(1),) * 2, torch.zeros(()), "relu_l1", 0)
    tools = Instruments(subject=SubjectModel(cfg.model_dump_json(), unused, "cpu"))
    scores = asyncio.run(Surprisal().score(JOBS[:2], contexts, tools, JudgingConfig(), 0))
    for score in scores:
        assert score.value >= 0.9
        assert score.shuffled <= 0.1
        assert score.extra["above_shuffled"] == pytest.approx(score.value - score.shuffled)
