from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from sae_ray.judge.levels import Levelled

LEVEL = {"common words": 5.0, "rare": -3.0}


class Judge:
    """Each explanation has a level of its own; a text shows it or not."""

    def __init__(self, unanswered: frozenset[str] = frozenset()) -> None:
        self.unanswered, self.asked = unanswered, list[tuple[str, str]]()

    async def score(self, pairs: Sequence[tuple[str, str]], mode: str, use_cache: bool = True) -> list[float | None]:
        self.asked += pairs
        return [None if t in self.unanswered else LEVEL[e] + len(t) / 10 + (2.0 if e in t else 0.0) for t, e in pairs]


def test_explanations_of_any_level_get_the_same_verdict_for_the_same_evidence() -> None:
    pairs = [("common words", "common words"), ("xxxxxxxx" + "rare", "rare"), ("aaaaaaaaaaaa", "rare")]
    judge = Judge()
    found = asyncio.run(Levelled(judge, ["r" * 8, "s" * 16]).score(pairs, "likelihood", use_cache=False))
    assert found == pytest.approx([2.0, 2.0, 0.0])
    assert len(judge.asked) == 3 + 2 * 2


def test_a_reference_without_an_answer_is_left_out_and_without_any_the_verdict_is_missing() -> None:
    pairs = [("aaaaaaaaaaaa", "rare")]
    one = Judge(frozenset({"bad"}))
    assert asyncio.run(Levelled(one, ["bad", "r" * 12]).score(pairs, "yes_no")) == pytest.approx([0.0])
    assert asyncio.run(Levelled(one, ["bad"]).score(pairs, "yes_no")) == [None]
    with pytest.raises(ValueError, match="reference"):
        Levelled(one, [])
