"""What a scorer is: an explanation and a latent's scoring examples in, a score with its nulls and interval out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from sae_ray.evidence.types import Contexts, LatentEvidence
from sae_ray.judge.explainers.base import Explanation, Writer

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig


@dataclass(frozen=True)
class ScoreJob:
    """shuffled: another latent's explanation, the null; None where there is only one latent."""

    latent: LatentEvidence
    explanation: Explanation
    shuffled: Explanation | None


@dataclass(frozen=True)
class Score:
    """value: soft, higher is better; `chance` is what an explanation that says nothing gets. low, high: 95% interval.
    shuffled: the same measured with another latent's explanation. Missing is NaN, never 0. n: verdicts it rests on.
    verdicts: one dict per verdict (context, stratum, weight, purpose "score"|"shuffled", raw, probability), for the
    Parquet file. extra: further numbers of this scorer, e.g. {"spearman": .4}."""

    scorer: str
    latent: int
    value: float
    low: float
    high: float
    stderr: float
    shuffled: float
    chance: float
    n: int
    verdicts: tuple[dict[str, Any], ...] = ()
    extra: Mapping[str, float] = field(default_factory=dict)


class Verdicts(Writer, Protocol):
    """The judge that scores: verdicts by likelihood or yes/no, calibrated."""

    async def score(
        self, pairs: Sequence[tuple[str, str]], mode: str | None = ..., use_cache: bool = ...
    ) -> list[float | None]:
        """Raw verdicts of (text, explanation) pairs, in order; None is missing."""
        ...


class Embedder(Protocol):
    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d], float32."""
        ...


class Subject(Protocol):
    """The subject language model and the SAE (or whatever is judged) on it."""

    async def activations(self, texts: Sequence[str], latents: Sequence[int]) -> list[np.ndarray]:
        """Per text the activations [tokens, len(latents)], float32; texts are cut at the context length."""
        ...

    async def losses(self, prefixes: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Mean next-token loss (nats) of each text after its prefix."""
        ...


@dataclass(frozen=True)
class Instruments:
    """Who may be asked. A scorer says in `needs` which of these must be there."""

    judge: Verdicts | None = None
    embedder: Embedder | None = None
    subject: Subject | None = None
    calibration: Any = None  # judge.calibration.Calibration


class Scorer(Protocol):
    """One way to score. Sees `evidence.score` only."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # of "judge", "embedder", "subject"

    async def score(
        self, jobs: Sequence[ScoreJob], contexts: Contexts, tools: Instruments, cfg: JudgingConfig, seed: int
    ) -> list[Score]:
        """One score per job, in order."""
        ...
