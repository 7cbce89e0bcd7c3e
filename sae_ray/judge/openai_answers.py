"""What a server that speaks OpenAI's API answers, read and checked: pure, no request is made here."""

from __future__ import annotations

import json
import math
from typing import Any

from sae_ray.errors import printable
from sae_ray.judge.asking import BadAnswer, Reading

_SAID = 300
# JSON has whole numbers that no float holds, infinities and NaN: no log-probability can be told from them.
_LARGEST = 1e6


def continuation_reading(
    tokens: list[str], values: list[float | None], continuation: str, generated: int
) -> Reading | None:
    """Log-probability (nats) of the tokens that spell `continuation` at the end of an echoed prompt, and their number.

    Counted from the end: a text from the corpus may hold characters that are split over tokens, and then neither
    offsets nor joined tokens can be trusted up to it. None: no tokens spell it.

    Args:
        tokens, values: as echoed, and up to `generated` more that were not in the prompt.
    """
    for beyond in range(generated, -1, -1):
        spelled, total = "", 0.0
        for number, at in enumerate(range(len(tokens) - 1 - beyond, 0, -1), start=1):
            value = values[at]
            if value is None:
                break
            spelled, total = _spelled(tokens[at]) + spelled, total + value
            # Some tokenizers' tokens lose the blank that opens a word; others may have it as a token of its own.
            lost = spelled == continuation.lstrip() and _spelled(tokens[at - 1]) + spelled != continuation
            if spelled == continuation or lost:
                return total, number
            if len(spelled) >= len(continuation):
                break
    return None


def _spelled(token: str) -> str:
    """A token as it stands in the text; some servers give the vocabulary's own spelling of blanks."""
    return token.replace("Ġ", " ").replace("▁", " ")


def yes_no_reading(alternatives: list[tuple[str, float]]) -> float | None:
    """log P(Yes) - log P(No), in nats, from the answer token's likeliest alternatives.

    Where only one of the two is among them, the other is at most as likely as the least likely that is: the sign is
    right then, and the size a lower bound. None where neither is.
    """
    best: dict[str, float] = {}
    for token, value in alternatives:
        word = token.strip(" ▁Ġ\n").lower()
        if word in ("yes", "no") and math.isfinite(value):
            best[word] = max(value, best.get(word, -math.inf))
    if not best:
        return None
    least = min(value for _, value in alternatives if math.isfinite(value))
    return best.get("yes", least) - best.get("no", least)


def by_index(answer: dict[str, Any], expected: int) -> list[dict[str, Any]]:
    """The answer's choices in the order of the prompts."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != expected:
        raise BadAnswer(
            f"{len(choices) if isinstance(choices, list) else 'no'} choices where {expected} were asked for"
        )
    try:
        ordered = sorted(choices, key=lambda choice: int(choice["index"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadAnswer("choices without an index") from error
    if [choice["index"] for choice in ordered] != list(range(expected)):
        raise BadAnswer("choices whose indices are not those of the prompts")
    return ordered


def token_logprobs(choice: dict[str, Any]) -> tuple[list[str], list[float | None]]:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise BadAnswer("no log-probabilities")
    tokens, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        raise BadAnswer("log-probabilities that do not match their tokens")
    if not all(isinstance(token, str) for token in tokens):
        raise BadAnswer("tokens that are no text")
    if not all(value is None or isinstance(value, (int, float)) for value in values):
        raise BadAnswer("log-probabilities that are no numbers")
    return tokens, [value if value is not None and abs(value) <= _LARGEST else None for value in values]


def usage_of(answer: dict[str, Any]) -> dict[str, int]:
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    counts = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "cached_tokens": details.get("cached_tokens") if isinstance(details, dict) else None,
        "output_tokens": usage.get("completion_tokens"),
    }
    return {name: count for name, count in counts.items() if isinstance(count, int)}


def message_of(raw: bytes) -> str:
    """What an error's body says, in one line."""
    text = raw[: 10 * _SAID].decode(errors="replace")
    try:
        error = json.loads(raw)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return printable(" ".join(text.split())[:_SAID])
