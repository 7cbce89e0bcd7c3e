"""What a lenient judge would have said anyway, taken out of soft detection. Pure numpy.

A judge that says yes to anything of the right sort ("it is about Python, so is the explanation") gives latents of some
sorts high scores for nothing. How lenient it is to *these* texts shows in what it says to the same texts with an
explanation that is wrong: another latent's. Of one of the same sort, where there is one (`sibling_shuffle`): a wrong
explanation from far away would be refused even by a lenient judge, and its leniency would stay hidden.

With yes-rate y to the own explanation and l to wrong ones, the share of texts that truly show it is (y - l) / (1 - l):
Rogan & Gladen's estimator (Am. J. Epidemiology 107, 1978) for a test whose misses were not measured. Done for
positives and for negatives apart, because leniency differs between them; an explanation that is itself too broad keeps
its penalty, because wrong explanations do not share its yes to the negatives.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sae_ray.judge.scores import shuffled_explanations

# A judge that says yes to more than this share of wrong explanations has nothing left to be corrected.
_MOST_LENIENT = 0.9


@dataclass(frozen=True)
class Detection:
    """Soft detection: (P(yes | positive) + 1 - P(yes | negative)) / 2, in [0, 1] with chance at 1/2.

    `raw` as the judge said it, `corrected` without its leniency; NaN where that cannot be told. stderr, low, high: of
    `corrected`, 95%. lenient_positive, lenient_negative: yes-rates to wrong explanations. `corrected` may leave [0, 1]
    by chance: cutting it there would bias a mean over latents.
    """

    raw: float
    raw_stderr: float
    corrected: float
    stderr: float
    low: float
    high: float
    lenient_positive: float
    lenient_negative: float


def detection(
    own_positives: Sequence[float],
    own_negatives: Sequence[float],
    shuffled_positives: Sequence[float],
    shuffled_negatives: Sequence[float],
    level: float = 0.95,
) -> Detection:
    """Raw and corrected soft detection of one latent.

    Args: probabilities in [0, 1] that the text shows the explanation (`Calibration.probability`), of the own
        explanation and of wrong ones, on the latent's positive and negative texts. Leave missing ones out; several
        wrong explanations per text are welcome.
    Raises:
        ValueError: one of the four is empty or holds something that is no probability.
    """
    yes_pos, yes_neg = _rate(own_positives, "own_positives"), _rate(own_negatives, "own_negatives")
    wrong_pos, wrong_neg = (
        _rate(shuffled_positives, "shuffled_positives"),
        _rate(shuffled_negatives, "shuffled_negatives"),
    )
    raw = (yes_pos[0] + 1 - yes_neg[0]) / 2
    raw_stderr = math.sqrt(yes_pos[1] + yes_neg[1]) / 2
    true_pos, true_neg = _without_leniency(yes_pos, wrong_pos), _without_leniency(yes_neg, wrong_neg)
    corrected = (true_pos[0] + 1 - true_neg[0]) / 2
    stderr = math.sqrt(true_pos[1] + true_neg[1]) / 2
    width = NormalDist().inv_cdf((1 + level) / 2) * stderr
    return Detection(
        raw, raw_stderr, corrected, stderr, corrected - width, corrected + width, wrong_pos[0], wrong_neg[0]
    )


def sibling_shuffle(explanations: Sequence[str], sorts: Sequence[Hashable], seed: int) -> list[str]:
    """Each latent gets the explanation of another of its sort; one alone of its sort gets any other's.

    Args:
        sorts: per latent what it is a sibling by, e.g. a cluster of decoder directions.
    Raises:
        ValueError: fewer than two explanations.
    """
    dealt = shuffled_explanations(explanations, seed)
    groups: dict[Hashable, list[int]] = {}
    for index, sort in enumerate(sorts):
        groups.setdefault(sort, []).append(index)
    for number, members in enumerate(groups.values()):
        if len({explanations[i] for i in members}) > 1:
            within = shuffled_explanations([explanations[i] for i in members], seed + number)
            for index, explanation in zip(members, within, strict=True):
                dealt[index] = explanation
    return dealt


def _rate(values: Sequence[float], name: str) -> tuple[float, float]:
    """(mean, variance of the mean); one value alone has the variance of a coin."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name}: probabilities in [0, 1] are needed, at least one; leave missing verdicts out")
    return float(array.mean()), float(array.var(ddof=1) / len(array)) if len(array) > 1 else 0.25


def _without_leniency(yes: tuple[float, float], lenient: tuple[float, float]) -> tuple[float, float]:
    """(share that truly shows it, its variance by the delta method)."""
    if lenient[0] > _MOST_LENIENT:
        return math.nan, math.nan
    honest = 1 - lenient[0]
    share = (yes[0] - lenient[0]) / honest
    return share, yes[1] / honest**2 + lenient[1] * (1 - yes[0]) ** 2 / honest**4
