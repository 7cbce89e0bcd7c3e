"""Items whose right answer is known, made from the corpus that the run trains on. Pure.

Lexical: the concept is a word with its inflections. A context shows it when it holds one of them.

Topical: the concept is a group of words that keep each other's company: distinctive words by document frequency,
grouped by how much more often they meet in a context than chance would have it. The first few label it. Half of its
positives hold several of the label's words; the other half (`named` is False) hold several of the label's further
company and none of the label's words, so that matching words is not enough.

Negatives are other concepts' contexts that hold none of the concept's words, company included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sae_ray.errors import UserError

Kind = Literal["lexical", "topical"]
KINDS: tuple[Kind, ...] = ("lexical", "topical")

_MAX_CONTEXTS = 8000
_MAX_WORDS, _MAX_LABEL_WORDS = 1500, 700
_DIRECTIONS = 64
_LABEL_WORDS = 3
# Words of a topic beside its label: enough that contexts without a label word can be found, all still of the topic.
_COMPANY_WORDS = 8
_LEAST_AFFINITY, _LEAST_LIKENESS, _LEAST_ALIKE = 0.1, 0.45, 1.2
_NEGATIVES_PER_POSITIVE = 4
_WORD = re.compile(r"[A-Za-z]{4,}")
_ENDINGS = ("", "s", "es", "d", "ed", "r", "er", "ers", "ing", "ion", "ions", "ly")
# Words of grammar keep company too, but name no topic.
_FUNCTION_WORDS = frozenset(
    """
    about above after again also although always among another anything around because become been before being
    below between both cannot could does doing done down during each either else enough especially etc even ever
    every everything exactly following follows from further gets gives given have having hence here however
    instead into itself just kind least less like made make makes many might more most much must need needed
    needs neither never next none nothing often once only other others otherwise over perhaps possible previous
    provide provided provides quite rather really same several shall should since some something still such than
    that their them then there therefore these they thing things this those though through thus together toward
    under unless until unlike upon used uses using very want wants well were what whatever when whenever where
    wherever whether which while whole whose will with within without would your yours
    """.split()  # noqa: SIM905 - a list of one word a line would be 150 lines
)


@dataclass(frozen=True)
class Concept:
    """label: the explanation to be judged. words: the label's and, of a topic, their further company; a context that
    holds none of them is a negative. texts: positives; `named` says of each whether it holds a word of the label."""

    label: str
    words: tuple[str, ...]
    texts: tuple[str, ...]
    kind: Kind = "topical"
    named: tuple[bool, ...] = ()


@dataclass(frozen=True)
class PlantedItem:
    """Does `text` show `explanation`? `positive` is the answer; `held_out` items measure, the others fit.

    kind: of the concept that `explanation` names. named: `text` holds a word of it, so that a word matcher would do.
    """

    text: str
    explanation: str
    positive: bool
    held_out: bool
    kind: Kind = "topical"
    named: bool = True


def plant_items(
    documents: Sequence[str],
    n_concepts: int,
    texts_per_concept: int,
    context_tokens: int,
    tokenizer: Any,
    seed: int,
    kinds: Sequence[Kind] = KINDS,
) -> list[PlantedItem]:
    """Planted items, half of each kind's concepts held out. The same arguments give the same items.

    Args:
        n_concepts: in all; shared equally between `kinds`, and what one kind lacks the other gives.
        tokenizer: a Hugging Face fast tokenizer; contexts are `context_tokens` of its tokens.
    Raises:
        UserError: the documents hold fewer than four concepts.
    """
    concepts = find_concepts(documents, n_concepts, texts_per_concept, context_tokens, tokenizer, seed, kinds)
    if len(concepts) < 4:
        raise UserError(
            f"judge.calibration: the corpus sample of {len(documents)} documents holds only {len(concepts)} concepts "
            f"with {texts_per_concept} contexts of {context_tokens} tokens each; 4 are needed: give it more text, or "
            "lower judge.calibration.texts_per_concept"
        )
    rng = np.random.default_rng([seed, 1])
    counts = dict.fromkeys(KINDS, 0)
    half: list[bool] = []
    for concept in concepts:
        half.append(counts[concept.kind] % 2 == 1)
        counts[concept.kind] += 1
    items = []
    for concept, held_out in zip(concepts, half, strict=True):
        # A label is only asked about texts of its own half: nothing that is measured helps to fit.
        others = [c for c, h in zip(concepts, half, strict=True) if c is not concept and h == held_out]
        for text, named in zip(concept.texts, concept.named, strict=True):
            items.append(PlantedItem(text, concept.label, True, held_out, concept.kind, named))
            present = words_of(text)
            absent = [others[i] for i in rng.permutation(len(others)) if not set(others[i].words) & present]
            for other in _shared_out(absent, _NEGATIVES_PER_POSITIVE):
                items.append(PlantedItem(text, other.label, False, held_out, other.kind, False))
    return items


def find_concepts(
    documents: Sequence[str],
    n_concepts: int,
    texts_per_concept: int,
    context_tokens: int,
    tokenizer: Any,
    seed: int,
    kinds: Sequence[Kind] = KINDS,
) -> list[Concept]:
    """Up to `n_concepts` concepts that share no word and no context, each with `texts_per_concept` contexts."""
    rng = np.random.default_rng([seed, 0])
    contexts, document_of = _contexts(documents, context_tokens, tokenizer, rng)
    vocabulary, present_CW = _distinctive_words(contexts, document_of)
    if not vocabulary:
        return []
    sample = _Sample(contexts, document_of, vocabulary, present_CW)
    lexical_share = n_concepts // len(kinds) if "lexical" in kinds else 0
    # Topics first: they need words that keep company; any frequent word will do for a lexical concept.
    topical = _topical(sample, n_concepts - lexical_share, texts_per_concept) if "topical" in kinds else []
    lexical = _lexical(sample, n_concepts - len(topical), texts_per_concept, rng) if "lexical" in kinds else []
    return [*topical, *lexical]


def words_of(text: str) -> set[str]:
    return {match.lower() for match in _WORD.findall(text)}


class _Sample:
    """Contexts, the words they are looked at by, and which of both are still free."""

    def __init__(
        self, contexts: list[str], document_of: np.ndarray, vocabulary: list[str], present_CW: np.ndarray
    ) -> None:
        self.contexts, self.document_of = contexts, document_of
        self.vocabulary, self.present_CW = vocabulary, present_CW
        self.taken_C = np.zeros(len(contexts), dtype=bool)
        self.free_W = np.ones(len(vocabulary), dtype=bool)
        self.column_of = {word: column for column, word in enumerate(vocabulary)}

    def family(self, column: int) -> list[int]:
        """The word's own inflections among the words looked at, itself included, shortest first."""
        word = self.vocabulary[column]
        stems = {word, *(word.removesuffix(ending) for ending in _ENDINGS if len(word.removesuffix(ending)) >= 4)}
        spelled = {stem + ending for stem in stems for ending in _ENDINGS}
        return [self.column_of[w] for w in sorted(spelled, key=lambda w: (len(w), w)) if w in self.column_of]

    def hits(self, columns: Sequence[int]) -> np.ndarray:
        """How many of these words each context holds [C]."""
        return self.present_CW[:, list(columns)].sum(axis=1)

    def take(self, chosen: np.ndarray) -> tuple[str, ...]:
        self.taken_C[chosen] = True
        return tuple(self.contexts[i] for i in chosen)


def _topical(sample: _Sample, wanted: int, texts_per_concept: int) -> list[Concept]:
    affinity_WW = _affinity(sample.present_CW)
    # Further company keeps the same company as the label's words do: where one stands, the others often do not.
    likeness_WW = _likeness(affinity_WW)
    strength_W = np.sort(affinity_WW, axis=1)[:, -_LABEL_WORDS:].mean(axis=1)
    strength_W[_MAX_LABEL_WORDS:] = -1
    concepts: list[Concept] = []
    for seed_word in np.argsort(-strength_W, kind="stable"):
        if len(concepts) == wanted:
            break
        if not sample.free_W[seed_word]:
            continue
        label = _grow(int(seed_word), affinity_WW, sample)
        if len(label) < _LABEL_WORDS:
            continue
        family = [column for word in label for column in sample.family(word) if column not in label]
        closeness_W = np.where(sample.free_W, likeness_WW[label].mean(axis=0), -1.0)
        closeness_W[[*label, *family]] = -1.0
        ranked = np.argsort(-closeness_W, kind="stable")[:_COMPANY_WORDS]
        company = [int(column) for column in ranked if closeness_W[column] >= _LEAST_LIKENESS]

        named_C, company_C = sample.hits(label), sample.hits(company)
        alike_C = sample.present_CW[:, company] @ closeness_W[company]
        hidden_C = (named_C == 0) & (sample.hits(family) == 0) & (company_C >= 2) & (alike_C >= _LEAST_ALIKE)
        hidden = _pick(sample, hidden_C, alike_C, texts_per_concept // 2)
        plain = _pick(sample, named_C >= 2, named_C, texts_per_concept - len(hidden))
        if len(plain) + len(hidden) < texts_per_concept:
            continue
        # Words that keep this company belong to no other concept, or its texts would be unclear negatives.
        sample.free_W &= affinity_WW[label].max(axis=0) < 0.35
        sample.free_W[[*label, *family, *company]] = False
        words = tuple(sample.vocabulary[i] for i in [*label, *family, *company])
        texts = sample.take(np.concatenate([plain, hidden]))
        named = (True,) * len(plain) + (False,) * len(hidden)
        concepts.append(Concept(", ".join(words[:_LABEL_WORDS]), words, texts, "topical", named))
    return concepts


def _lexical(sample: _Sample, wanted: int, texts_per_concept: int, rng: np.random.Generator) -> list[Concept]:
    """Words drawn at random, each labelled by its inflections: all that a context needs is one of them."""
    concepts: list[Concept] = []
    for column in rng.permutation(len(sample.vocabulary)):
        if len(concepts) == wanted:
            break
        family = sample.family(int(column))
        if not sample.free_W[family].all():
            continue
        hits_C = sample.hits(family)
        chosen = _pick(sample, hits_C >= 1, np.zeros(len(hits_C)), texts_per_concept)
        if len(chosen) < texts_per_concept:
            continue
        sample.free_W[family] = False
        words = tuple(sample.vocabulary[i] for i in family)
        texts = sample.take(chosen)
        label = ", ".join(words[:_LABEL_WORDS])
        concepts.append(Concept(label, words, texts, "lexical", (True,) * len(texts)))
    return concepts


def _shared_out(concepts: list[Concept], wanted: int) -> list[Concept]:
    """The first `wanted`, as many of one kind as of the other where both are there."""
    by_kind = [[c for c in concepts if c.kind == kind] for kind in KINDS]
    least = min(len(some) for some in by_kind)
    turns = [c for pair in zip(*by_kind, strict=False) for c in pair]
    return [*turns, *(c for some in by_kind for c in some[least:])][:wanted]


def _affinity(present_CW: np.ndarray) -> np.ndarray:
    """Pointwise mutual information, normalised to [-1, 1], of two words meeting in one context [W, W]."""
    contexts = len(present_CW)
    together_WW = present_CW.T @ present_CW
    count_W = np.diag(together_WW).copy()
    p_joint = np.maximum(together_WW, 1e-9) / contexts
    affinity_WW = np.log(p_joint * contexts**2 / np.outer(count_W, count_W)) / -np.log(p_joint)
    affinity_WW[together_WW < 3] = -1
    np.fill_diagonal(affinity_WW, -1)
    return affinity_WW


def _pick(sample: _Sample, fits_C: np.ndarray, hits_C: np.ndarray, wanted: int) -> np.ndarray:
    """Up to `wanted` free contexts, those with most hits first."""
    candidates = np.flatnonzero(fits_C & ~sample.taken_C)
    return _spread(candidates[np.argsort(-hits_C[candidates], kind="stable")], sample.document_of, wanted)


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


def _grow(seed_word: int, affinity_WW: np.ndarray, sample: _Sample) -> list[int]:
    """The seed and the free words closest to the whole group so far, no two of them inflections of one word."""
    group, open_W = [seed_word], sample.free_W.copy()
    open_W[_MAX_LABEL_WORDS:] = False
    while len(group) < _LABEL_WORDS:
        open_W[sample.family(group[-1])] = False
        closeness_W = np.where(open_W, affinity_WW[group].mean(axis=0), -1.0)
        best = int(np.argmax(closeness_W))
        if closeness_W[best] < _LEAST_AFFINITY:
            break
        group.append(best)
    return group


def _likeness(affinity_WW: np.ndarray) -> np.ndarray:
    """Cosine of two words' profiles of positive affinity, reduced to its main directions [W, W]."""
    scale_R, directions_WR = np.linalg.eigh(np.maximum(affinity_WW, 0).astype(np.float64))
    # Ascending; the negative end is noise of a matrix that is all but a product of profiles.
    profile_WR = (directions_WR * np.maximum(scale_R, 0) ** 0.5)[:, -_DIRECTIONS:]
    profile_WR /= np.maximum(np.linalg.norm(profile_WR, axis=1, keepdims=True), 1e-9)
    return profile_WR @ profile_WR.T


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
