"""One judging round: explanations compete on one half of a latent's texts and are scored on the other.

Nothing here knows Ray or vLLM: a round takes plans (`reward.evidence`), the texts behind their context ids
and a `Judge`, and returns bank rows and rewards. The desk runs it during training, the evaluator on held-out
texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sae_ray.judge.scores import auroc, shuffled_explanations
from sae_ray.reward.composition import LatentReward
from sae_ray.reward.evidence import POSITIVE, LatentPlan, PlannedVerdict
from sae_ray.reward.specificity import Fit, Judged, JudgedTexts, choose_specific, far_ratio


@dataclass(frozen=True)
class Candidate:
    text: str
    explainer: str  # llm | lexical


class Judge(Protocol):
    """What a round needs of the judge pool."""

    async def score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        """Raw verdicts of (text, explanation) pairs; None is missing."""
        ...

    async def explain(self, plan: LatentPlan) -> list[Candidate]:
        """Candidate explanations from the plan's explainer examples; may be empty."""
        ...

    def probability(self, explanation: str, raw: float) -> float:
        """Calibrated P(the explanation holds), comparable between explanations."""
        ...


@dataclass(frozen=True)
class Choice:
    """A latent's explanation. offered, fits: all that competed, this one among them, and how well each fits (None: not
    measured); empty where nothing competed."""

    plan: LatentPlan
    explanation: Candidate
    offered: tuple[Candidate, ...] = ()
    fits: tuple[Fit | None, ...] = ()


@dataclass(frozen=True)
class Detection:
    """How well the verdicts on an explanation tell a latent's active texts from the others."""

    auroc: float
    standard_error: float
    low: float
    high: float
    shuffled: float  # AUROC of another latent's explanation on the same texts
    n_verdicts: int


async def compete(
    plans: list[LatentPlan],
    previous: Mapping[int, Candidate],
    texts: Mapping[int, str],
    judge: Judge,
    make_row: Callable[..., dict[str, Any]],
) -> tuple[list[Choice], list[dict[str, Any]]]:
    """Explains every plan's latent and keeps the most specific candidate that holds its recall (`specificity`).

    Args:
        previous: the explanation that a latent already has; it competes too.
    Returns:
        One choice per latent that has any explanation, and the bank rows of the verdicts that decided.
    """
    offered = await asyncio.gather(*(judge.explain(plan) for plan in plans))
    jobs: list[tuple[LatentPlan, list[Candidate]]] = []
    for plan, candidates in zip(plans, offered, strict=True):
        known = [previous[plan.latent]] if plan.latent in previous else []
        distinct = {candidate.text: candidate for candidate in [*candidates, *known]}
        if distinct:
            jobs.append((plan, list(distinct.values())))
    asked = [
        (plan, candidate, verdict)
        for plan, candidates in jobs
        for candidate in candidates
        for verdict in plan.verdicts
        if verdict.select
    ]
    raw = await judge.score([(texts[verdict.context], candidate.text) for _, candidate, verdict in asked])
    by_candidate: dict[tuple[int, str], list[tuple[PlannedVerdict, float | None]]] = {}
    for (plan, candidate, verdict), value in zip(asked, raw, strict=True):
        by_candidate.setdefault((plan.latent, candidate.text), []).append((verdict, value))

    competing = []
    for plan, candidates in jobs:
        judged = [by_candidate.get((plan.latent, candidate.text), []) for candidate in candidates]
        probabilities = [
            np.array([np.nan if value is None else judge.probability(candidate.text, value) for _, value in verdicts])
            for candidate, verdicts in zip(candidates, judged, strict=True)
        ]
        texts_judged = JudgedTexts(
            np.array([verdict.kind == POSITIVE for verdict, _ in judged[0]], dtype=bool),
            np.array([verdict.weight for verdict, _ in judged[0]]),
            np.array([verdict.kind for verdict, _ in judged[0]]),
        )
        competing.append((plan, candidates, judged, probabilities, texts_judged))
    ratio = far_ratio((probabilities, texts_judged) for *_, probabilities, texts_judged in competing)

    choices, rows = [], []
    for plan, candidates, judged, probabilities, texts_judged in competing:
        words = [len(candidate.text.split()) for candidate in candidates]
        rivals = [Judged(each, length) for each, length in zip(probabilities, words, strict=True)]
        chosen = choose_specific(rivals, texts_judged, ratio)
        # The first candidate where nothing can be compared.
        winner, fits = (0, (None,) * len(candidates)) if chosen is None else (chosen.index, chosen.fits)
        choices.append(Choice(plan, candidates[winner], tuple(candidates), fits))
        for index, (candidate, verdicts) in enumerate(zip(candidates, judged, strict=True)):
            for verdict, value in verdicts:
                rows.append(make_row(plan, candidate, verdict, value, chosen=index == winner, purpose="select"))
    return choices, rows


async def detect(
    choices: list[Choice],
    texts: Mapping[int, str],
    judge: Judge,
    make_row: Callable[..., dict[str, Any]],
    rng: np.random.Generator,
    *,
    null: bool = True,
) -> tuple[list[Detection], list[dict[str, Any]]]:
    """Scores each chosen explanation, and as its null another latent's, on texts that did not choose it.

    Args:
        null: whether the null is asked as well, which doubles the questions; else it is missing (NaN).
    """
    others: list[str] = []
    if null and len(choices) > 1:
        others = shuffled_explanations([choice.explanation.text for choice in choices], int(rng.integers(2**31)))
    asked: list[tuple[int, Candidate, PlannedVerdict, str]] = []
    for index, choice in enumerate(choices):
        for verdict in choice.plan.verdicts:
            if not verdict.select:
                asked.append((index, choice.explanation, verdict, "score"))
                if others:
                    asked.append((index, Candidate(others[index], "shuffled"), verdict, "shuffled"))
    raw = await judge.score([(texts[verdict.context], candidate.text) for _, candidate, verdict, _ in asked])
    rows: list[dict[str, Any]] = []
    sides: dict[tuple[int, str], list[tuple[bool, float]]] = {}
    for (index, candidate, verdict, purpose), value in zip(asked, raw, strict=True):
        plan = choices[index].plan
        rows.append(make_row(plan, candidate, verdict, value, chosen=purpose == "score", purpose=purpose))
        if value is not None:
            sides.setdefault((index, purpose), []).append((verdict.kind == POSITIVE, value))
    found = []
    for index in range(len(choices)):
        own = sides.get((index, "score"), [])
        value, error, low, high = _auroc(own)
        shuffled = _auroc(sides.get((index, "shuffled"), []))[0]
        found.append(Detection(value, error, low, high, shuffled, len(own)))
    return found, rows


def rewards_of(choices: list[Choice], detections: list[Detection]) -> list[LatentReward]:
    """Rewards of the latents whose detection could be measured. Where their null was not, it is chance (0.5)."""
    rewards = []
    for choice, found in zip(choices, detections, strict=True):
        if np.isfinite(found.auroc):
            shuffled = found.shuffled if np.isfinite(found.shuffled) else 0.5
            rewards.append(
                LatentReward(
                    choice.plan.latent, choice.explanation.text, choice.explanation.explainer, found.auroc,
                    found.standard_error, shuffled, found.auroc - shuffled, found.n_verdicts,
                )
            )  # fmt: skip
    return rewards


def _auroc(sides: list[tuple[bool, float]]) -> tuple[float, float, float, float]:
    """(AUROC, standard error, low, high); NaN where one side has no verdict.

    Perfect separation has a DeLong error of 0; the interval's lower half says how far to believe it.
    """
    positives = [score for active, score in sides if active]
    negatives = [score for active, score in sides if not active]
    if not positives or not negatives:
        return float("nan"), float("nan"), float("nan"), float("nan")
    estimate = auroc(positives, negatives)
    error = max(estimate.stderr, (estimate.value - estimate.low) / 1.96)
    return estimate.value, error, estimate.low, estimate.high
