"""Embedding: is the explanation nearer to the texts that the latent fires on than to those it does not?

The cheapest of all scorers, one small forward pass per text and none per pair. It agrees with humans less than
detection does (2507.08473), and sees topics rather than words; use it to rank many candidates, or as a second opinion.
Reference: Paulo et al., 2410.13928.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_ray.evidence.examples import for_scorer
from sae_ray.evidence.types import Contexts, Example
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob
from sae_ray.judge.scorers.verdicts import NAN, OWN, SHUFFLED, auroc_of, is_positive, row, wins

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig


class Embedding:
    """value: AUROC of cosine(explanation, text), active texts against inactive ones. Verdicts have no probability."""

    name: ClassVar[str] = "embedding"
    needs: ClassVar[tuple[str, ...]] = ("embedder",)

    async def score(
        self, jobs: Sequence[ScoreJob], contexts: Contexts, tools: Instruments, cfg: JudgingConfig, seed: int
    ) -> list[Score]:
        assert tools.embedder is not None
        examples = [for_scorer(job.latent, cfg.positives, cfg.negatives, seed) for job in jobs]
        texts = {example.context: contexts.text(example.context) for some in examples for example in some}
        phrases = [job.explanation.text for job in jobs] + [job.shuffled.text for job in jobs if job.shuffled]
        wanted = list(dict.fromkeys([*texts.values(), *phrases]))
        if not wanted:
            return []
        vectors_ND = await tools.embedder.embed(wanted)
        row_of = {text: row for row, text in enumerate(wanted)}

        def cosines(phrase: str, some: list[Example]) -> list[float]:
            vectors_nD = vectors_ND[[row_of[texts[example.context]] for example in some]]
            return [float(each) for each in vectors_nD @ vectors_ND[row_of[phrase]]]

        return [
            separation(
                self.name,
                job,
                some,
                cosines(job.explanation.text, some),
                cosines(job.shuffled.text, some) if job.shuffled else None,
            )
            for job, some in zip(jobs, examples, strict=True)
        ]


def separation(
    scorer: str, job: ScoreJob, examples: Sequence[Example], own: Sequence[float], shuffled: Sequence[float] | None
) -> Score:
    """How well one number per text tells active texts from inactive ones: AUROC, and the null on the same texts.

    Args:
        own, shuffled: higher means that the text is more as the explanation says; NaN is missing, and left out of both.
    """
    null = [NAN] * len(examples) if shuffled is None else shuffled
    rows = [
        row(example, purpose, float(value), None)
        for purpose, values in ((OWN, own), (SHUFFLED, null))
        for example, value in zip(examples, values, strict=True)
        if np.isfinite(value)
    ]
    known = [
        index
        for index, (value, other) in enumerate(zip(own, null, strict=True))
        if np.isfinite(value) and (shuffled is None or np.isfinite(other))
    ]
    pos = [index for index in known if is_positive(examples[index])]
    neg = [index for index in known if not is_positive(examples[index])]
    found = auroc_of([own[i] for i in pos], [own[i] for i in neg])
    extra = {"missing": float(len(examples) - len(known))}
    shuffled_value = NAN
    if shuffled is not None:
        other = auroc_of([null[i] for i in pos], [null[i] for i in neg])
        shuffled_value = other.value
        extra |= {"shuffled_stderr": other.stderr}
        extra["above_shuffled"], extra["above_shuffled_stderr"] = _difference(own, null, pos, neg)
    return Score(
        scorer, job.latent.latent, found.value, found.low, found.high, found.stderr, shuffled_value, 0.5, found.n,
        tuple(rows), extra,
    )  # fmt: skip


def _difference(
    own: Sequence[float], null: Sequence[float], pos: Sequence[int], neg: Sequence[int]
) -> tuple[float, float]:
    """(AUROC minus the null's, DeLong's paired standard error): both are of the same texts."""
    if len(pos) < 2 or len(neg) < 2:
        return NAN, NAN
    at = dict(enumerate(own)), dict(enumerate(null))
    wins_PN = wins(at[0], pos, neg) - wins(at[1], pos, neg)
    variance = sum(float(wins_PN.mean(axis=axis).var(ddof=1)) / wins_PN.shape[1 - axis] for axis in (0, 1))
    return float(wins_PN.mean()), variance**0.5
