"""Explains a polysemantic latent by its meanings: its texts fall into groups, and each group is explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from sae_ray.evidence.types import Contexts, Example, LatentEvidence
from sae_ray.judge.explainers.asking import ask, distinct
from sae_ray.judge.explainers.base import Explanation, Writer
from sae_ray.judge.explainers.grouping import groups
from sae_ray.judge.explainers.max_activating import what_is_common
from sae_ray.judge.explainers.showing import text_of
from sae_ray.judge.marks import cut

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

# Around the peak: what the latent responds to stands there, and the rest of a context only blurs it.
_NEIGHBOURHOOD = 120


class Clusters:
    """At most `judging.clusters` meanings. A latent in which nothing separates is explained as a whole.

    Otherwise its candidates are those of each cluster (`Explanation.cluster`), and, first, the clusters' candidates of
    the same rank joined ("a; or b"), which are of the whole latent. A cluster that could not be explained leaves the
    latent without the joined ones: they would claim that the rest is all.
    """

    name: ClassVar[str] = "clusters"

    async def explain(
        self, latents: list[LatentEvidence], contexts: Contexts, writer: Writer, cfg: JudgingConfig, seed: int
    ) -> tuple[list[list[Explanation]], int]:
        members = [split(latent, contexts, cfg.clusters, seed) for latent in latents]
        parts = [(i, part) for i, of_latent in enumerate(members) for part in of_latent]
        questions = [what_is_common(part, contexts, cfg) for _, part in parts]
        answers = await ask([each for each in questions if each is not None], writer, cfg, seed)
        replies = iter(answers.phrases)
        phrases: list[list[list[str]]] = [[] for _ in latents]
        for (i, _), question in zip(parts, questions, strict=True):
            phrases[i].append([] if question is None else next(replies))
        return [self._explanations(each, cfg) for each in phrases], answers.failures

    def _explanations(self, phrases: Sequence[Sequence[str]], cfg: JudgingConfig) -> list[Explanation]:
        explainer = f"{self.name}/{cfg.marks}"
        if len(phrases) == 1:
            return [Explanation(phrase, explainer) for phrase in phrases[0]]
        # One rank's candidates may be the same phrase: then it is one meaning after all.
        joined = distinct(["; or ".join(distinct(rank)) for rank in zip(*phrases, strict=False)])
        found = [Explanation(phrase, explainer) for phrase in joined]
        return found + [Explanation(p, explainer, cluster) for cluster, each in enumerate(phrases) for p in each]


def split(latent: LatentEvidence, contexts: Contexts, most: int, seed: int) -> list[LatentEvidence]:
    """The latent, or one for each cluster of its positives with only those to explain; the largest cluster first."""
    positives = latent.positives("explain")
    if most < 2:
        return [latent]
    bags = [_neighbourhood(contexts, example) for example in positives]
    found = groups(bags, most, seed)
    if len(found) < 2:
        return [latent]
    return [
        LatentEvidence(
            latent.latent,
            latent.density,
            latent.contexts_active,
            latent.max_activation,
            explain=tuple(positives[i] for i in members),
        )
        for members in found
    ]


def _neighbourhood(contexts: Contexts, example: Example) -> str:
    text = text_of(contexts, example)
    return "".join(cut(text.pieces, text.acts, _NEIGHBOURHOOD)[0])
