from __future__ import annotations

import asyncio
import random

import pytest
from word_tokens import Words

from sae_ray.config import JudgeConfig
from sae_ray.errors import UserError
from sae_ray.judge.calibration import Calibration, JudgeAtChance, calibrate, measure
from sae_ray.judge.planting import PlantedItem, find_concepts, plant_items, words_of
from sae_ray.judge.prompts import Mode

TOPICS = {
    "sea": ["harbour", "vessel", "sailor", "anchor", "tide"],
    "law": ["court", "judge", "verdict", "lawyer", "appeal"],
    "food": ["flour", "oven", "butter", "recipe", "sugar"],
    "sky": ["planet", "orbit", "comet", "galaxy", "telescope"],
    "farm": ["tractor", "harvest", "barn", "cattle", "meadow"],
    "music": ["violin", "melody", "chorus", "rhythm", "concert"],
}


def corpus(documents: int = 240) -> list[str]:
    rng = random.Random(0)
    filler = ["".join(rng.choices("abcdefghiklmnoprstu", k=7)) for _ in range(900)]
    topics = list(TOPICS.values())
    return [" ".join(rng.sample(topics[i % len(topics)], 3) + rng.sample(filler, 9)) for i in range(documents)]


class BothModes:
    async def modes(self) -> tuple[Mode, ...]:
        return ("likelihood", "yes_no")


class Oracle(BothModes):
    """Knows the answer in one mode and guesses in the other."""

    def __init__(self, items: list[PlantedItem], good: Mode | None) -> None:
        self.truth = {(i.text, i.explanation): i.positive for i in items}
        self.good, self.rng = good, random.Random(1)

    async def score(self, pairs: list[tuple[str, str]], mode: Mode) -> list[float | None]:
        gain = 2.0 if mode == self.good else 0.0
        return [self.rng.gauss(gain * self.truth[p], 0.5) for p in pairs]


def planted() -> list[PlantedItem]:
    return plant_items(corpus(), 6, 8, 12, Words(), seed=0)


def test_concepts_are_the_topics_of_the_corpus() -> None:
    concepts = find_concepts(corpus(), 6, 8, 12, Words(), seed=0)
    assert len(concepts) == 6
    for concept in concepts:
        assert any(set(concept.label.split(", ")) <= set(topic) for topic in TOPICS.values()), concept.words


def test_planted_answers_are_true_by_construction() -> None:
    items = planted()
    for item in items:
        shared = words_of(item.explanation) & words_of(item.text)
        assert item.positive or not shared
    positives = [i for i in items if i.positive]
    assert len(positives) == 6 * 8
    assert all(sum(set(t) >= words_of(i.explanation) for t in TOPICS.values()) == 1 for i in positives)


def test_no_concept_or_text_is_both_fitted_on_and_reported() -> None:
    items = planted()
    for what in (lambda i: i.explanation, lambda i: i.text):
        assert not {what(i) for i in items if i.held_out} & {what(i) for i in items if not i.held_out}


def test_planting_is_seeded() -> None:
    assert planted() == planted()


def test_a_corpus_without_concepts_is_refused_with_what_would_help() -> None:
    with pytest.raises(UserError, match="texts_per_concept"):
        plant_items(["one short text"] * 5, 6, 4, 12, Words(), seed=0)


@pytest.mark.parametrize("good", ["likelihood", "yes_no"])
def test_the_mode_that_knows_is_picked_and_survives_a_round_trip(good: Mode) -> None:
    items = planted()
    found = asyncio.run(calibrate(Oracle(items, good), items, JudgeConfig()))
    assert found.mode == good
    assert found.chosen.auroc.value > 0.95
    assert found.chosen.auroc.low > 0.8
    assert found.chosen.false_positive < 0.2
    assert found.chosen.false_negative < 0.2
    assert found.probability(2.0) > 0.8
    assert found.probability(0.0) < 0.2
    assert Calibration.from_dict(found.to_dict()) == found


def test_a_judge_at_chance_stops_the_run_and_says_how_bad_it_is() -> None:
    items = planted()
    with pytest.raises(JudgeAtChance, match=r"likelihood AUROC 0\.\d\d .*yes_no AUROC .*stronger judge"):
        asyncio.run(calibrate(Oracle(items, None), items, JudgeConfig()))


def test_a_good_judge_in_a_mode_that_was_not_allowed_does_not_count() -> None:
    items = planted()
    with pytest.raises(JudgeAtChance):
        asyncio.run(calibrate(Oracle(items, "likelihood"), items, JudgeConfig(mode="yes_no")))


def test_a_judge_that_answers_nothing_is_not_believed() -> None:
    class Silent(BothModes):
        async def score(self, pairs: list[tuple[str, str]], mode: Mode) -> list[float | None]:
            return [None] * len(pairs)

    with pytest.raises(JudgeAtChance, match="too few"):
        asyncio.run(calibrate(Silent(), planted(), JudgeConfig()))


def test_each_kind_is_measured_apart_and_old_files_without_kinds_or_anchors_still_load() -> None:
    items = planted()
    found = asyncio.run(calibrate(Oracle(items, "likelihood"), items, JudgeConfig()))
    kinds = {i.kind for i in items}
    assert set(found.chosen.kinds) >= kinds
    held_out = [i for i in items if i.held_out]
    assert sum(found.chosen.kinds[kind].items for kind in kinds) == found.chosen.items == len(held_out)
    old = found.to_dict()
    del old["anchors"]
    for mode in old["modes"].values():
        del mode["kinds"]
    assert Calibration.from_dict(old).chosen.auroc == found.chosen.auroc


def test_a_kind_that_the_judge_cannot_do_shows_in_its_own_rates() -> None:
    items = planted()

    class Lexical(Oracle):
        async def score(self, pairs: list[tuple[str, str]], mode: Mode) -> list[float | None]:
            kind = {i.explanation: i.kind for i in items}
            return [
                verdict if kind[e] == "lexical" else self.rng.gauss(0, 1)
                for (_, e), verdict in zip(pairs, await super().score(pairs, mode), strict=True)
            ]

    kinds = asyncio.run(calibrate(Lexical(items, "likelihood"), items, JudgeConfig())).chosen.kinds
    assert kinds["lexical"].auroc.value > 0.95
    assert kinds["topical"].auroc.value < 0.75
    assert kinds["lexical"].false_negative < kinds["topical"].false_negative


class Skewed(BothModes):
    """Positives are far off or near, negatives near: the best single threshold is not where the map says a half."""

    def __init__(self, items: list[PlantedItem]) -> None:
        self.truth = {(i.text, i.explanation): i.positive for i in items}
        self.rng = random.Random(3)

    async def score(self, pairs: list[tuple[str, str]], mode: Mode) -> list[float | None]:
        return [
            self.rng.choice([1.0, 1.2, 9.0]) + self.rng.random() if self.truth[p] else self.rng.random() for p in pairs
        ]


def test_the_rates_of_verdicts_at_a_half_are_those_of_verdicts_cut_there() -> None:
    items = planted()
    skewed = Skewed(items)
    verdicts = asyncio.run(skewed.score([(i.text, i.explanation) for i in items], "likelihood"))
    found = measure("likelihood", items, verdicts, 0.0)
    assert found is not None
    held_out = [(i.positive, found.probability(v) >= 0.5) for i, v in zip(items, verdicts, strict=True) if i.held_out]
    false_positive = [yes for positive, yes in held_out if not positive]
    false_negative = [not yes for positive, yes in held_out if positive]
    assert found.rates_at_half == (
        sum(false_positive) / len(false_positive), sum(false_negative) / len(false_negative),
    )  # fmt: skip
    assert found.rates_at_half[1] > found.false_negative + 0.1  # the other cut's would be taken for better than it is


def test_a_calibration_of_a_version_without_rates_at_a_half_stands_with_those_it_has() -> None:
    items = planted()
    old = asyncio.run(calibrate(Skewed(items), items, JudgeConfig())).to_dict()
    for mode in old["modes"].values():
        for each in [mode, *mode["kinds"].values()]:
            del each["even_false_positive"], each["even_false_negative"]
    chosen = Calibration.from_dict(old).chosen
    assert chosen.rates_at_half == (chosen.false_positive, chosen.false_negative)


def test_anchors_are_gold_items_of_both_answers_with_the_verdicts_of_the_chosen_mode() -> None:
    items = planted()
    oracle = Oracle(items, "yes_no")
    said: dict[tuple[str, str, Mode], float] = {}

    class Recorded(BothModes):
        async def score(self, pairs: list[tuple[str, str]], mode: Mode) -> list[float | None]:
            answers = await oracle.score(pairs, mode)
            said.update({(*pair, mode): answer for pair, answer in zip(pairs, answers, strict=True)})
            return answers

    anchors = asyncio.run(calibrate(Recorded(), items, JudgeConfig())).anchors
    assert len(anchors) == 32
    assert all(a.verdict == said[a.text, a.explanation, "yes_no"] for a in anchors)
    assert sum(oracle.truth[a.text, a.explanation] for a in anchors) == 16


def test_a_judge_that_cannot_read_likelihoods_is_measured_in_the_mode_that_it_can():
    items = planted()

    class AnswersOnly(Oracle):
        async def modes(self) -> tuple[Mode, ...]:
            return ("yes_no",)

    found = asyncio.run(calibrate(AnswersOnly(items, "yes_no"), items, JudgeConfig()))
    assert list(found.modes) == ["yes_no"]
