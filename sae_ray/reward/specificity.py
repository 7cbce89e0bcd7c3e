"""Which candidate explains a latent: the most specific one that keeps its recall, by F1 at the natural prior.

Every candidate is judged on the same texts: active ones and sibling, near-miss and random negatives, each standing for
`weight` contexts of the corpus. With p the verdict probability and sums over texts, weighted,

    hit = sum p over active texts,  claimed = sum p,  present = weight of the active texts
    F1 = 2 hit / (claimed + present),  recall = hit / present,  breadth = claimed / total weight

A missing verdict is replaced by the mean of the known ones of its stratum, so that candidates stay comparable; a
candidate without any verdict in some stratum is not measured. Errors are those of stratified sampling, linearised.

Random texts stand for nearly the whole corpus, and few are judged: a single wrong verdict on one of them weighs as
much as all active texts together. What the candidates of many latents tell is that one which does not hold on near
misses and siblings hardly holds on random texts. So with R the random texts' mean verdict over the near ones', of all
candidates that are judged together (`far_ratio`), and n random texts,

    mean of the random stratum = (n own mean + BORROWED R own mean on near texts) / (n + BORROWED)

In the synthetic research world (32 texts, 10% of the verdicts flipped, 4 candidates) the parent is chosen in a child's
place for 11% of the latents; without this for 29%, by the highest *lower bound* of F1 for 32%: that bound is the lower
the less a candidate claims, and so asks for broad ones (docs/credit.md).

The rule
1. A candidate whose F1 is not above that of an explanation that is true of every text (`trivial`, F1 of the prior) is
   dropped while any other is left.
2. The highest F1 wins; among equals the smaller breadth, then the shorter one, then the first.

So of two candidates of equal recall the broader one never wins: it has the lower F1. And where a judge says yes to
everything, all candidates are equal and nobody's `advantage` is above 0. Why it matters: RESEARCH.md section 1, the
collapse under random negatives.

Two latents that lie close may not both keep one explanation: `without_shared` says who of a round's latents loses it,
and `reward.sharing` takes the loser's credit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_TIE = 1e-9
BORROWED = 64.0  # random texts that the ratio counts as
NEAR, FAR = ("near_miss", "sibling"), "random"  # kinds of texts


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


@dataclass(frozen=True)
class Chosen:
    """index: of the winner. fits: of every candidate, None where not measured. trivial: F1 of "any text"."""

    index: int
    fits: tuple[Fit | None, ...]
    trivial: float


def far_ratio(judged: Iterable[tuple[Sequence[np.ndarray], JudgedTexts]]) -> float | None:
    """R, at most 1, of the candidates' probabilities [V] on each latent's texts; None where it cannot be told."""
    near, far = [], []
    for probabilities, texts in judged:
        is_near, is_far = np.isin(texts.kind, NEAR) & ~texts.active, (texts.kind == FAR) & ~texts.active
        for probability in probabilities:
            known = np.isfinite(probability)
            if (known & is_near).any() and (known & is_far).any():
                near.append(float(probability[known & is_near].mean()))
                far.append(float(probability[known & is_far].mean()))
    return min(1.0, sum(far) / sum(near)) if sum(near) > 0 else None


def choose_specific(candidates: Sequence[Judged], texts: JudgedTexts, ratio: float | None = None) -> Chosen | None:
    """The winner by the rule above; None if no candidate is measured, or no text is active.

    Args:
        ratio: `far_ratio` of these and other latents' candidates; None: random texts speak for themselves.
    """
    if not texts.active.any():
        return None
    total, present = float(texts.weight.sum()), float(texts.weight[texts.active].sum())
    trivial = 2 * present / (total + present)
    fits = [_fit(candidate.probability, texts, trivial, ratio) for candidate in candidates]
    measured = [(index, fit) for index, fit in enumerate(fits) if fit is not None]
    if not measured:
        return None
    if useful := [(index, fit) for index, fit in measured if fit.f1 > trivial + _TIE]:
        measured = useful
    highest = max(fit.f1 for _, fit in measured)
    equal = [(index, fit) for index, fit in measured if fit.f1 >= highest - _TIE]
    smallest = min(fit.breadth for _, fit in equal)
    winner = min(
        (index for index, fit in equal if fit.breadth <= smallest + _TIE),
        key=lambda index: (candidates[index].length, index),
    )
    return Chosen(winner, tuple(fits), trivial)


class _Stratum(NamedTuple):
    """Texts of one kind: their weight in the corpus, what their mean verdict counts for in `claimed` (that weight,
    where nothing is borrowed), mean verdict, its variance, number of verdicts."""

    kind: str
    active: bool
    weight: float
    claims: float
    mean: float
    variance: float
    n: int


def _fit(probability: np.ndarray, texts: JudgedTexts, trivial: float, ratio: float | None) -> Fit | None:
    """None: a stratum has no verdict."""
    strata = _strata(probability, texts)
    if strata is None:
        return None
    if ratio is not None:
        strata = _borrowed(strata, ratio)
    total = sum(each.weight for each in strata)
    present = sum(each.weight for each in strata if each.active)
    hit = sum(each.weight * each.mean for each in strata if each.active)
    claimed = sum(each.claims * each.mean for each in strata)
    f1 = 2 * hit / (claimed + present)
    # d F1 / d mean of a stratum = (2 weight [active] - F1 claims) / (claimed + present); strata are independent.
    f1_variance = sum((2 * each.active * each.weight - f1 * each.claims) ** 2 * each.variance for each in strata)
    recall_variance = sum((each.weight / present) ** 2 * each.variance for each in strata if each.active)
    room = 1 - trivial
    advantage = float(np.clip((f1 - trivial) / room, 0, 1)) if room > _TIE else 0.0
    if advantage < _TIE:
        advantage = 0.0
    return Fit(
        f1, f1_variance**0.5 / (claimed + present), hit / present, recall_variance**0.5, claimed / total, advantage
    )


def _strata(probability: np.ndarray, texts: JudgedTexts) -> list[_Stratum] | None:
    if len(probability) != len(texts.active):
        raise ValueError(f"{len(probability)} verdicts on {len(texts.active)} texts")
    strata = []
    for kind in np.unique(texts.kind):
        for active in (True, False):
            inside = (texts.kind == kind) & (texts.active == active)
            if not inside.any():
                continue
            known = inside & np.isfinite(probability)
            if not known.any():
                return None
            share = texts.weight[known] / texts.weight[known].sum()
            weight, mean = float(texts.weight[inside].sum()), float((share * probability[known]).sum())
            variance = _variance(probability[known], share)
            strata.append(_Stratum(str(kind), active, weight, weight, mean, variance, int(known.sum())))
    return strata


def _borrowed(strata: list[_Stratum], ratio: float) -> list[_Stratum]:
    """What random texts count for is dealt in part to the near ones. It is linear in the means: F1 and its error are
    computed of these strata as of any."""
    n_near = sum(each.n for each in strata if each.kind in NEAR and not each.active)
    far = [each for each in strata if each.kind == FAR and not each.active]
    if not n_near or not far:
        return strata
    lent = far[0].weight * BORROWED / (far[0].n + BORROWED)
    out = []
    for each in strata:
        if each is far[0]:
            each = each._replace(claims=each.claims - lent)
        elif each.kind in NEAR and not each.active:
            each = each._replace(claims=each.claims + lent * ratio * each.n / n_near)
        out.append(each)
    return out


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
