"""Which explanation a latent gets: candidates compete on texts that are not scored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sae_ray.evidence.examples import for_scorer
from sae_ray.evidence.types import Contexts, Example, LatentEvidence, side_of
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.scorers.base import Verdicts
from sae_ray.judge.scores import soft_f1
from sae_ray.reward.specificity import Judged, JudgedTexts, choose_specific, far_ratio


@dataclass(frozen=True)
class Chosen:
    """The winner, and every candidate with its F1 at the natural prior (NaN where nothing was asked)."""

    explanation: Explanation
    candidates: list[tuple[Explanation, float]]
    rows: list[dict[str, Any]]  # the verdicts that decided


def halves(latent: LatentEvidence, contexts: Contexts) -> tuple[LatentEvidence, LatentEvidence]:
    """The latent with only the texts that choose its explanation (7 of 16), and with only those that score it."""
    chooses = [chooses_explanation(contexts.tokens[example.context]) for example in latent.score]
    select = tuple(e for e, first in zip(latent.score, chooses, strict=True) if first)
    score = tuple(e for e, first in zip(latent.score, chooses, strict=True) if not first)
    return replace(latent, score=select), replace(latent, score=score)


def chooses_explanation(tokens_S: np.ndarray) -> bool:
    """Whether a text of the score side is among those that choose explanations, and so scores none."""
    # A salt makes this hash independent of the one that keeps explainers and scorers apart.
    salted_S = np.concatenate([np.array([-7], dtype=np.int32), tokens_S.astype(np.int32)])
    return side_of(salted_S) == "explain" or side_of(salted_S[::-1]) == "explain"


async def choose(
    latents: Sequence[LatentEvidence],
    candidates: Sequence[Sequence[Explanation]],
    contexts: Contexts,
    judge: Verdicts,
    probability: Callable[[float], float],
    n: int,
) -> list[Chosen | None]:
    """The most specific candidate for each latent (`reward.specificity`); None where there is none.

    Args:
        latents: with the texts that choose only (`halves`).
        probability: P(the explanation holds) of a verdict.
        n: texts per class.
    """
    examples = [for_scorer(latent, n, n) for latent in latents]
    asked = [
        (contexts.text(example.context), candidate.text)
        for some, offered in zip(examples, candidates, strict=True)
        if len(offered) > 1
        for example in some
        for candidate in offered
    ]
    answers = await _ask(judge, asked)
    told = [
        [_told(some, candidate, contexts, answers, probability) for candidate in offered] if len(offered) > 1 else []
        for some, offered in zip(examples, candidates, strict=True)
    ]
    texts = [_texts(some) for some in examples]
    ratio = far_ratio(zip(told, texts, strict=True))
    return [
        _choice(latent.latent, some, list(offered), contexts, answers, each, judged, ratio)
        for latent, some, offered, each, judged in zip(latents, examples, candidates, told, texts, strict=True)
    ]


def _texts(examples: Sequence[Example]) -> JudgedTexts:
    return JudgedTexts(
        np.array([example.active for example in examples], dtype=bool),
        np.array([example.weight for example in examples]),
        np.array([example.stratum for example in examples]),
    )


def _told(
    examples: Sequence[Example],
    candidate: Explanation,
    contexts: Contexts,
    answers: dict[tuple[str, str], float | None],
    probability: Callable[[float], float],
) -> np.ndarray:
    """float64 [V]: P(the explanation holds) of each text; NaN where the answer is missing."""
    values = [answers[contexts.text(example.context), candidate.text] for example in examples]
    return np.array([np.nan if value is None else probability(value) for value in values])


async def _ask(judge: Verdicts, asked: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float | None]:
    """Text by text, so that calls on one text stand together and share its KV."""
    order = sorted(set(asked))
    return dict(zip(order, await judge.score(order), strict=True)) if order else {}


def _choice(
    latent: int,
    examples: Sequence[Example],
    offered: list[Explanation],
    contexts: Contexts,
    answers: dict[tuple[str, str], float | None],
    probabilities: list[np.ndarray],
    texts: JudgedTexts,
    ratio: float | None,
) -> Chosen | None:
    if not offered:
        return None
    active, weight = texts.active, texts.weight
    if len(offered) == 1 or not active.any() or active.all():
        return Chosen(offered[0], [(each, float("nan")) for each in offered], [])
    rows: list[dict[str, Any]] = []
    for candidate, probability_N in zip(offered, probabilities, strict=True):
        for example, probability in zip(examples, probability_N.tolist(), strict=True):
            raw = answers[contexts.text(example.context), candidate.text]
            rows.append(
                {
                    "latent": latent, "explanation": candidate.text, "context": example.context,
                    "stratum": example.stratum, "weight": example.weight, "purpose": "select",
                    "raw": raw, "probability": None if raw is None else probability,
                }
            )  # fmt: skip
    rivals = [Judged(each, len(candidate.text.split())) for each, candidate in zip(probabilities, offered, strict=True)]
    chosen = choose_specific(rivals, texts, ratio)
    winner = 0 if chosen is None else chosen.index
    scores = []
    for told_N in probabilities:
        known = np.isfinite(told_N)
        scores.append(soft_f1(told_N[known], active[known], weight[known]) if known.any() else float("nan"))
    return Chosen(offered[winner], list(zip(offered, scores, strict=True)), rows)
