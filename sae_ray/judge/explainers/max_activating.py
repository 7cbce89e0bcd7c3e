"""Explains a latent by what the tokens that it fires on have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sae_ray.evidence.types import Contexts, LatentEvidence
from sae_ray.judge.explainers.asking import Question, explain_each
from sae_ray.judge.explainers.base import Explanation, Writer
from sae_ray.judge.explainers.showing import Excerpts, shown_positives
from sae_ray.judge.explainers.solved import EXCEPTIONS, MUSIC

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

_SOLVED = (
    (Excerpts(MUSIC, 10.0), "musical instruments"),
    (Excerpts(EXCEPTIONS, 10.0), "names of exceptions"),
)


class MaxActivating:
    """Strong and weaker activating texts, marked as `judging.marks` says."""

    name: ClassVar[str] = "max_activating"

    async def explain(
        self, latents: list[LatentEvidence], contexts: Contexts, writer: Writer, cfg: JudgingConfig, seed: int
    ) -> tuple[list[list[Explanation]], int]:
        questions = [what_is_common(latent, contexts, cfg) for latent in latents]
        return await explain_each(questions, self.name, writer, cfg, seed)


def what_is_common(latent: LatentEvidence, contexts: Contexts, cfg: JudgingConfig) -> Question | None:
    """None when there is nothing to show."""
    texts = shown_positives(latent, contexts, cfg.shown)
    if not texts:
        return None
    return Question(
        Excerpts(texts, latent.max_activation),
        cfg.marks,
        task="Name what the marked words in the texts have in common, in a few words.",
        solved=_SOLVED,
        situation="One unit of a language model is active on some tokens of these excerpts.",
        wanted="Name the most specific thing that the active tokens, or what stands around them, have in common.",
    )
