from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sae_ray.judge.prompts import (
    aligned_prompt,
    focused,
    likelihood_prompt,
    nonce,
    unfocused,
    yes_no_prompt,
)
from sae_ray.judge.reading import Placeholder, Reader, continuation_logprob

BLOCK = 32


class Letters:
    """A tokenizer of one token per character."""

    bos_token_id = None
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % 500 for c in text]


class CachingEngine:
    """Scores token t at -t/100, and like vLLM leaves out what it took from its block cache."""

    def __init__(self, garbage: bool = False) -> None:
        self.garbage, self.blocks, self.outputs = garbage, set[tuple[int, ...]](), []

    async def run(self, prompt_ids: list[int], **sampling: Any) -> Any:
        ids, cached = list(prompt_ids), 0
        if not sampling.get("skip_reading_prefix_cache"):
            while cached + BLOCK <= len(ids) - 1 and tuple(ids[: cached + BLOCK]) in self.blocks:
                cached += BLOCK
        self.blocks |= {tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}
        logprobs: list[Any] = [None]
        for position in range(1, len(ids)):
            known = position - 1 >= cached
            token = ids[position] if known or self.garbage else -7
            logprobs.append({token: SimpleNamespace(logprob=-ids[position] / 100 if known else 123.0)})
        output = SimpleNamespace(
            prompt_token_ids=ids,
            num_cached_tokens=cached,
            prompt_logprobs=logprobs,
            outputs=[
                SimpleNamespace(token_ids=[0], logprobs=[{t: SimpleNamespace(logprob=-t / 100) for t in range(500)}])
            ],
        )
        self.outputs.append(output)
        return output


def reader(engine: CachingEngine, max_tokens: int = 4096) -> Reader:
    return Reader(engine, Letters(), BLOCK, max_tokens)


def truth(continuation: str) -> float:
    return sum(-(ord(c) % 500) / 100 for c in continuation)


@pytest.mark.parametrize("length", range(2 * BLOCK + 1))
def test_the_last_prompt_token_always_opens_a_block(length: int) -> None:
    prompt = aligned_prompt([1] * 5, [2] * length, 9, BLOCK)
    assert (len(prompt) - 1) % BLOCK == 0
    assert prompt[:5] == [1] * 5
    assert prompt[len(prompt) - length :] == [2] * length
    assert set(prompt[5 : len(prompt) - length]) <= {9}


@pytest.mark.parametrize("text", ["", "x", "a text " * 3, "a text " * 12, *("y" * n for n in range(20, 60, 3))])
def test_every_verdict_is_right_whatever_the_cache_holds(text: str) -> None:
    engine = CachingEngine()
    explanations = ["file paths", "a", "file paths and urls", "z" * 90, "z" * 90 + " more"]

    async def ask() -> list[list[float]]:
        judge = reader(engine)
        return [[r.value for r in await judge.read(text, explanations, "likelihood") if r] for _ in range(3)]

    for answers in asyncio.run(ask()):
        assert answers == pytest.approx([truth(" " + e) for e in explanations])


def test_short_explanations_of_one_text_recompute_nothing_but_themselves() -> None:
    engine = CachingEngine()

    async def ask() -> Reader:
        judge = reader(engine)
        for _ in range(2):
            await judge.read("some text of the corpus", ["file paths", "matrices", "dates"], "likelihood")
        return judge

    judge = asyncio.run(ask())
    assert judge.usage.recomputed == 0
    for output in engine.outputs[1:]:
        explanation = len(output.prompt_token_ids) - output.num_cached_tokens - 1
        assert explanation <= len(" file paths")


def test_words_in_focus_cost_nothing_but_themselves_once_the_text_was_read() -> None:
    engine, text, words = CachingEngine(), "some text of the corpus", ["text"]

    async def ask() -> list[Any]:
        judge = reader(engine)
        await judge.read(text, ["dates"], "likelihood")
        await judge.read(focused(text, words), ["dates", "files"], "likelihood")
        return await judge.read(focused(text, ["corpus"]), ["dates", "files"], "likelihood")

    asyncio.run(ask())
    shared = "".join(likelihood_prompt(text))
    for output in engine.outputs[1:]:
        assert output.num_cached_tokens >= len(shared) - 1
        assert len(output.prompt_token_ids) - output.num_cached_tokens < BLOCK
    assert len(engine.outputs) == 5  # nothing was asked twice for want of a log-probability


@pytest.mark.parametrize("words", [["one"], [""], ["one", "two, three"], ["with \x1f in it"]])
@pytest.mark.parametrize("text", ["", "a text", "two\x1f\x1fparts", "\x1fodd"])
def test_a_text_with_a_focus_is_taken_apart_again(text: str, words: list[str]) -> None:
    assert unfocused(focused(text, words)) == ([word.replace("\x1f", " ") or " " for word in words], text)
    assert unfocused(text) == ([], text)
    assert focused(text, []) == text


def test_a_judge_is_asked_about_the_words_in_focus() -> None:
    text = "the fox sleeps"
    plain, about = likelihood_prompt(text), likelihood_prompt(focused(text, ["fox", "sleeps"]))
    assert about == (plain[0], " fox, sleeps\nTopic:")
    question = yes_no_prompt(focused(text, ["fox"]), "animals.")
    assert question[:2] == yes_no_prompt(text, "animals")[:2]
    assert question[2] == f'Do the words "fox" in text {nonce(text)} show this: animals? Answer Yes or No.'


def test_a_placeholder_with_the_right_token_in_it_is_still_refused() -> None:
    """Uninitialised memory may hold anything, so the count of cached tokens decides by itself."""
    engine = CachingEngine(garbage=True)
    ids = list(range(100, 100 + 2 * BLOCK + 5))

    async def ask() -> Any:
        await engine.run(ids)
        return await engine.run(ids)

    output = asyncio.run(ask())
    assert output.num_cached_tokens == 2 * BLOCK
    with pytest.raises(Placeholder, match="cached"):
        continuation_logprob(output, ids[-BLOCK:])
    assert continuation_logprob(output, ids[-4:]) == pytest.approx(-sum(ids[-4:]) / 100)


def test_a_text_beyond_the_context_is_missing_not_zero() -> None:
    engine = CachingEngine()
    answers = asyncio.run(reader(engine, max_tokens=64).read("long " * 50, ["a", "b"], "likelihood"))
    assert answers == [None, None]
    assert asyncio.run(reader(engine, max_tokens=64).read("long " * 50, ["a"], "yes_no")) == [None]
    assert not engine.outputs


def test_equal_texts_share_their_delimiters_and_different_ones_do_not() -> None:
    assert likelihood_prompt("abc") == likelihood_prompt("abc")
    assert len({nonce(f"text {i}") for i in range(200)}) > 150
    assert nonce("abc") in yes_no_prompt("abc", "letters")[1]
    assert yes_no_prompt("abc", "letters")[:2] == yes_no_prompt("abc", "digits")[:2]
