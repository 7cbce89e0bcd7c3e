"""Deals a latent's examples: to explainers from the explaining side, to scorers from the scoring side.

Both are pure functions of the evidence (and a seed): the same latent gets the same examples in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sae_ray.evidence.types import NEAR_MISS, RANDOM, SIBLING, TOP, Example, LatentEvidence


def for_explainer(latent: LatentEvidence, n: int) -> list[Example]:
    """Positives that an explainer is shown, strongest first; at most `n`, fewer where there are fewer.

    Half of them are spread evenly over the strongest quarter of the latent's active contexts, the strongest of all
    among them, half over the other three quarters, so that the explanation is not of the extreme tail only. The
    quarter is one of the corpus (by weight), not of what happens to be kept.
    """
    ordered = _by_strength(latent.positives("explain"))
    if len(ordered) <= n:
        return ordered
    if n <= 0:
        return []
    share = np.cumsum([example.weight for example in ordered])
    n_strong = int(np.clip(np.searchsorted(share, share[-1] / 4) + 1, 1, len(ordered)))
    first, second = allot([n_strong, len(ordered) - n_strong], n)
    return _even(ordered[:n_strong], first) + _even_by_weight(ordered[n_strong:], second)


def for_scorer(latent: LatentEvidence, positives: int, negatives: int, seed: int = 0) -> list[Example]:
    """Examples that a scorer judges, positives and negatives mixed, so that any first part of the list is both.

    Positives are spread over the activation quantiles and the strongest contexts; negatives are near misses,
    siblings' contexts and random ones in thirds (where one of them runs short, the others fill in). The weights are
    scaled such that those of a dealt stratum add up to those of the whole stratum: weighted means stay the corpus'.
    Random contexts are taken in the stored order, which all latents share: a judge then reads few texts.

    Returns:
        At most positives + negatives examples; fewer where the evidence has fewer.
    """
    rng = np.random.default_rng([seed & 0xFFFFFFFF, latent.latent, 0x5C0])
    dealt = _positives(latent, positives, rng) + _negatives(latent, negatives, rng)
    return [dealt[index] for index in rng.permutation(len(dealt))]


def _positives(latent: LatentEvidence, n: int, rng: np.random.Generator) -> list[Example]:
    ordered = _by_strength(latent.positives("score"))[::-1]
    numbers = [_group_of(example) for example in ordered]
    groups = [[e for e, number in zip(ordered, numbers, strict=True) if number == g] for g in sorted(set(numbers))]
    if n <= 0 or not groups:
        return []
    if n >= len(groups):
        counts = allot([len(group) for group in groups], n)
        return [e for group, count in zip(groups, counts, strict=True) for e in _draw(group, count, rng)]
    # Fewer than groups: neighbours are joined, and one of each is drawn in proportion to what it stands for.
    dealt = []
    for part in np.array_split(np.arange(len(groups)), n):
        joined = [example for index in part for example in groups[index]]
        weights = np.array([example.weight for example in joined])
        chosen = joined[int(rng.choice(len(joined), p=weights / weights.sum()))]
        dealt.append(replace(chosen, weight=float(weights.sum())))
    return dealt


def _group_of(example: Example) -> float:
    return np.inf if example.stratum == TOP else example.quantile


def _negatives(latent: LatentEvidence, n: int, rng: np.random.Generator) -> list[Example]:
    strata = [latent.negatives("score", stratum) for stratum in (NEAR_MISS, SIBLING, RANDOM)]
    counts = allot([len(stratum) for stratum in strata], n)
    near, sibling = (_draw(stratum, count, rng) for stratum, count in zip(strata[:2], counts[:2], strict=True))
    return near + sibling + _reweighted(strata[2][: counts[2]], strata[2])


def _draw(group: Sequence[Example], n: int, rng: np.random.Generator) -> list[Example]:
    return _reweighted([group[index] for index in np.sort(rng.permutation(len(group))[:n])], group)


def _reweighted(chosen: Sequence[Example], group: Sequence[Example]) -> list[Example]:
    """`chosen`, standing for all that `group` stands for."""
    mine = sum(example.weight for example in chosen)
    scale = sum(example.weight for example in group) / mine if mine else 1.0
    return [replace(example, weight=example.weight * scale) for example in chosen]


def _by_strength(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: (-float(example.acts_S.max()), example.context))


def _even(ordered: Sequence[Example], n: int) -> list[Example]:
    """n of them at even distances, the first among them."""
    return [ordered[int(index)] for index in np.arange(n) * len(ordered) // max(1, n)]


def _even_by_weight(ordered: Sequence[Example], n: int) -> list[Example]:
    """n of them at even distances in what they stand for, none twice, in order."""
    if n <= 0:
        return []
    centre = np.cumsum([example.weight for example in ordered])
    centre -= np.array([example.weight for example in ordered]) / 2
    wanted = (np.arange(n) + 0.5) / n * (centre[-1] + ordered[-1].weight / 2)
    chosen: list[int] = []
    for rank, target in enumerate(wanted):
        least = chosen[-1] + 1 if chosen else 0
        most = len(ordered) - (n - rank)
        chosen.append(int(np.clip(np.searchsorted(centre, target), least, most)))
    return [ordered[index] for index in chosen]


def allot(sizes: Sequence[int], n: int) -> list[int]:
    """How many of each group make n (or all): as equal as the sizes allow, earlier groups first."""
    counts = [0] * len(sizes)
    while n > 0:
        open_groups = [g for g, size in enumerate(sizes) if counts[g] < size]
        if not open_groups:
            break
        share = max(1, n // len(open_groups))
        for g in open_groups:
            take = min(share, sizes[g] - counts[g], n)
            counts[g] += take
            n -= take
    return counts
