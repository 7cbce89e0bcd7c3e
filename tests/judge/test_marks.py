from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.judge.marks import BLOCKS, STYLES, Style, cut, marked, unmarked

FOX = ["the", " quick", " brown", " fox"]
# Characters that marks and escapes are made of, much likelier than chance would have them.
PIECE = st.text(
    alphabet=st.one_of(st.sampled_from("<>{}\\0123 \n\r\tnu▁▄█a\u2028\x85\x0c"), st.characters(codec="utf-8"))
)
TOKENS = st.lists(st.tuples(PIECE, st.one_of(st.just(0.0), st.floats(0.01, 20))), max_size=12)


@pytest.mark.parametrize(
    ("style", "line"),
    [
        ("delimiters", "the <<quick brown>> fox"),
        ("blocks", "the ▄ quick █ brown fox"),
        ("pairs", "the quick{5} brown{10} fox"),
    ],
)
def test_each_way_marks_the_active_tokens(style: Style, line: str) -> None:
    assert marked(FOX, [0, 2, 4, 0], style, max_activation=4) == line


def test_pairs_can_show_the_zeros() -> None:
    assert marked(FOX, [0, 2, 4, 0], "pairs", 4, zeros=True) == "the{0} quick{5} brown{10} fox{0}"


def test_levels_are_relative_to_the_latents_maximum_and_never_vanish() -> None:
    acts = [0.001, 12.5, 25, 100, 300]
    line = marked([" a"] * 5, acts, "blocks", max_activation=100)
    assert [c for c in line if c in BLOCKS] == ["▁", "▁", "▂", "█", "█"]
    assert marked([" a"] * 5, acts, "pairs", 100) == " a{1} a{2} a{3} a{10} a{10}"


@pytest.mark.parametrize("maximum", [0.0, -1.0, float("nan")])
def test_without_a_maximum_the_texts_own_counts(maximum: float) -> None:
    assert marked([" a", " b"], [1, 2], "pairs", maximum) == " a{5} b{10}"


def test_marks_in_the_text_are_told_from_ours() -> None:
    assert marked(["<<", "old", ">>", " new"], [0, 0, 0, 1], "delimiters", 1) == r"\<\<old\>\> <<new>>"
    assert marked(["<", "div", ">"], [0, 1, 0], "delimiters", 1) == r"\<<<div>>\>"
    assert marked(["█ x", " y"], [0, 1], "blocks", 1) == r"\█ x █ y"
    assert marked(["{5}", " y"], [0, 1], "pairs", 1) == r"\{5} y{10}"


def test_ordinary_text_is_left_alone() -> None:
    text = ["if a < b > c:", " {'key': 1}", " x[3]"]
    for style in STYLES:
        assert marked(text, [0, 0, 0], style, 1) == "".join(text)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=120, deadline=None)
@given(tokens=TOKENS)
def test_without_its_marks_a_line_is_the_text(style: Style, zeros: bool, tokens: list[tuple[str, float]]) -> None:
    pieces, acts = [p for p, _ in tokens], [a for _, a in tokens]
    line = marked(pieces, acts, style, max_activation=10, characters=10_000, zeros=zeros)
    assert unmarked(line, style) == "".join(pieces)
    assert len(line.splitlines()) <= 1


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=120, deadline=None)
@given(tokens=TOKENS)
def test_which_tokens_are_active_can_be_read_off_the_line(style: Style, tokens: list[tuple[str, float]]) -> None:
    """Two sets of active tokens never give the same line (delimiters join neighbours: there, runs of characters)."""
    pieces, acts = [p for p, _ in tokens if p], [a for p, a in tokens if p]
    line = marked(pieces, acts, style, max_activation=10, characters=10_000)
    without = marked(pieces, [0.0] * len(acts), style, max_activation=10, characters=10_000)
    assert unmarked(without, style) == "".join(pieces)
    if style == "delimiters":
        runs = sum(a > 0 and not (i and acts[i - 1] > 0) for i, a in enumerate(acts))
    else:
        runs = sum(a > 0 for a in acts)
    assert _marks(line, style) == runs
    assert _marks(without, style) == 0


def _marks(line: str, style: Style) -> int:
    """A plain reading of the line, character by character, that knows nothing of the regular expressions."""
    opening, n, i = {"delimiters": "<<", "blocks": "", "pairs": "{"}[style], 0, 0
    while i < len(line):
        if line[i] == "\\":
            i += 6 if line[i + 1] == "u" else 2
            continue
        if style == "blocks":
            n += line[i] in BLOCKS
        elif style == "pairs":
            n += line[i] == "{" and line[i + 1 : i + 2].isascii() and line[i + 1 : i + 2].isdigit()
        elif line.startswith(opening, i):
            n, i = n + 1, i + 1
        i += 1
    return n


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("peak", [0, 57, 199])
def test_a_long_text_is_cut_around_its_peak(style: Style, peak: int) -> None:
    pieces = [f" word{i}" for i in range(200)]
    acts = [0.1 if i == 3 else 0.0 for i in range(200)]
    acts[peak] = 5.0
    line = marked(pieces, acts, style, 5, characters=80)
    assert f"word{peak}" in line
    assert 60 < len(line) <= 80
    assert ("word3" in line) == (peak == 0)
    assert unmarked(line, style) in "".join(pieces)


def test_the_cut_leaves_half_of_the_room_before_the_peak() -> None:
    pieces = ["xxxx"] * 101
    shown, acts = cut(pieces, [float(i == 50) for i in range(101)], 84)
    assert len(shown) == 20
    assert acts.index(1.0) in (9, 10)


def test_a_line_can_be_cut_around_a_token_that_is_not_active() -> None:
    pieces = [f" word{i}" for i in range(200)]
    assert "word120 " in marked(pieces, [0.0] * 200, "delimiters", 1, 60, centre=120)


def test_a_token_longer_than_the_line_is_cut() -> None:
    assert len(marked(["x" * 5000, " y"], [1, 0], "delimiters", 1, characters=50)) <= 54


def test_no_tokens_give_an_empty_line() -> None:
    assert [marked([], [], style, 1) for style in STYLES] == ["", "", ""]
