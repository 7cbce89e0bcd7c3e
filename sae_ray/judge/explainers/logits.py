"""Explains a latent by what it does to the next token, beside a few of the texts that it fires on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sae_ray.evidence.types import Contexts, LatentEvidence
from sae_ray.judge.explainers.asking import Question, explain_each
from sae_ray.judge.explainers.base import Explanation, Writer
from sae_ray.judge.explainers.showing import Excerpts, shown_positives
from sae_ray.judge.explainers.solved import EXCEPTIONS, MUSIC
from sae_ray.judge.marks import Style, escaped

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

_TOKENS, _TOKEN_CHARACTERS = 8, 20


@dataclass(frozen=True)
class WithEffect:
    """Texts, and the tokens that the latent makes likelier and less likely, most so first."""

    excerpts: Excerpts
    promoted: Sequence[str]
    suppressed: Sequence[str]

    def shown(self, style: Style, room: int, chat: bool) -> str:
        parts = [self.excerpts.shown(style, room, chat)]
        for heading, tokens in (("Likelier next", self.promoted), ("Less likely next", self.suppressed)):
            if tokens:
                parts.append(f"{heading}: {', '.join(escaped(token, style) for token in tokens)}")
        return "\n".join(parts)


_SOLVED = (
    (WithEffect(Excerpts(MUSIC, 10.0), ("strings", "orchestra"), ("engine", "lawyer")), "musical instruments"),
    (WithEffect(Excerpts(EXCEPTIONS, 10.0), ("raised", "caught"), ("river", "kitchen")), "names of exceptions"),
)


class Logits:
    """Half as many texts as `judging.shown`. A latent of which no promoted tokens are known gets no candidates."""

    name: ClassVar[str] = "logits"

    async def explain(
        self, latents: list[LatentEvidence], contexts: Contexts, writer: Writer, cfg: JudgingConfig, seed: int
    ) -> tuple[list[list[Explanation]], int]:
        questions = [self._question(latent, contexts, cfg) for latent in latents]
        return await explain_each(questions, self.name, writer, cfg, seed)

    def _question(self, latent: LatentEvidence, contexts: Contexts, cfg: JudgingConfig) -> Question | None:
        promoted = readable(latent.promoted)
        texts = shown_positives(latent, contexts, max(1, cfg.shown // 2)) if promoted else []
        if not texts:
            return None
        return Question(
            WithEffect(Excerpts(texts, latent.max_activation), promoted, readable(latent.suppressed)),
            cfg.marks,
            task="Name the topic of the marked words and of the words that become likelier next, in a few words.",
            solved=_SOLVED,
            situation="One unit of a language model is active on some tokens of these excerpts, and makes some next "
            "tokens likelier and others less likely.",
            wanted="Name the most specific thing that tells both where it is active and what it makes likelier.",
        )


def readable(tokens: Sequence[tuple[str, float]]) -> list[str]:
    """The first tokens that are text, each once: parts of characters say nothing."""
    texts = [token.strip()[:_TOKEN_CHARACTERS] for token, _ in tokens]
    return list(dict.fromkeys(text for text in texts if text and "\N{REPLACEMENT CHARACTER}" not in text))[:_TOKENS]
