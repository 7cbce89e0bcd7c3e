"""What the explainers' tests share: a corpus of sentences with marked words, and a writer that says what it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sae_ray.config import JudgingConfig
from sae_ray.evidence.types import TOP, Contexts, Example, LatentEvidence
from sae_ray.judge.explainers import Explanation, explainers

Answer = Callable[[str, int], list[str] | None]


class Words:
    """A tokenizer whose tokens are words with the space before them; id 0 is special."""

    all_special_ids = (0,)

    def __init__(self) -> None:
        self.vocabulary, self.ids = ["<bos>"], dict[str, int]()

    def encode(self, text: str) -> list[int]:
        pieces = [(" " if i else "") + word for i, word in enumerate(text.split(" "))]
        for piece in pieces:
            if piece not in self.ids:
                self.ids[piece] = len(self.vocabulary)
                self.vocabulary.append(piece)
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.vocabulary[i] for i in ids if i or not skip_special_tokens)


class Corpus:
    """Contexts made from sentences, in which `*word` is active."""

    def __init__(self, length: int = 40) -> None:
        self.tokenizer, self.length, self.tokens = Words(), length, dict[int, np.ndarray]()

    @property
    def contexts(self) -> Contexts:
        return Contexts(self.tokens, self.tokenizer)

    def add(self, sentence: str, stratum: str = TOP, act: float = 10.0, margin: float = 0.0) -> Example:
        words = sentence.split(" ")
        ids = self.tokenizer.encode(" ".join(w.removeprefix("*") for w in words))
        tokens_S = np.full(self.length, -1, dtype=np.int32)
        acts_S = np.zeros(self.length, dtype=np.float32)
        # One position of padding and a special token in front: activations must stay with their tokens.
        tokens_S[1], tokens_S[2 : 2 + len(ids)] = 0, ids
        acts_S[2 : 2 + len(ids)] = [act * w.startswith("*") for w in words]
        self.tokens[len(self.tokens)] = tokens_S
        return Example(len(self.tokens) - 1, acts_S, stratum, margin=margin)


class ScoreSideRead(Exception):
    pass


class ExplainSideOnly(LatentEvidence):
    def __getattribute__(self, name: str) -> Any:
        if name == "score":
            raise ScoreSideRead
        return super().__getattribute__(name)


def latent(*examples: Example, number: int = 0, **more: Any) -> LatentEvidence:
    return ExplainSideOnly(number, 0.01, 0.1, 10.0, explain=examples, **more)


class Continues:
    """A writer without schemas. Records what it is asked; `answer` gives what it says to (prompt, n)."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.prompts, self.asked = answer, list[str](), list[dict[str, Any]]()

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
    ) -> list[list[str] | None]:
        self.prompts += prompts
        self.asked.append({"n": n, "stop": stop, "chat": chat, "seed": seed, "temperature": temperature})
        return [self.answer(prompt, n) for prompt in prompts]


def says(*texts: str) -> Answer:
    return lambda _, n: list(texts)[:n]


def as_json(*texts: str) -> Answer:
    return says(*(json.dumps({"explanation": text}) for text in texts))


def explain(
    name: str, latents: list[LatentEvidence], corpus: Corpus, writer: Any, **cfg: Any
) -> tuple[list[list[Explanation]], int]:
    return asyncio.run(explainers([name])[0].explain(latents, corpus.contexts, writer, JudgingConfig(**cfg), seed=3))


def texts_of(found: list[Explanation]) -> list[str]:
    return [each.text for each in found]
