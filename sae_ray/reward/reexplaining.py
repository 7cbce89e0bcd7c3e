"""Explanations are kept while what they explain has not moved: an explainer is asked about the other latents only."""

from __future__ import annotations

from sae_ray.reward.evidence import LatentPlan
from sae_ray.reward.rounds import Candidate, Judge


class KeptExplanations:
    """A judge that writes nothing new for some latents: what they have competes alone, and is judged as ever.

    Args:
        kept: latents whose present explanation `rounds.compete` is given.
    """

    def __init__(self, judge: Judge, kept: frozenset[int]):
        self._judge, self._kept = judge, kept

    async def score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        return await self._judge.score(pairs)

    async def explain(self, plan: LatentPlan) -> list[Candidate]:
        return [] if plan.latent in self._kept else await self._judge.explain(plan)

    def probability(self, explanation: str, raw: float) -> float:
        return self._judge.probability(explanation, raw)
