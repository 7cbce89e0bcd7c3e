"""Detection: does the judge, given the explanation, tell texts that the latent fires on from texts that it does not?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_ray.evidence.examples import for_scorer
from sae_ray.evidence.types import Contexts
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob
from sae_ray.judge.scorers.sampling import spread
from sae_ray.judge.scorers.verdicts import Trial, is_positive, separate

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig


class Detection:
    """Soft AUROC of the verdicts on active texts against near misses, siblings' and random texts.

    In the mode that calibrated best. `extra` has the AUROC against each kind of negative, the F1 at the natural prior
    and the balanced accuracy at the calibrated threshold (both need a calibration), the score minus its shuffled null
    with its paired error, and how many looks were taken (see `stopping`).
    """

    name: ClassVar[str] = "detection"
    needs: ClassVar[tuple[str, ...]] = ("judge",)
    mode: ClassVar[str | None] = None

    async def score(
        self, jobs: Sequence[ScoreJob], contexts: Contexts, tools: Instruments, cfg: JudgingConfig, seed: int
    ) -> list[Score]:
        trials = []
        for job in jobs:
            rng = np.random.default_rng([seed, job.latent.latent])
            examples = spread(for_scorer(job.latent, cfg.positives, cfg.negatives, seed), rng)
            trials.append(
                [Trial(contexts.text(e.context), is_positive(e), e.context, e.stratum, e.weight) for e in examples]
            )
        return await separate(self.name, jobs, trials, tools, cfg, self.mode)


class DetectionByLikelihood(Detection):
    """Detection in the likelihood mode, whichever calibrated best."""

    name: ClassVar[str] = "detection_likelihood"
    mode: ClassVar[str | None] = "likelihood"


class DetectionByYesNo(Detection):
    """Detection in the yes/no mode, whichever calibrated best."""

    name: ClassVar[str] = "detection_yes_no"
    mode: ClassVar[str | None] = "yes_no"
