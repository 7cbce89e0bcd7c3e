"""Candidate explanations of a latent: asked of the language model, and read off the token statistics. Pure.

The model's candidates come from a short few-shot completion that a 135M model can continue. The lexical candidate is
deterministic, costs nothing and is hard to beat for latents that fire on a few words: a floor that a language model's
candidate has to clear.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

MAX_WORDS = 12
# Shown per latent: more examples cost prefill and do not fit beside the few-shot part in about 350 tokens.
_SHOWN = 5
_SHOWN_CHARACTERS = 130
_FEW_SHOT = """\
Name what the marked words in the texts have in common, in a few words.

Texts:
- The <<train>> leaves at noon from platform two
- She parked the <<car>> behind the <<bus>>
Marked words: train, car, bus
Topic: vehicles and transport

Texts:
- returns the <<sum>> of both columns
- we <<multiply>> each row and <<add>> the offset
Marked words: sum, multiply, add
Topic: arithmetic operations

"""
STOP = ("\n",)
_JUNK = re.compile(r"^(the )?(topic|answer|explanation)( of (these|this|the) texts?)?( is|:)?\s*", re.IGNORECASE)
_REFUSAL = re.compile(r"\b(i am|i'm|i cannot|sorry|as an ai|marked words?|texts?:)\b", re.IGNORECASE)
_ENDS_OPEN = frozenset(
    {"a", "an", "and", "as", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"}
)


def explanation_prompt(contexts: Sequence[Sequence[str]], active: Sequence[Sequence[bool]]) -> str:
    """A completion prompt from activating contexts.

    Args:
        contexts: per context its tokens as strings (leading spaces kept).
        active: per context, whether the latent fires on each token.
    """
    lines, words = [], Counter[str]()
    for tokens, marks in list(zip(contexts, active, strict=True))[:_SHOWN]:
        lines.append("- " + _marked(tokens, marks))
    for tokens, marks in zip(contexts, active, strict=True):
        words.update(w for token, mark in zip(tokens, marks, strict=True) if mark and (w := token.strip()))
    listed = ", ".join(word for word, _ in words.most_common(8))
    return f"{_FEW_SHOT}Texts:\n" + "\n".join(lines) + f"\nMarked words: {listed}\nTopic:"


def parse_explanation(completion: str) -> str | None:
    """The phrase in a completion, at most `MAX_WORDS` words; None when there is none (a failure, to be counted)."""
    text = completion.strip().split("\n")[0].strip()
    text = _JUNK.sub("", text).strip(" \t\"'`*-.:;,<>[]()")
    text = re.split(r"(?<=\w)[.;!?](?:\s|$)", text)[0]
    text = re.sub(r"<<|>>", "", text)
    text = " ".join(text.split())
    if not re.search(r"[A-Za-z]{3,}", text) or _REFUSAL.search(text):
        return None
    words = text.split()[:MAX_WORDS]
    while words and words[-1].lower().strip(",") in _ENDS_OPEN:
        words.pop()
    # Small models loop; a loop's first turn says all that it says.
    kept: list[str] = []
    for word in words:
        if [w.lower().strip(",") for w in kept].count(word.lower().strip(",")) < 2:
            kept.append(word)
    phrase = " ".join(kept).strip(" ,;:-")
    return phrase if re.search(r"[A-Za-z]{3,}", phrase) else None


def lexical_explanation(
    positive_contexts_tokens: Sequence[Sequence[str]],
    active_token_strings: Sequence[str],
    background_counts: Mapping[str, int],
    words: int = 3,
) -> str | None:
    """'file, path, open': what the active tokens, and failing them their contexts, have more of than usual.

    Args:
        positive_contexts_tokens: tokens as strings of contexts in which the latent is active.
        active_token_strings: the tokens it fires on, one entry per firing.
        background_counts: how often each normalised token (see `normalised`) occurs in the corpus sample.
    Returns:
        None when neither holds a word or a symbol.
    """
    total = sum(background_counts.values()) or 1
    active = Counter(w for token in active_token_strings if (w := normalised(token)))
    near = Counter(
        w for tokens in positive_contexts_tokens for w in {normalised(t) for t in tokens} if len(w) > 2 and w.isalpha()
    )

    def surprise(counts: Counter[str]) -> list[str]:
        """Ordered by count times log-ratio to the background (the dominant part of a G-test); ties by spelling."""
        seen = sum(counts.values())
        weight = {
            word: count * math.log((count / seen) / ((background_counts.get(word, 0) + 0.5) / total))
            for word, count in counts.items()
        }
        return sorted((w for w in weight if weight[w] > 0), key=lambda w: (-weight[w], w))

    # A word that it fired on once, among many firings, is not what it fires on.
    common = Counter({w: c for w, c in active.items() if c >= max(1, 0.1 * sum(active.values()))})
    chosen = surprise(common)[:words]
    if len(chosen) < words:
        repeated = Counter({w: c for w, c in near.items() if c >= 2})
        chosen += [w for w in surprise(repeated) if w not in chosen][: words - len(chosen)]
    if not chosen:
        return None
    # A bare list, as the planted concepts are labelled: a phrase around it would cost likelihood and say nothing.
    return ", ".join(chosen)


def background(contexts_tokens: Sequence[Sequence[str]]) -> Counter[str]:
    """Counts of normalised tokens over a sample of the corpus, for `lexical_explanation`."""
    return Counter(w for tokens in contexts_tokens for token in tokens if (w := normalised(token)))


def normalised(token: str) -> str:
    return token.replace("Ġ", " ").replace("▁", " ").strip().lower()


def _marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """One line of text around the first firing, runs of active tokens between << and >>."""
    first = next((i for i, mark in enumerate(marks) if mark), 0)
    # Half of the budget before the first firing: what leads up to it is what the model saw.
    start, budget = first, _SHOWN_CHARACTERS // 2
    while start > 0 and (budget := budget - len(tokens[start - 1])) > 0:
        start -= 1
    pieces: list[str] = []
    length, inside = 0, False
    for token, mark in zip(tokens[start:], marks[start:], strict=True):
        if length > _SHOWN_CHARACTERS:
            break
        if mark and not inside:
            space = token[: len(token) - len(token.lstrip())]
            pieces.append(f"{space}<<{token.lstrip()}")
        else:
            pieces.append(f">>{token}" if inside and not mark else token)
        inside, length = mark, length + len(token)
    return " ".join("".join(pieces + [">>"] * inside).split())
