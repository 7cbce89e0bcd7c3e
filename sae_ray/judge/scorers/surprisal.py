"""Surprisal: does knowing the explanation make the latent's texts less surprising to the subject model itself?

No judge is asked. Per text, the gain is the loss without the explanation minus the loss with it; a good explanation
gains more on texts that the latent fires on than on others. That a phrase helps any text is taken out by the
comparison, that it helps this corpus by the shuffled null. Reference: Paulo et al., 2410.13928.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from sae_ray.evidence.examples import for_scorer
from sae_ray.evidence.types import Contexts
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob
from sae_ray.judge.scorers.embedding import separation

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

# Without an explanation the text still stands behind a label, so that only the explanation differs.
NO_EXPLANATION = "Text:\n"


def prefix_of(explanation: str) -> str:
    """What a text stands behind when it is explained."""
    return f"Topic: {' '.join(explanation.split()).rstrip('.')}\n{NO_EXPLANATION}"


class Surprisal:
    """value: AUROC of the gain (nats per token), active texts against inactive ones.

    Cost: per latent and text two forward passes of the whole subject model (explanation and null), and one per text
    that all latents share.
    """

    name: ClassVar[str] = "surprisal"
    needs: ClassVar[tuple[str, ...]] = ("subject",)

    async def score(
        self, jobs: Sequence[ScoreJob], contexts: Contexts, tools: Instruments, cfg: JudgingConfig, seed: int
    ) -> list[Score]:
        assert tools.subject is not None
        examples = [for_scorer(job.latent, cfg.positives, cfg.negatives, seed) for job in jobs]
        texts = {example.context: contexts.text(example.context) for some in examples for example in some}
        prefixes = [
            (prefix_of(job.explanation.text), prefix_of(job.shuffled.text) if job.shuffled else None) for job in jobs
        ]
        wanted: dict[tuple[str, str], None] = {}
        for some, (own, shuffled) in zip(examples, prefixes, strict=True):
            for example in some:
                text = texts[example.context]
                wanted |= {(prefix, text): None for prefix in (NO_EXPLANATION, own, shuffled) if prefix is not None}
        losses = await tools.subject.losses([prefix for prefix, _ in wanted], [text for _, text in wanted])
        loss = dict(zip(wanted, losses, strict=True))

        def gains(prefix: str, index: int) -> list[float]:
            of_texts = [texts[example.context] for example in examples[index]]
            return [loss[NO_EXPLANATION, text] - loss[prefix, text] for text in of_texts]

        return [
            separation(
                self.name,
                job,
                examples[index],
                gains(own, index),
                gains(shuffled, index) if shuffled is not None else None,
            )
            for index, (job, (own, shuffled)) in enumerate(zip(jobs, prefixes, strict=True))
        ]
