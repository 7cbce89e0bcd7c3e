"""Latents that fire on a word of their own in made-up texts, and judges of known skill."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from sae_ray.evidence.types import NEAR_MISS, QUANTILE, RANDOM, SIBLING, TOP, Contexts, Example, LatentEvidence
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.prompts import unfocused
from sae_ray.judge.scorers.base import ScoreJob

LENGTH = 16
FILLERS = 300
LETTERS = "abcdefghijklmnoprstuvwyz"


class Words:
    """One token per word; 0 is a special token."""

    all_special_ids = (0,)

    def __init__(self) -> None:
        self.words = ["<s>"]

    def add(self, word: str) -> int:
        self.words.append(word)
        return len(self.words) - 1

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text = "".join(" " + self.words[i] for i in ids if i or not skip_special_tokens)
        return text.strip() if skip_special_tokens else text


class Guarded(LatentEvidence):
    """Nobody who scores may look at what explainers saw."""

    def __getattribute__(self, name: str) -> Any:
        if name == "explain":
            raise AssertionError("a scorer looked at the explainers' examples")
        return super().__getattribute__(name)


def spelled(number: int) -> str:
    """A word of letters only, another for each number."""
    out = ""
    for _ in range(4):
        number, digit = divmod(number, len(LETTERS))
        out += LETTERS[digit]
    return out


class World:
    """`latents` latents with `positives` active texts and `negatives` inactive ones each.

    places: draws the positions at which a latent fires in one text. A text starts with a special token and, where
    `ragged`, some of them end in padding; where `distinct`, it says no filler twice.
    """

    def __init__(
        self,
        latents: int = 4,
        positives: int = 20,
        negatives: int = 20,
        seed: int = 0,
        places: Callable[[np.random.Generator], Sequence[int]] | None = None,
        ragged: bool = False,
        distinct: bool = False,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokenizer = Words()
        self.fillers = [self.tokenizer.add("fill" + spelled(i)) for i in range(FILLERS)]
        self.tokens: dict[int, np.ndarray] = {}
        self.ragged, self.distinct = ragged, distinct
        self.places = places or (lambda rng: rng.choice(np.arange(1, LENGTH - 4), size=2, replace=False))
        self.names = ["word" + spelled(i) for i in range(latents)]
        self.ids = [self.tokenizer.add(name) for name in self.names]
        self.latents = [self._latent(i, positives, negatives) for i in range(latents)]
        self.contexts = Contexts(self.tokens, self.tokenizer)

    def _text(self) -> int:
        context = len(self.tokens)
        self.tokens[context] = self.rng.choice(self.fillers, size=LENGTH, replace=not self.distinct).astype(np.int32)
        self.tokens[context][0] = 0
        if self.ragged and context % 3 == 0:
            self.tokens[context][LENGTH - 3 :] = -1
        return context

    def _latent(self, index: int, positives: int, negatives: int) -> LatentEvidence:
        examples = []
        for number in range(positives):
            context, acts = self._text(), np.zeros(LENGTH, dtype=np.float32)
            places = np.asarray(self.places(self.rng))
            self.tokens[context][places] = self.ids[index]
            acts[places] = 1 + number
            stratum = TOP if number % 5 == 4 else QUANTILE
            quantile = -1 if stratum == TOP else number % 5
            examples.append(Example(context, acts, stratum, 1.0, quantile))
        for number in range(negatives):
            stratum = (NEAR_MISS, SIBLING, RANDOM)[number % 3]
            examples.append(Example(self._text(), np.zeros(LENGTH, dtype=np.float32), stratum, 3.0))
        return Guarded(index, 0.01, 0.1, 20.0, score=tuple(examples))

    def jobs(self, null: bool = True) -> list[ScoreJob]:
        n = len(self.latents)
        told = [Explanation(f"it says {name}", "test") for name in self.names]
        return [ScoreJob(latent, told[i], told[(i + 1) % n] if null else None) for i, latent in enumerate(self.latents)]


class FakeJudge:
    """Scores by `verdict(text, explanation)` and answers by `answer(prompt)`; remembers what it was asked."""

    def __init__(
        self,
        verdict: Callable[[str, str], float | None] = lambda text, explanation: None,
        answer: Callable[[str], str | None] = lambda prompt: None,
    ) -> None:
        self.verdict, self.answer = verdict, answer
        self.calls: list[list[tuple[str, str]]] = []
        self.modes: list[str | None] = []
        self.prompts: list[str] = []
        self.schemas: list[dict[str, Any] | None] = []

    async def score(
        self, pairs: Sequence[tuple[str, str]], mode: str | None = None, use_cache: bool = True
    ) -> list[float | None]:
        self.calls.append(list(pairs))
        self.modes.append(mode)
        return [self.verdict(*pair) for pair in pairs]

    async def generate(
        self,
        prompts: list[str],
        max_tokens: int = 32,
        n: int = 1,
        temperature: float = 0.7,
        top_p: float = 0.95,
        stop: tuple[str, ...] = (),
        seed: int | None = None,
        chat: bool = False,
        schema: dict[str, Any] | None = None,
    ) -> list[list[str] | None]:
        self.prompts += prompts
        self.schemas.append(schema)
        found: list[list[str] | None] = []
        for prompt in prompts:
            answers = [self.answer(prompt) for _ in range(n)]
            found.append(None if None in answers else [str(each) for each in answers])
        return found


def in_focus(text: str) -> list[str]:
    """The runs of words that a judge is asked about."""
    return unfocused(text)[0]


def places_in_focus(text: str) -> list[bool]:
    """Per word of a text whether it is in focus; a text says each word once, but for a latent's own."""
    runs, plain = unfocused(text)
    words = plain.split()
    marks, at = [False] * len(words), 0
    for run in (each.split() for each in runs):
        at = next(i for i in range(at, len(words)) if words[i : i + len(run)] == run)
        marks[at : at + len(run)] = [True] * len(run)
        at += len(run)
    return marks


def knows(text: str, explanation: str) -> float:
    """The verdict of a judge that makes no mistakes."""
    plain = unfocused(text)[1]
    return float(any(word in re.findall(r"\w+", plain) for word in explanation.split() if word.startswith("word")))


def noisy(seed: int, gain: float) -> Callable[[str, str], float]:
    """Verdicts one standard deviation wide, `gain` higher where the explanation is true."""
    rng = np.random.default_rng(seed)
    return lambda text, explanation: gain * knows(text, explanation) + float(rng.normal())


def calibration(mode: str = "likelihood") -> SimpleNamespace:
    """A calibration that believes verdict v with probability sigmoid(8 v - 4)."""
    measured = SimpleNamespace(probability=lambda v: 1 / (1 + math.exp(-(8 * v - 4))), threshold=0.5)
    return SimpleNamespace(mode=mode, modes={mode: measured}, chosen=measured, probability=measured.probability)
