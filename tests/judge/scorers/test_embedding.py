"""An explanation that is near a latent's texts scores high, another latent's explanation low, on the same texts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import JudgingConfig, ModelConfig
from sae_ray.evidence.types import NEAR_MISS, QUANTILE, RANDOM, TOP, Contexts, Example, LatentEvidence
from sae_ray.judge.embedder import MiniLM
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.scorers.base import Instruments, ScoreJob
from sae_ray.judge.scorers.embedding import Embedding, separation

COOKING = [
    "Simmer the onions in butter until they are soft.",
    "Add a pinch of salt and stir the soup.",
    "Bake the dough for forty minutes in a hot oven.",
    "Chop the carrots and fry them with garlic.",
]
ASTRONOMY = [
    "The telescope saw a galaxy behind the nebula.",
    "Planets orbit their star on ellipses.",
    "The moon passed through the shadow of the earth.",
    "A comet's tail points away from the sun.",
]
OTHERS = [
    "The court heard the appeal in March.",
    "Sort the list before you search it.",
    "She sold her shares when the market fell.",
    "The train was late because of snow.",
]
TEXTS = COOKING + ASTRONOMY + OTHERS


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


@pytest.fixture(scope="module")
def tools() -> Instruments:
    return Instruments(embedder=MiniLM(device="cpu"))


def example(context: int, active: bool, stratum: str) -> Example:
    return Example(context, np.array([0.0, float(active)], dtype=np.float32), stratum)


def latent(number: int, positives: range) -> LatentEvidence:
    """Fires on the texts of `positives` and on no other."""
    examples = [example(i, True, TOP if i % 2 else QUANTILE) for i in positives]
    examples += [example(i, False, NEAR_MISS if i % 2 else RANDOM) for i in range(len(TEXTS)) if i not in positives]
    return LatentEvidence(number, 0.01, 0.3, 1.0, score=tuple(examples))


def explained(text: str) -> Explanation:
    return Explanation(text, "test")


JOBS = [
    ScoreJob(latent(4, range(4)), explained("cooking recipes"), explained("stars and planets")),
    ScoreJob(latent(9, range(4, 8)), explained("stars and planets"), explained("cooking recipes")),
    ScoreJob(latent(11, range(8, 12)), explained("stars and planets"), None),
]


def test_right_explanations_beat_their_null_on_the_same_texts(contexts, tools):
    scores = asyncio.run(Embedding().score(JOBS, contexts, tools, JudgingConfig(), 0))
    assert [score.latent for score in scores] == [4, 9, 11]
    for score in scores[:2]:
        assert score.scorer == "embedding"
        assert score.value > 0.9 > 0.5 > score.shuffled
        assert score.low < score.value <= score.high
        assert score.stderr > 0  # a perfect separation of few texts is not certainty
        assert (score.chance, score.n) == (0.5, 12)
        assert score.extra["above_shuffled"] == pytest.approx(score.value - score.shuffled)
    assert scores[2].value < 0.5
    assert np.isnan(scores[2].shuffled)


def test_the_score_is_the_share_of_pairs_in_the_right_order(contexts, tools):
    (score,) = asyncio.run(Embedding().score(JOBS[2:], contexts, tools, JudgingConfig(), 0))
    cosine = tools.embedder.embed_now(TEXTS) @ tools.embedder.embed_now(["stars and planets"])[0]
    pairs = [cosine[p] > cosine[n] for p in range(8, 12) for n in range(8)]
    assert score.value == pytest.approx(sum(pairs) / len(pairs))
    assert {row["context"]: row["raw"] for row in score.verdicts} == pytest.approx(dict(enumerate(cosine)), abs=1e-5)
    assert {row["probability"] for row in score.verdicts} == {None}


def test_no_more_texts_are_used_than_asked_for_and_each_is_embedded_once(contexts):
    class Counting:
        def __init__(self) -> None:
            self.seen: list[str] = []

        async def embed(self, texts):
            self.seen += texts
            return np.ones((len(texts), 2), dtype=np.float32)

    embedder = Counting()
    cfg = JudgingConfig(positives=2, negatives=3)
    scores = asyncio.run(Embedding().score(JOBS, contexts, Instruments(embedder=embedder), cfg, 0))
    assert [score.n for score in scores] == [5, 5, 5]
    assert [score.value for score in scores] == [0.5, 0.5, 0.5]  # all equal: ties
    assert len(embedder.seen) == len(set(embedder.seen))


def test_missing_numbers_leave_their_text_out_of_both_sides_of_the_comparison():
    job = JOBS[0]
    examples = job.latent.score
    own = [float(e.active) for e in examples]
    shuffled = [float("nan")] + [0.5] * 11
    score = separation("x", job, examples, own, shuffled)
    assert (score.n, score.extra["missing"]) == (11, 1)
    assert score.value == 1
    nothing = separation("x", job, examples, [float("nan")] * 12, shuffled)
    assert np.isnan([nothing.value, nothing.low, nothing.high, nothing.stderr, nothing.shuffled]).all()
    assert nothing.n == 0
