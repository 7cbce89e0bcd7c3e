"""Which texts go together and where a text is highlighted, so that neither gives the answer away. Pure.

Suffixes: n tokens of one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_ray.evidence.types import Example


def spread(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """The examples in an order of which every beginning holds each stratum and quantile about in proportion."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.stratum, example.quantile), []).append(index)
    key_of = np.empty(len(examples))
    for members in groups.values():
        # Systematic sampling: one member in each of len(members) equal intervals of [0, 1).
        ranks = rng.permutation(len(members))
        key_of[members] = (ranks + rng.random(len(members))) / len(members)
    return [examples[i] for i in np.argsort(key_of, kind="stable")]


def matched(
    positives: Sequence[Example],
    negatives: Sequence[Example],
    lengths: Sequence[Sequence[int]],
    rng: np.random.Generator,
) -> list[tuple[Example, Example]]:
    """Pairs of one positive and the unused negative whose text is closest in length; min(positives, negatives) of them.

    Args:
        lengths: of the positives' texts, and of the negatives'.
    """
    order = rng.permutation(len(positives))[: len(negatives)]
    free = list(rng.permutation(len(negatives)))
    pairs = []
    for p in order:
        nearest = min(range(len(free)), key=lambda at: abs(lengths[1][free[at]] - lengths[0][p]))
        pairs.append((positives[p], negatives[free.pop(nearest)]))
    return pairs


def hands(n_items: int, size: int, n_hands: int, rng: np.random.Generator) -> list[list[int]]:
    """`n_hands` draws of `size` different items, every item drawn equally often, give or take one.

    Raises:
        ValueError: fewer items than a hand holds.
    """
    if n_items < size:
        raise ValueError(f"a hand of {size} cannot be dealt from {n_items}")
    used = np.zeros(n_items)
    dealt = []
    for _ in range(n_hands):
        hand = np.lexsort((rng.random(n_items), used))[:size]
        used[hand] += 1
        dealt.append([int(i) for i in hand])
    return dealt


@dataclass(frozen=True)
class Pattern:
    """Where a text is highlighted, apart from what it says: (first token, tokens) of each run. A run in the second half
    of its text is counted from the end, below 0: in a text of another length, early stays early and last stays last."""

    runs: tuple[tuple[int, int], ...]


def pattern_of(active_n: np.ndarray) -> Pattern:
    """The pattern of bool [n]."""
    n = len(active_n)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], active_n.astype(np.int8), [0]])))
    runs = [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
    return Pattern(tuple((start if start + end <= n else start - n, end - start) for start, end in runs))


def place(pattern: Pattern, n: int, forbidden_n: np.ndarray) -> np.ndarray | None:
    """The pattern on a text of n tokens, bool [n]; None where it does not fit or touches a forbidden token."""
    marked_n = np.zeros(n, dtype=bool)
    for at, length in pattern.runs:
        start = at if at >= 0 else n + at
        # A shorter text may push two runs into one; that would change how many words are marked.
        if start < 0 or start + length > n or marked_n[max(0, start - 1) : start + length + 1].any():
            return None
        marked_n[start : start + length] = True
    return None if (marked_n & forbidden_n).any() else marked_n


def deal_patterns(
    patterns: Sequence[Pattern], forbidden: Sequence[np.ndarray], n_total: int, rng: np.random.Generator
) -> tuple[list[np.ndarray | None], list[Pattern]]:
    """Gives texts that have tokens of their own to avoid a pattern each, and returns the patterns that are left.

    `n_total` patterns are dealt in all, every one equally often (give or take one). So negatives are highlighted at the
    same places as positives are, exactly, and not only in distribution: a judge who looks at places is at chance.

    Args:
        forbidden: per text bool [n], its own active tokens.
    Returns:
        (per text its marks, bool [n], or None where no pattern suits it; the `n_total - placed` patterns left over).
    """
    copies = n_total // len(patterns)
    extra = rng.permutation(len(patterns))[: n_total - copies * len(patterns)]
    pool = [patterns[i] for i in rng.permutation([*np.tile(np.arange(len(patterns)), copies), *extra])]
    fits = [[place(pattern, len(own), own) for pattern in pool] for own in forbidden]
    holder: dict[int, int] = {}  # pattern -> text

    def give(text: int, seen: set[int]) -> bool:
        """Kuhn's augmenting path: a pattern that is free, or whose holder can take another."""
        for at in range(len(pool)):
            if fits[text][at] is not None and at not in seen:
                seen.add(at)
                if at not in holder or give(holder[at], seen):
                    holder[at] = text
                    return True
        return False

    for text in range(len(forbidden)):
        give(text, set())
    marks: list[np.ndarray | None] = [None] * len(forbidden)
    for at, text in holder.items():
        marks[text] = fits[text][at]
    return marks, [pattern for at, pattern in enumerate(pool) if at not in holder]
