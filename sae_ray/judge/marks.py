"""Texts with a latent's active tokens marked, one line each, in three ways. Pure.

    delimiters   the <<quick brown>> fox       runs of active tokens
    blocks       the ▄ quick █ brown fox       a block before each active token, as high as its activation
    pairs        the quick{5} brown{10} fox    a value of 1 to 10 after each active token, 0 of the others on request

A text may hold such marks itself. Those, backslashes and control characters (line breaks among them) are escaped with
a backslash, so that a mark is always a mark, a line always a text, and `unmarked` gives the text back exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal

import numpy as np

Style = Literal["delimiters", "blocks", "pairs"]
STYLES: tuple[Style, ...] = ("delimiters", "blocks", "pairs")
BLOCKS = "▁▂▃▄▅▆▇█"
CHARACTERS = 130

_NAMED = {"\n": "n", "\r": "r", "\t": "t"}
_ALWAYS = "[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029]"
# What else must be escaped in a stretch of text between two places where a mark may stand.
_ESCAPED = {
    "delimiters": re.compile(f"{_ALWAYS}|" + "|".join(f"(?<={c}){c}|{c}(?={c})|\\A{c}|{c}\\Z" for c in "<>")),
    "blocks": re.compile(f"{_ALWAYS}|[{BLOCKS}]"),
    "pairs": re.compile(_ALWAYS + r"|\{(?=[0-9]|\Z)"),
}
_SEQUENCE = r"\\u[0-9a-f]{4}|\\."
_MARK = {
    "delimiters": re.compile(f"({_SEQUENCE})|<<|>>"),
    # Before a token that starts with a space, the mark brought a space of its own.
    "blocks": re.compile(f"({_SEQUENCE})| ?[{BLOCKS}](?= )|[{BLOCKS}]"),
    "pairs": re.compile(f"({_SEQUENCE})|" + r"\{[0-9]+\}"),
}


def marked(
    pieces: Sequence[str],
    acts: Sequence[float] | np.ndarray,
    style: Style,
    max_activation: float,
    characters: int = CHARACTERS,
    zeros: bool = False,
    centre: int | None = None,
) -> str:
    """One line: the part of a text around `centre`, its active tokens marked.

    Args:
        pieces: [S] the tokens as text.
        acts: [S] activations; a token is active where this is above 0.
        style: see the module.
        max_activation: what counts as full height; where it is not positive, the largest of `acts`.
        characters: what the line may hold, marks included; escapes come on top.
        zeros: whether "pairs" shows the values of inactive tokens too.
        centre: position that the line is cut around; the strongest activation if not given.
    """
    pieces, acts = cut(pieces, acts, characters, style, zeros, centre)
    height = max_activation if max_activation > 0 else max(acts, default=0.0)
    if style == "delimiters":
        return _delimited(pieces, [act > 0 for act in acts])
    if style == "blocks":
        return "".join(_with_block(p, _level(act, height, 8)) for p, act in zip(pieces, acts, strict=True))
    values = [_level(act, height, 10) for act in acts]
    return "".join(
        _escape(p, style) + (f"{{{value}}}" if value or zeros else "") for p, value in zip(pieces, values, strict=True)
    )


def cut(
    pieces: Sequence[str],
    acts: Sequence[float] | np.ndarray,
    characters: int,
    style: Style = "delimiters",
    zeros: bool = False,
    centre: int | None = None,
) -> tuple[list[str], list[float]]:
    """The tokens and activations that `marked` shows: as many around the centre as fit, the centre always.

    Half of the room goes to what leads up to the centre, for that is what the model saw; room that one side does not
    need goes to the other.
    """
    kept = [(str(p)[:characters], float(act), i) for i, (p, act) in enumerate(zip(pieces, acts, strict=True)) if p]
    if not kept:
        return [], []
    if centre is None:
        middle = max(range(len(kept)), key=lambda k: kept[k][1])
    else:
        middle = min(range(len(kept)), key=lambda k: abs(kept[k][2] - centre))
    costs = [len(p) + _mark_length(act > 0, style, zeros) for p, act, _ in kept]
    room = characters - costs[middle]
    before = _fitting(costs[:middle][::-1], room // 2)
    after = _fitting(costs[middle + 1 :], room - sum(costs[middle - before : middle]))
    before = _fitting(costs[:middle][::-1], room - sum(costs[middle + 1 : middle + 1 + after]))
    shown = kept[middle - before : middle + 1 + after]
    return [p for p, _, _ in shown], [act for _, act, _ in shown]


def escaped(text: str, style: Style) -> str:
    """Text as it stands unmarked in a line of this style."""
    return _escape(text, style)


def unmarked(line: str, style: Style) -> str:
    """The text of a marked line: the marks taken out, the escapes undone."""
    return _MARK[style].sub(lambda match: _unescape(match[1]) if match[1] else "", line)


def _delimited(pieces: Sequence[str], active: Sequence[bool]) -> str:
    parts = []
    for inside, run in groupby(zip(pieces, active, strict=True), key=lambda pair: pair[1]):
        text = "".join(p for p, _ in run)
        if not inside:
            parts.append(_escape(text, "delimiters"))
            continue
        # Spaces before the first word stay outside, unless there is nothing else.
        word = text.lstrip(" ") or text
        parts.append(text[: len(text) - len(word)] + f"<<{_escape(word, 'delimiters')}>>")
    return "".join(parts)


def _with_block(piece: str, level: int) -> str:
    text = _escape(piece, "blocks")
    if not level:
        return text
    return (" " if piece.startswith(" ") else "") + BLOCKS[level - 1] + text


def _level(act: float, height: float, levels: int) -> int:
    """0 where inactive, else 1..levels."""
    if not act > 0:
        return 0
    return int(np.clip(np.ceil(levels * act / height - 1e-6), 1, levels))


def _mark_length(active: bool, style: Style, zeros: bool) -> int:
    if style == "pairs":
        return 4 if active else 3 * zeros
    return {"delimiters": 4, "blocks": 2}[style] if active else 0


def _fitting(costs: Iterable[int], room: int) -> int:
    """How many of the first costs fit into the room."""
    n = 0
    for cost in costs:
        room -= cost
        if room < 0:
            break
        n += 1
    return n


def _escape(text: str, style: Style) -> str:
    def sequence(match: re.Match[str]) -> str:
        character = match[0]
        if character in _NAMED:
            return "\\" + _NAMED[character]
        if character == "\\" or character.isprintable():
            return "\\" + character
        return f"\\u{ord(character):04x}"

    return _ESCAPED[style].sub(sequence, text)


def _unescape(sequence: str) -> str:
    if len(sequence) == 6:
        return chr(int(sequence[2:], 16))
    return {name: character for character, name in _NAMED.items()}.get(sequence[1], sequence[1])
