"""What the judge reads. Text first, so that its KV cache is shared by every explanation judged on it.

A text may come with some of its words in focus (`focused`): then the judge is asked about those. They are named after
the text, so that its cache serves them too, whichever they are.

A prompt is `filler + body + focus`, in tokens. The filler shifts the body so that its last token opens a KV block (see
`aligned_prompt`). Where the judge is asked something, corpus text stands between delimiters that carry a nonce, which
it can hardly contain because the nonce is derived from the text itself. Derived, not drawn: the same text must give the
same tokens, or its cache could not be shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

Mode = Literal["likelihood", "yes_no"]
MODES: tuple[Mode, ...] = ("likelihood", "yes_no")

# Part of every cache key: raise it whenever a prompt below changes, and old verdicts are never mixed with new ones.
PROMPT_VERSION = "8"

# Opens the words in focus and ends each; after the last comes the text. A control character that no prompt needs.
_FOCUS = "\x1f"
_SYSTEM = "You answer whether a text shows what is described. Answer with one word: Yes or No."


class Tokenizer(Protocol):
    """The two calls that prompts need of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    @property
    def bos_token_id(self) -> int | None: ...


def nonce(text: str) -> str:
    """Four digits that stand in the delimiters around `text`; a pure function of it."""
    return f"{int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % 10_000:04d}"


def focused(text: str, words: Sequence[str]) -> str:
    """The text to give a judge that is asked about these of its words rather than about all of it."""
    if not words:
        return text
    return _FOCUS + "".join((word.replace(_FOCUS, " ") or " ") + _FOCUS for word in words) + _FOCUS + text


def unfocused(text: str) -> tuple[list[str], str]:
    """(the words in focus, the text itself); no words where there is no focus."""
    if not text.startswith(_FOCUS) or (end := text.find(2 * _FOCUS)) < 0:
        return [], text
    return text[1:end].split(_FOCUS), text[end + 2 :]


def likelihood_prompt(text: str) -> tuple[str, str]:
    """(body, focus) after which an explanation is read. The empty text gives the prior of an explanation.

    Without a nonce: nothing here asks the judge to do anything that a text could countermand, and delimiters with one
    cost a 135M judge 0.04 AUROC on planted items. What follows the text was chosen by measurement: see
    `benchmarks/judge_validity.md`; "The topic of this text is" was all but blind to lexical concepts.
    """
    words, text = unfocused(text)
    return f'Text: "{text}"\nImportant words in this text:', f" {', '.join(words)}\nTopic:" if words else ""


def explanation_continuation(explanation: str) -> str:
    return " " + explanation.strip().rstrip(".")


def yes_no_prompt(text: str, explanation: str) -> tuple[str, str, str]:
    """(system, shared user part, question): only the question differs between explanations, or words, of one text."""
    words, text = unfocused(text)
    mark = nonce(text)
    shared = f"Text {mark} begins.\n{text}\nText {mark} ends.\n"
    asked = "Do the words " + ", ".join(f'"{word}"' for word in words) + " in" if words else "Does"
    question = f"{asked} text {mark} show this: {explanation.strip().rstrip('.')}? Answer Yes or No."
    return _SYSTEM, shared, question


def aligned_prompt(head: Sequence[int], body: Sequence[int], filler: int, block_size: int) -> list[int]:
    """Tokens of a prompt whose last token is the first of a KV block.

    Then all but one token of the prompt lie in full, shareable blocks, and the position that predicts the continuation
    does not: vLLM gives no log-probability for a position that it took from its cache (RESEARCH.md section 2). What
    follows (focus and continuation) in fewer than `block_size` tokens ends in the same block, so it never gets cached
    either, however often it is asked for.
    """
    pad = (1 - len(head) - len(body)) % block_size
    return [*head, *([filler] * pad), *body]
