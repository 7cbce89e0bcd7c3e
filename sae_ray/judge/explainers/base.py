"""What an explainer is: evidence in, candidate explanations out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sae_ray.evidence.types import Contexts, LatentEvidence

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig


@dataclass(frozen=True)
class Explanation:
    """A candidate. explainer: which one made it, with its format ("max_activating/delimiters"). cluster: which of a
    polysemantic latent's meanings it is of; -1: of all."""

    text: str
    explainer: str
    cluster: int = -1


class Writer(Protocol):
    """What an explainer needs of a judge: `judge.client.JudgeClient` and `judge.endpoint.EndpointClient` are both."""

    async def generate(
        self,
        prompts: list[str],
        max_tokens: int = ...,
        n: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        stop: tuple[str, ...] = ...,
        seed: int | None = ...,
        chat: bool = ...,
        schema: dict[str, Any] | None = ...,  # JSON schema that the engine holds the answer to
    ) -> list[list[str] | None]: ...


class Explainer(Protocol):
    """One way to explain. Sees `evidence.explain` only, never `evidence.score`."""

    name: ClassVar[str]

    async def explain(
        self, latents: list[LatentEvidence], contexts: Contexts, writer: Writer, cfg: JudgingConfig, seed: int
    ) -> tuple[list[list[Explanation]], int]:
        """Candidates of each latent (maybe none), in order, and how many answers did not parse."""
        ...
