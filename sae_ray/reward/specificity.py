"""Which candidate explains a latent: the most specific one that keeps its recall, by F1 at the natural prior.

Every candidate is judged on the same texts: active ones and sibling, near-miss and random negatives, each standing for
`weight` contexts of the corpus. With p the verdict probability and sums over texts, weighted,

    hit = sum p over active texts,  claimed = sum p,  present = weight of the active texts
    F1 = 2 hit / (claimed + present),  recall = hit / present,  breadth = claimed / total weight

A missing verdict is replaced by the mean of the known ones of its stratum, so that candidates stay comparable; a
candidate without any verdict in some stratum is not measured. Errors are those of stratified sampling, linearised.

The rule
1. A candidate whose F1 is not above that of an explanation that is true of every text (`trivial`, F1 of the prior) is
   dropped while any other is left.
2. Of the rest, the one with the highest lower bound F1 exp(-z error / F1) is the best supported. (The bound is taken
   on the logarithm: errors of F1 are largest where few negatives were claimed, and F1 - z error would fall below that
   of explanations which are certain to be bad.)
3. Eligible is whoever has recall >= its recall - z * error of its recall, and F1 >= its lower bound.
4. The eligible one with the smallest breadth wins; among equals the shorter one, then the first.

So, whatever the errors: of two candidates of equal recall the broader one never wins. It has the lower F1, and
whenever it is eligible the other is too. And where a judge says yes to everything, all candidates are equal and
nobody's `advantage` is above 0. Why it matters: RESEARCH.md section 1, the collapse under random negatives.

Two latents that lie close may not both keep one explanation: `without_shared` says who of a round's latents loses it,
and `reward.sharing` takes the loser's credit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_TIE = 1e-9


@dataclass(frozen=True)
class Judged:
    """One candidate: probability [V] of its verdicts, NaN where missing, and its length (bits or words)."""

    probability: np.ndarray
    length: float


@dataclass(frozen=True)
class JudgedTexts:
    """What the candidates were judged on: active bool [V], weight float [V] (inverse sampling propensity), kind str
    [V]: texts of one kind and activity were drawn alike."""

    active: np.ndarray
    weight: np.ndarray
    kind: np.ndarray

    def __post_init__(self) -> None:
        if not (len(self.active) == len(self.weight) == len(self.kind)):
            raise ValueError(f"{len(self.active)} active, {len(self.weight)} weight, {len(self.kind)} kind")
        if not (self.weight > 0).all():
            raise ValueError("weights are inverse propensities: above 0")


@dataclass(frozen=True)
class Fit:
    """f1, recall, breadth as above, with the standard errors of the first two. advantage: (F1 - trivial F1) over what
    there is to gain above it, not below 0."""

    f1: float
    f1_error: float
    recall: float
    recall_error: float
    breadth: float
    advantage: float

    def lower(self, z: float) -> float:
        return self.f1 * math.exp(-z * self.f1_error / self.f1) if self.f1 > 0 else 0.0


@dataclass(frozen=True)
class Chosen:
    """index: of the winner. fits: of every candidate, None where not measured. best_supported: the one that it was
    held against. trivial: F1 of "any text"."""

    index: int
    fits: tuple[Fit | None, ...]
    best_supported: int
    trivial: float


def choose_specific(candidates: Sequence[Judged], texts: JudgedTexts, z: float = 1.0) -> Chosen | None:
    """The winner by the rule above; None if no candidate is measured, or no text is active.

    Args:
        z: errors that a lower bound is below its estimate, and by which recall and F1 may fall short.
    """
    if not texts.active.any():
        return None
    total, present = float(texts.weight.sum()), float(texts.weight[texts.active].sum())
    trivial = 2 * present / (total + present)
    fits = [_fit(candidate.probability, texts, trivial) for candidate in candidates]
    measured = [(index, fit) for index, fit in enumerate(fits) if fit is not None]
    if not measured:
        return None
    if useful := [(index, fit) for index, fit in measured if fit.f1 > trivial + _TIE]:
        measured = useful
    best_index, best = max(measured, key=lambda pair: (pair[1].lower(z), -pair[0]))
    eligible = [
        (index, fit)
        for index, fit in measured
        if fit.recall >= best.recall - z * best.recall_error - _TIE and fit.f1 >= best.lower(z) - _TIE
    ]
    smallest = min(fit.breadth for _, fit in eligible)
    winner = min(
        (index for index, fit in eligible if fit.breadth <= smallest + _TIE),
        key=lambda index: (candidates[index].length, index),
    )
    return Chosen(winner, tuple(fits), best_index, trivial)


def most_specific(
    probabilities: Sequence[np.ndarray],
    lengths: Sequence[float],
    active: np.ndarray,
    weight: np.ndarray,
    kind: np.ndarray,
) -> int:
    """Index of `choose_specific`'s winner; the first candidate where nothing can be compared."""
    candidates = [Judged(each, length) for each, length in zip(probabilities, lengths, strict=True)]
    chosen = choose_specific(candidates, JudgedTexts(active, weight, kind)) if len(active) else None
    return 0 if chosen is None else chosen.index


def _fit(probability: np.ndarray, texts: JudgedTexts, trivial: float) -> Fit | None:
    """None: a stratum has no verdict."""
    if len(probability) != len(texts.active):
        raise ValueError(f"{len(probability)} verdicts on {len(texts.active)} texts")
    strata = []  # (active, weight of the stratum, mean, variance of the mean)
    for kind in np.unique(texts.kind):
        for active in (True, False):
            inside = (texts.kind == kind) & (texts.active == active)
            if not inside.any():
                continue
            known = inside & np.isfinite(probability)
            if not known.any():
                return None
            share = texts.weight[known] / texts.weight[known].sum()
            mean = float((share * probability[known]).sum())
            strata.append((active, float(texts.weight[inside].sum()), mean, _variance(probability[known], share)))
    total = sum(weight for _, weight, _, _ in strata)
    present = sum(weight for active, weight, _, _ in strata if active)
    hit = sum(weight * mean for active, weight, mean, _ in strata if active)
    claimed = sum(weight * mean for _, weight, mean, _ in strata)
    f1 = 2 * hit / (claimed + present)
    # d F1 / d mean of a stratum = weight * (2 [active] - F1) / (claimed + present); strata are independent.
    f1_variance = sum((weight * (2 * active - f1)) ** 2 * variance for active, weight, _, variance in strata)
    recall_variance = sum((weight / present) ** 2 * variance for active, weight, _, variance in strata if active)
    room = 1 - trivial
    advantage = float(np.clip((f1 - trivial) / room, 0, 1)) if room > _TIE else 0.0
    if advantage < _TIE:
        advantage = 0.0
    return Fit(
        f1, f1_variance**0.5 / (claimed + present), hit / present, recall_variance**0.5, claimed / total, advantage
    )


def _variance(probability: np.ndarray, share: np.ndarray) -> float:
    """Of a stratum's weighted mean. Verdicts that all agree are not certain: half a verdict in n + 1 may differ."""
    n = 1 / float((share**2).sum())  # effective number
    floor = (0.5 / (n + 1)) ** 2
    if len(probability) < 2:
        return 0.25
    centre = float((share * probability).sum())
    spread = float((share * (probability - centre) ** 2).sum()) * len(probability) / (len(probability) - 1)
    return max(spread / n, floor)


@dataclass(frozen=True)
class Kept:
    """An explanation that a latent has chosen, and its F1."""

    latent: int
    explanation: str
    f1: float


@dataclass(frozen=True)
class Pair:
    """Two latents: cosine of their decoder rows, and the share of contexts with either in which both fire (Jaccard).
    NaN: unknown."""

    first: int
    second: int
    cosine: float
    cofiring: float


@dataclass(frozen=True)
class Lost:
    """A latent whose explanation a close one fits better. It should be explained anew, in contrast to `holder`."""

    latent: int
    holder: int
    cosine: float
    cofiring: float


def normalised(explanation: str) -> str:
    """Case, punctuation and spacing make no other explanation."""
    return " ".join(re.findall(r"\w+", explanation.casefold()))


def without_shared(
    kept: Sequence[Kept],
    pairs: Sequence[Pair],
    cosine_limit: float = 0.6,
    cofiring_limit: float = 0.5,
    alike: Callable[[str, str], bool] | None = None,
) -> list[Lost]:
    """Latents that lose their credit, because a close latent with a higher F1 keeps the same explanation.

    Close: cosine >= cosine_limit or cofiring >= cofiring_limit. Latents are settled in order of F1, the lower id first
    among equals; one that has lost its explanation does not take it from another.

    Args:
        alike: whether two explanations say the same; None compares them by `normalised`.
    """
    same = alike or (lambda a, b: normalised(a) == normalised(b))
    close: dict[int, list[tuple[int, Pair]]] = {}
    for pair in pairs:
        if pair.first != pair.second and (pair.cosine >= cosine_limit or pair.cofiring >= cofiring_limit):
            close.setdefault(pair.first, []).append((pair.second, pair))
            close.setdefault(pair.second, []).append((pair.first, pair))
    holders: dict[int, str] = {}
    lost = []
    for own in sorted(kept, key=lambda k: (-k.f1, k.latent)):
        rivals = [
            (other, pair)
            for other, pair in close.get(own.latent, [])
            if other in holders and same(holders[other], own.explanation)
        ]
        if rivals:
            holder, pair = min(rivals, key=lambda rival: rival[0])
            lost.append(Lost(own.latent, holder, pair.cosine, pair.cofiring))
        else:
            holders[own.latent] = own.explanation
    return lost
