from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from explaining import Continues, Corpus, explain, latent, texts_of

from sae_ray.judge.explainers.grouping import groups, k_means, silhouette

MONEY = ["money", "loan", "credit", "deposit", "account", "interest", "finance", "payment", "bank"]
CHESS = ["knight", "bishop", "pawn", "castle", "board", "queen", "opening", "rook", "mate"]
ARRAYS = ["tensor", "shape", "array", "dtype", "axis", "stride", "reshape", "index", "slice"]
FILLER = [f"filler{a}{b}" for a in "abcdefghijklmno" for b in "abcdefghijklmno"]


def sentences(topics: list[list[str]], n: int, seed: int) -> list[list[str]]:
    """The i-th is of topic i modulo their number: five of its words among five of all kinds."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        words = rng.sample(topics[i % len(topics)], 5) + rng.sample(FILLER, 5)
        rng.shuffle(words)
        made.append(words)
    return made


@pytest.mark.parametrize("topics", [[MONEY, CHESS], [MONEY, CHESS, ARRAYS]])
def test_groups_are_the_topics(topics: list[list[str]]) -> None:
    right = 0
    for seed in range(5):
        found = groups([" ".join(words) for words in sentences(topics, 60, seed)], most=5)
        right += [sorted(each) for each in sorted(found)] == [
            list(range(t, 60, len(topics))) for t in range(len(topics))
        ]
    assert right >= 4


@pytest.mark.parametrize("topics", [[MONEY], [FILLER]])
def test_where_nothing_separates_there_is_one_group(topics: list[list[str]]) -> None:
    several = sum(len(groups([" ".join(w) for w in sentences(topics, 40, seed)], most=4)) > 1 for seed in range(8))
    assert several <= 1


def test_groups_are_a_partition_the_largest_first_and_the_same_each_time() -> None:
    texts = [" ".join(words) for words in sentences([MONEY, CHESS, MONEY], 60, 0)]
    found = groups(texts, most=4)
    assert sorted(i for members in found for i in members) == list(range(60))
    assert all(len(a) >= len(b) for a, b in pairwise(found))
    assert found == groups(texts, most=4)
    assert len(found) > 1


@pytest.mark.parametrize("texts", [[], ["one"], ["a b", "c d"], [""] * 20, ["same words here"] * 20])
def test_too_little_to_tell_apart_is_one_group(texts: list[str]) -> None:
    assert groups(texts, most=4) == [list(range(len(texts)))]


def test_silhouette_is_the_textbooks() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3])
    expected = []
    for i in range(12):
        distances = {c: [1 - x[i] @ x[j] for j in range(12) if j != i and labels[j] == c] for c in range(4)}
        own = distances.pop(int(labels[i]))
        if not own:
            expected.append(0.0)
            continue
        a, b = np.mean(own), min(np.mean(d) for d in distances.values())
        expected.append((b - a) / max(a, b))
    assert silhouette(x, labels) == pytest.approx(np.mean(expected), abs=1e-12)


def test_k_means_leaves_each_row_with_its_nearest_centre() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(20, 4)) * 0.3 + centre * 2 for centre in np.eye(4)[:3]])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = k_means(x, 3)
    centres = np.stack([x[labels == label].sum(0) for label in range(3)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    assert ((x @ centres.T).argmax(1) == labels).all()
    assert len({tuple(np.bincount(labels[i : i + 20], minlength=3)) for i in (0, 20, 40)}) == 3


def polysemantic(corpus: Corpus, topics: list[list[str]]) -> list:
    """The latent fires on each topic's first word, among five words of the topic and five of any."""
    rows = sentences(topics, 60, 0)
    return [
        corpus.add(" ".join([*words[:5], "*" + topics[i % len(topics)][0], *words[5:]])) for i, words in enumerate(rows)
    ]


def by_topic(prompt: str, n: int) -> list[str] | None:
    shown = prompt.rsplit("Texts:", 1)[1]
    topics = [name for name, words in (("finance", MONEY), ("chess", CHESS)) if f"<<{words[0]}>>" in shown]
    return [f"{' and '.join(topics)} {word}" for word in ("games", "things")[:n]]


def test_each_meaning_is_explained_and_the_meanings_are_joined() -> None:
    corpus = Corpus()
    evidence = latent(*polysemantic(corpus, [MONEY, CHESS]))
    found, failures = explain("clusters", [evidence], corpus, Continues(by_topic), clusters=4, candidates=2)
    of_all = texts_of([each for each in found[0] if each.cluster == -1])
    meanings = {c: texts_of([each for each in found[0] if each.cluster == c]) for c in (0, 1)}
    assert sorted(meanings.values()) == [["chess games", "chess things"], ["finance games", "finance things"]]
    assert of_all == [f"{meanings[0][rank]}; or {meanings[1][rank]}" for rank in (0, 1)]
    assert found[0][0].cluster == -1
    assert len(found[0]) == 6
    assert failures == 0
    assert {each.explainer for each in found[0]} == {"clusters/delimiters"}


def test_a_latent_of_one_meaning_is_explained_as_a_whole() -> None:
    corpus = Corpus()
    evidence = latent(*polysemantic(corpus, [MONEY]))
    for clusters in (1, 4):
        writer = Continues(by_topic)
        found, _ = explain("clusters", [evidence], corpus, writer, clusters=clusters, candidates=1)
        assert [(each.text, each.cluster) for each in found[0]] == [("finance games", -1)]
        assert len(writer.prompts) == 1


def test_one_cluster_is_all_there_is_when_more_are_not_asked_for() -> None:
    corpus, writer = Corpus(), Continues(by_topic)
    explain("clusters", [latent(*polysemantic(corpus, [MONEY, CHESS]))], corpus, writer, clusters=1, candidates=1)
    assert len(writer.prompts) == 1


def test_a_meaning_without_explanation_leaves_no_joined_one() -> None:
    corpus = Corpus()

    def only_chess(prompt: str, n: int) -> list[str] | None:
        said = by_topic(prompt, n)
        return said if said and said[0].startswith("chess") else None

    evidence = latent(*polysemantic(corpus, [MONEY, CHESS]))
    found, failures = explain("clusters", [evidence], corpus, Continues(only_chess), clusters=3, candidates=2)
    assert texts_of(found[0]) == ["chess games", "chess things"]
    assert all(each.cluster >= 0 for each in found[0])
    assert failures == 2


def test_meanings_with_the_same_explanation_are_not_joined_with_themselves() -> None:
    corpus = Corpus()
    evidence = latent(*polysemantic(corpus, [MONEY, CHESS]))
    found, _ = explain("clusters", [evidence], corpus, Continues(lambda _, n: ["Games"] * n), clusters=3, candidates=1)
    assert texts_of([each for each in found[0] if each.cluster == -1]) == ["Games"]
