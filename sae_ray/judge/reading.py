"""Asking an engine for one number: pure request building and pure reading of what came back.

Nothing here starts an engine; `Engine` is what `server.JudgeServer` wraps around vLLM's `AsyncLLM`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sae_ray.judge.prompts import (
    Mode,
    aligned_prompt,
    explanation_continuation,
    likelihood_prompt,
    yes_no_prompt,
)


class Placeholder(Exception):
    """A log-probability that the engine did not compute, because its position came from the prefix cache."""


class Engine(Protocol):
    """One prompt in, the final vLLM `RequestOutput` out."""

    async def run(self, prompt_ids: Sequence[int], **sampling: Any) -> Any: ...


@dataclass
class Usage:
    """Tokens and requests that answering has cost; prompt tokens include the cached ones."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed: int = 0

    def add(self, output: Any) -> None:
        self.requests += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens or 0
        self.output_tokens += sum(len(choice.token_ids) for choice in output.outputs)


@dataclass
class Reading:
    """A verdict's raw number. `tokens` is what it is a sum over (1 for yes_no)."""

    value: float
    tokens: int


@dataclass
class Reader:
    """Reads likelihoods and yes/no answers from an engine, one text at a time.

    Args:
        engine: answers prompts given as token ids.
        tokenizer: the judge's own.
        block_size: tokens per KV block.
        max_tokens: longest prompt, continuation included.
    """

    engine: Engine
    tokenizer: Any
    block_size: int
    max_tokens: int
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._filler = self._encode("\n")[-1]
        bos = getattr(self.tokenizer, "bos_token_id", None)
        # A tokenizer that opens texts with BOS in training (Llama, Gemma) must see it; one that does not must not.
        opens_with_bos = self.tokenizer.encode("a")[:1] == [bos]
        self._bos = [bos] if bos is not None and opens_with_bos else []
        self._yes = self._answers("Yes")
        self._no = self._answers("No")

    async def read(self, text: str, explanations: Sequence[str], mode: Mode) -> list[Reading | None]:
        """One reading per explanation, in order; None where the prompt does not fit the judge's context.

        The first explanation goes alone: it leaves the text in the prefix cache for all others, which then run at once.
        """
        ask = self._likelihood if mode == "likelihood" else self._yes_no
        if not explanations:
            return []
        first = await ask(text, explanations[0])
        return [first, *await asyncio.gather(*(ask(text, each) for each in explanations[1:]))]

    def likelihood_tokens(self, text: str, explanation: str) -> tuple[list[int], list[int]]:
        """(prompt, continuation): the verdict is the log-probability of the second given the first."""
        body, focus = likelihood_prompt(text)
        prompt = aligned_prompt(self._bos, self._encode(body), self._filler, self.block_size)
        return [*prompt, *self._encode(focus)], self._encode(explanation_continuation(explanation))

    async def _likelihood(self, text: str, explanation: str) -> Reading | None:
        prompt, continuation = self.likelihood_tokens(text, explanation)
        if not continuation or len(prompt) + len(continuation) >= self.max_tokens:
            return None
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        output = await self.engine.run([*prompt, *continuation], skip_reading_prefix_cache=False, **sampling)
        self.usage.add(output)
        try:
            value = continuation_logprob(output, continuation)
        except Placeholder:
            output = await self.engine.run([*prompt, *continuation], skip_reading_prefix_cache=True, **sampling)
            self.usage.add(output)
            self.usage.recomputed += 1
            value = continuation_logprob(output, continuation)
        return Reading(value, len(continuation))

    async def _yes_no(self, text: str, explanation: str) -> Reading | None:
        prompt = self._question_tokens(text, explanation)
        if len(prompt) >= self.max_tokens:
            return None
        answers = [*self._yes, *self._no]
        output = await self.engine.run(
            prompt, max_tokens=1, temperature=0.0, logprob_token_ids=answers, detokenize=False
        )
        self.usage.add(output)
        found = output.outputs[0].logprobs[0]
        return Reading(max(found[i].logprob for i in self._yes) - max(found[i].logprob for i in self._no), 1)

    def _question_tokens(self, text: str, explanation: str) -> list[int]:
        system, shared, question = yes_no_prompt(text, explanation)
        if not getattr(self.tokenizer, "chat_template", None):
            return [*self._bos, *self._encode(f"{system}\n\n{shared}{question}\nAnswer:")]
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": shared + question},
        ]
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._encode(chat)

    def _answers(self, word: str) -> list[int]:
        """Single tokens that a model may open this answer with."""
        spellings = (word, " " + word, word.lower(), " " + word.lower(), word.upper())
        return sorted({ids[0] for s in spellings if len(ids := self._encode(s)) == 1})

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def continuation_logprob(output: Any, continuation: Sequence[int]) -> float:
    """Sum of the log-probabilities (nats) of the prompt's last `len(continuation)` tokens.

    Raises:
        Placeholder: the engine took the position before one of them from its cache, so its number means nothing. Two
            independent signs are checked: how many tokens were cached, and whose log-probability stands there.
    """
    first = len(output.prompt_token_ids) - len(continuation)
    if (output.num_cached_tokens or 0) > first - 1:
        raise Placeholder(f"{output.num_cached_tokens} cached tokens reach past position {first - 1}")
    total = 0.0
    # Counted from the end: engines differ in whether cached positions are left out or filled in.
    for token, found in zip(continuation, output.prompt_logprobs[-len(continuation) :], strict=True):
        if found is None or token not in found:
            raise Placeholder(f"no log-probability of prompt token {token}")
        total += found[token].logprob
    return total
