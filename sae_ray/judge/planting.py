"""Items whose right answer is known, made from the corpus that the run trains on. Pure.

A concept is a group of words that keep each other's company: distinctive words by document frequency, grouped by how
much more often they meet in a context than chance would have it. Its positives are contexts that hold several of its
words, its negatives other concepts' contexts that hold none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_ray.errors import UserError

_MAX_CONTEXTS = 8000
_MAX_WORDS = 700
_WORDS_PER_CONCEPT = 4
_LABEL_WORDS = 3
_WORD = re.compile(r"[A-Za-z]{4,}")
# Words of grammar keep company too, but name no topic.
_FUNCTION_WORDS = frozenset(
    [
        "about",
        "above",
        "after",
        "again",
        "also",
        "although",
        "always",
        "among",
        "another",
        "anything",
        "around",
        "because",
        "become",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "cannot",
        "could",
        "does",
        "doing",
        "done",
        "down",
        "during",
        "each",
        "either",
        "else",
        "enough",
        "especially",
        "etc",
        "even",
        "ever",
        "every",
        "everything",
        "exactly",
        "following",
        "follows",
        "from",
        "further",
        "gets",
        "gives",
        "given",
        "have",
        "having",
        "hence",
        "here",
        "however",
        "instead",
        "into",
        "itself",
        "just",
        "kind",
        "least",
        "less",
        "like",
        "made",
        "make",
        "makes",
        "many",
        "might",
        "more",
        "most",
        "much",
        "must",
        "need",
        "needed",
        "needs",
        "neither",
        "never",
        "next",
        "none",
        "nothing",
        "often",
        "once",
        "only",
        "other",
        "others",
        "otherwise",
        "over",
        "perhaps",
        "possible",
        "previous",
        "provide",
        "provided",
        "provides",
        "quite",
        "rather",
        "really",
        "same",
        "several",
        "shall",
        "should",
        "since",
        "some",
        "something",
        "still",
        "such",
        "than",
        "that",
        "their",
        "them",
        "then",
        "there",
        "therefore",
        "these",
        "they",
        "thing",
        "things",
        "this",
        "those",
        "though",
        "through",
        "thus",
        "together",
        "toward",
        "under",
        "unless",
        "until",
        "unlike",
        "upon",
        "used",
        "uses",
        "using",
        "very",
        "want",
        "wants",
        "well",
        "were",
        "what",
        "whatever",
        "when",
        "whenever",
        "where",
        "wherever",
        "whether",
        "which",
        "while",
        "whole",
        "whose",
        "will",
        "with",
        "within",
        "without",
        "would",
        "your",
        "yours",
    ]
)
_NEGATIVES_PER_POSITIVE = 4


@dataclass(frozen=True)
class Concept:
    label: str
    words: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class PlantedItem:
    """Does `text` show `explanation`? `positive` is the answer; `held_out` items measure, the others fit."""

    text: str
    explanation: str
    positive: bool
    held_out: bool


def plant_items(
    documents: Sequence[str],
    n_concepts: int,
    texts_per_concept: int,
    context_tokens: int,
    tokenizer: Any,
    seed: int,
) -> list[PlantedItem]:
    """Planted items, half of the concepts held out. The same arguments give the same items.

    Args:
        tokenizer: a Hugging Face fast tokenizer; contexts are `context_tokens` of its tokens.
    Raises:
        UserError: the documents hold fewer than four concepts.
    """
    concepts = find_concepts(documents, n_concepts, texts_per_concept, context_tokens, tokenizer, seed)
    if len(concepts) < 4:
        raise UserError(
            f"judge.calibration: the corpus sample of {len(documents)} documents holds only {len(concepts)} concepts "
            f"with {texts_per_concept} contexts of {context_tokens} tokens each; 4 are needed: give it more text, or "
            "lower judge.calibration.texts_per_concept"
        )
    rng = np.random.default_rng([seed, 1])
    items = []
    for index, concept in enumerate(concepts):
        held_out = index % 2 == 1
        # A label is only asked about texts of its own half: nothing that is measured helps to fit.
        others = [c for i, c in enumerate(concepts) if i != index and (i % 2 == 1) == held_out]
        for text in concept.texts:
            items.append(PlantedItem(text, concept.label, True, held_out))
            absent = [c for c in others if not set(c.words) & words_of(text)]
            for chosen in rng.permutation(len(absent))[:_NEGATIVES_PER_POSITIVE]:
                items.append(PlantedItem(text, absent[chosen].label, False, held_out))
    return items


def find_concepts(
    documents: Sequence[str],
    n_concepts: int,
    texts_per_concept: int,
    context_tokens: int,
    tokenizer: Any,
    seed: int,
) -> list[Concept]:
    """Up to `n_concepts` groups of words that share no word, each with `texts_per_concept` contexts."""
    rng = np.random.default_rng([seed, 0])
    contexts, document_of = _contexts(documents, context_tokens, tokenizer, rng)
    vocabulary, present_CW = _distinctive_words(contexts, document_of)
    if len(vocabulary) < _WORDS_PER_CONCEPT:
        return []
    together_WW = present_CW.T @ present_CW
    count_W = np.diag(together_WW).copy()
    # Pointwise mutual information, normalised to [-1, 1], of two words meeting in one context.
    p_joint = np.maximum(together_WW, 1e-9) / len(contexts)
    affinity_WW = np.log(p_joint * len(contexts) ** 2 / np.outer(count_W, count_W)) / -np.log(p_joint)
    affinity_WW[together_WW < 3] = -1
    np.fill_diagonal(affinity_WW, -1)

    concepts: list[Concept] = []
    taken_C = np.zeros(len(contexts), dtype=bool)
    free_W = np.ones(len(vocabulary), dtype=bool)
    strength_W = np.sort(affinity_WW, axis=1)[:, -(_WORDS_PER_CONCEPT - 1) :].mean(axis=1)
    for seed_word in np.argsort(-strength_W, kind="stable"):
        if len(concepts) == n_concepts:
            break
        if not free_W[seed_word]:
            continue
        group = _grow(int(seed_word), affinity_WW, free_W)
        if len(group) < _LABEL_WORDS:
            continue
        hits_C = present_CW[:, group].sum(axis=1)
        candidates = np.flatnonzero((hits_C >= 2) & ~taken_C)
        chosen = _spread(candidates[np.argsort(-hits_C[candidates], kind="stable")], document_of, texts_per_concept)
        if len(chosen) < texts_per_concept:
            continue
        taken_C[chosen] = True
        # Words that keep this company belong to no other concept, or its texts would be unclear negatives.
        free_W &= affinity_WW[group].max(axis=0) < 0.35
        free_W[group] = False
        words = tuple(vocabulary[i] for i in group)
        label = ", ".join(words[:_LABEL_WORDS])
        concepts.append(Concept(label, words, tuple(contexts[i] for i in chosen)))
    return concepts


def words_of(text: str) -> set[str]:
    return {match.lower() for match in _WORD.findall(text)}


def _contexts(
    documents: Sequence[str], context_tokens: int, tokenizer: Any, rng: np.random.Generator
) -> tuple[list[str], np.ndarray]:
    """Contexts of exactly `context_tokens` tokens from documents in random order, and which document each is from."""
    contexts: list[str] = []
    document_of: list[int] = []
    seen: set[tuple[str, ...]] = set()
    for index in rng.permutation(len(documents)):
        ids = tokenizer.encode(documents[index][:20_000], add_special_tokens=False)
        whole = [ids[i : i + context_tokens] for i in range(0, len(ids) - context_tokens + 1, context_tokens)][:8]
        for text in (tokenizer.decode(each) for each in whole):
            # Boilerplate would give "concepts" that are one copied sentence.
            words = _WORD.findall(text.lower())
            shingles = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
            if len(shingles) >= 4 and len(shingles & seen) <= 0.2 * len(shingles):
                contexts.append(text)
                document_of.append(int(index))
            seen |= shingles
        if len(contexts) >= _MAX_CONTEXTS:
            break
    return contexts, np.array(document_of, dtype=np.int64)


def _distinctive_words(contexts: list[str], document_of: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Words in several documents but in few contexts, most frequent first, and where each is present [C, W] (0/1)."""
    where: dict[str, list[int]] = {}
    for index, context in enumerate(contexts):
        for word in sorted(words_of(context) - _FUNCTION_WORDS):
            where.setdefault(word, []).append(index)
    least, most = 5, max(30, int(0.02 * len(contexts)))
    kept = [
        word
        for word, found in where.items()
        if least <= len(found) <= most and len(set(document_of[found].tolist())) >= 4
    ]
    kept.sort(key=lambda word: (-len(where[word]), word))
    kept = kept[:_MAX_WORDS]
    present_CW = np.zeros((len(contexts), len(kept)), dtype=np.float32)
    for column, word in enumerate(kept):
        present_CW[where[word], column] = 1
    return kept, present_CW


def _grow(seed_word: int, affinity_WW: np.ndarray, free_W: np.ndarray) -> list[int]:
    """The seed and the words closest to the whole group so far."""
    group = [seed_word]
    while len(group) < _WORDS_PER_CONCEPT:
        closeness_W = np.where(free_W, affinity_WW[group].mean(axis=0), -1.0)
        closeness_W[group] = -1.0
        best = int(np.argmax(closeness_W))
        if closeness_W[best] < 0.1:
            break
        group.append(best)
    return group


def _spread(candidates: np.ndarray, document_of: np.ndarray, wanted: int) -> np.ndarray:
    """The first `wanted` candidates, one per document where possible: copies of one sentence prove nothing."""
    seen: set[int] = set()
    first: list[int] = []
    rest: list[int] = []
    for index in candidates.tolist():
        (rest if document_of[index] in seen else first).append(index)
        seen.add(int(document_of[index]))
    enough = len(first) >= (wanted + 1) // 2
    return np.array((first + rest)[:wanted] if enough else [], dtype=np.int64)
