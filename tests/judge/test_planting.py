from __future__ import annotations

import random

import pytest
from word_tokens import Words

from sae_ray.judge.planting import KINDS, PlantedItem, find_concepts, plant_items, words_of

TOPICS = {
    "sea": ["harbour", "vessel", "sailor", "anchor", "tide", "lagoon", "rudder", "cargo"],
    "law": ["court", "judge", "verdict", "lawyer", "appeal", "statute", "clause", "bailiff"],
    "food": ["flour", "oven", "butter", "recipe", "sugar", "dough", "pastry", "yeast"],
    "sky": ["planet", "orbit", "comet", "galaxy", "telescope", "nebula", "eclipse", "meteor"],
    "farm": ["tractor", "harvest", "barn", "cattle", "meadow", "plough", "orchard", "fodder"],
    "music": ["violin", "melody", "chorus", "rhythm", "concert", "sonata", "flute", "quartet"],
}
VERBS = ["walk", "jump", "paint", "count", "print", "climb", "knock", "laugh", "start", "visit"]


def corpus() -> list[str]:
    """Topics of eight words that occur three at a time, beside unrelated filler and inflected verbs."""
    rng = random.Random(0)
    filler = ["".join(rng.choices("abcdefghiklmnoprstu", k=7)) for _ in range(900)]
    topics = list(TOPICS.values())
    return [
        " ".join(
            [
                *rng.sample(topics[i % len(topics)], 3),
                rng.choice(VERBS) + rng.choice(["", "s", "ed", "ing"]),
                *rng.sample(filler, 8),
            ]
        )
        for i in range(300)
    ]


@pytest.fixture(scope="module")
def items() -> list[PlantedItem]:
    return plant_items(corpus(), 12, 6, 12, Words(), seed=0)


def test_concepts_are_shared_between_the_kinds_and_both_are_halved(items: list[PlantedItem]) -> None:
    for kind in KINDS:
        labels = {(i.explanation, i.held_out) for i in items if i.kind == kind}
        assert sum(held for _, held in labels) == sum(not held for _, held in labels) == 3


def test_a_lexical_concept_is_a_word_with_its_inflections(items: list[PlantedItem]) -> None:
    concepts = [c for c in find_concepts(corpus(), 12, 6, 12, Words(), seed=0) if c.kind == "lexical"]
    inflected = [c for c in concepts if c.words[0] in VERBS and len(c.words) > 1]
    assert inflected
    for concept in concepts:
        assert all(word.startswith(concept.words[0]) for word in concept.words)
        assert all(set(concept.words) & words_of(text) for text in concept.texts)


def test_part_of_the_topical_positives_hold_the_topic_but_no_word_of_its_label(items: list[PlantedItem]) -> None:
    topical = [i for i in items if i.kind == "topical" and i.positive]
    hidden = [i for i in topical if not i.named]
    assert 0 < len(hidden) <= len(topical) / 2
    for item in hidden:
        assert not words_of(item.explanation) & words_of(item.text)
    # In a corpus this small, chance makes a topic now and then.
    true = [t for i in hidden for t in TOPICS.values() if words_of(i.explanation) <= set(t)]
    assert len(true) > 0.6 * len(hidden)
    for item in hidden:
        for topic in TOPICS.values():
            if words_of(item.explanation) <= set(topic):
                assert len(set(topic) & words_of(item.text)) >= 2
    for item in topical:
        if item.named:
            assert len(words_of(item.explanation) & words_of(item.text)) >= 2


def test_negatives_hold_no_word_of_the_concept_and_are_asked_about_both_kinds(items: list[PlantedItem]) -> None:
    words = {c.label: set(c.words) for c in find_concepts(corpus(), 12, 6, 12, Words(), seed=0)}
    negatives = [i for i in items if not i.positive]
    assert all(not words[i.explanation] & words_of(i.text) for i in negatives)
    counts = [sum(i.kind == kind for i in negatives) for kind in KINDS]
    assert min(counts) > 0.35 * sum(counts)


def test_one_kind_can_be_asked_for(items: list[PlantedItem]) -> None:
    for kind in KINDS:
        only = plant_items(corpus(), 6, 6, 12, Words(), seed=0, kinds=(kind,))
        assert {i.kind for i in only} == {kind}


def test_what_one_kind_lacks_the_other_gives() -> None:
    concepts = find_concepts(corpus(), 30, 6, 12, Words(), seed=0)
    assert sum(c.kind == "topical" for c in concepts) < 15
    assert sum(c.kind == "lexical" for c in concepts) > 15 or len(concepts) < 30


def test_no_concept_shares_a_word_or_a_text_with_another() -> None:
    concepts = find_concepts(corpus(), 12, 6, 12, Words(), seed=0)
    words = [word for c in concepts for word in c.words]
    texts = [text for c in concepts for text in c.texts]
    assert len(words) == len(set(words))
    assert len(texts) == len(set(texts))
