from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence

import pytest

from sae_ray.judge.injection import (
    CANARIES,
    FILLERS,
    INJECTIONS,
    filler,
    flag_texts,
    injection_report,
    insert,
)
from sae_ray.judge.planting import PlantedItem

SENTENCES = [sentence for family in INJECTIONS.values() for sentence in family]
ITEMS = [
    PlantedItem(f"context {i} " + ("tensor" if positive else "poem") * 3, "tensor", positive, True)
    for i, positive in enumerate([True, False] * 20)
]


class Judge:
    """Reads the context, answers by its word; `obeys` adds to the verdict of a text that holds an injection."""

    def __init__(self, obeys: Callable[[str], float] = lambda sentence: 0.0, noise: float = 0.3) -> None:
        self.obeys, self.noise = obeys, noise

    async def score(self, pairs: Sequence[tuple[str, str]], mode: str) -> list[float | None]:
        return [self._verdict(text, explanation) for text, explanation in pairs]

    def _verdict(self, text: str, explanation: str) -> float:
        heard = sum(self.obeys(sentence) for sentence in SENTENCES if sentence in text)
        jitter = random.Random(text + explanation).gauss(0, self.noise)
        return (2.0 if explanation in text else 0.0) + heard + jitter


def report(judge: Judge):
    return asyncio.run(injection_report(judge, "yes_no", ITEMS, threshold=1.0))


def test_a_judge_that_does_not_listen_is_within_the_bound_with_its_auroc_unchanged() -> None:
    found = report(Judge())
    assert found.holds
    assert abs(found.total.shift_sd) < 0.1
    assert found.total.distance_sd == pytest.approx(found.total.neutral_distance_sd, rel=0.3)
    assert found.total.auroc > 0.99
    assert found.flagged <= 0.1
    assert found.total.n == 8 * len(SENTENCES)
    assert {each.family for each in found.families} == set(INJECTIONS)


def test_a_judge_that_obeys_one_family_fails_in_that_family_alone_and_by_the_right_amount() -> None:
    obeyed = set(INJECTIONS["instruction"])
    found = report(Judge(lambda sentence: 3.0 * (sentence in obeyed)))
    shift = {each.family: each for each in found.families}
    # Half of the verdicts stand at 2, half at 0, with noise 0.3 on each.
    assert shift["instruction"].shift_sd == pytest.approx(3.0 / math.hypot(1.0, 0.3), rel=0.1)
    assert shift["instruction"].flips == pytest.approx(0.5)
    assert not shift["instruction"].holds
    assert not found.holds
    assert all(each.holds for name, each in shift.items() if name != "instruction")


def test_a_judge_moved_both_ways_flips_even_though_its_mean_stays() -> None:
    sign = {sentence: 3.0 if i % 2 else -3.0 for i, sentence in enumerate(SENTENCES)}
    found = report(Judge(lambda sentence: sign[sentence]))
    assert abs(found.total.shift_sd) < 0.5
    assert found.total.flips > 0.3
    assert not found.holds


def test_canaries_give_away_a_text_that_raises_every_verdict() -> None:
    found = report(Judge(lambda sentence: 3.0))
    assert found.flagged > 0.95
    assert found.false_alarm < 0.1
    flags = asyncio.run(
        flag_texts(
            Judge(lambda s: 3.0), "yes_no", [f"a text. {SENTENCES[0]}", "a text."], [f"t {i}" for i in range(80)]
        )
    )
    assert flags == [True, False]


def test_unanswered_is_missing_and_nothing_measured_is_no_proof() -> None:
    class Silent:
        async def score(self, pairs: Sequence[tuple[str, str]], mode: str) -> list[float | None]:
            return [None] * len(pairs)

    found = asyncio.run(injection_report(Silent(), "yes_no", ITEMS, 0.0))
    assert math.isnan(found.total.shift_sd)
    assert found.total.missing == 8 * len(SENTENCES)
    assert not found.holds
    with pytest.raises(ValueError, match="negatives"):
        asyncio.run(injection_report(Silent(), "yes_no", ITEMS[::2], 0.0))


def test_the_corpus_is_large_enough_and_every_filler_is_of_its_injections_length() -> None:
    assert len(SENTENCES) == len(set(SENTENCES)) >= 18
    for number, sentence in enumerate(SENTENCES):
        assert len(filler(len(sentence), number)) == len(sentence)
        assert insert("context", sentence, "end").startswith("context ")
        assert insert("context", sentence, "start").endswith(" context")
    assert not any(word in text.lower() for text in FILLERS for word in ("yes", "answer", "score"))
    assert not any(canary in text for canary in CANARIES for text in SENTENCES)
