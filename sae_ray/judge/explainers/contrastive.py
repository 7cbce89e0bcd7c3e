"""Explains a latent by what its texts show and texts that look alike do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, ClassVar

from sae_ray.evidence.types import NEAR_MISS, RANDOM, SIBLING, Contexts, Example, LatentEvidence
from sae_ray.judge.explainer import normalised
from sae_ray.judge.explainers.asking import Question, explain_each
from sae_ray.judge.explainers.base import Explanation, Writer
from sae_ray.judge.explainers.showing import Excerpts, LookAlikes, Text, shown_positives, text_of
from sae_ray.judge.explainers.solved import EXCEPTIONS, MUSIC, NO_EXCEPTIONS, NO_MUSIC
from sae_ray.judge.marks import Style

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig


@dataclass(frozen=True)
class TwoLists:
    """Texts in which the latent is active, and texts in which it is not."""

    active: Sequence[Text]
    inactive: Sequence[Text]
    max_activation: float

    def shown(self, style: Style, room: int, chat: bool) -> str:
        words = frozenset(normalised(word) for text in self.active for word in text.active_words)
        first = Excerpts(self.active, self.max_activation, heading="First list:")
        second = LookAlikes(self.inactive, words, heading="Second list:")
        return f"{first.shown(style, room * 3 // 5, chat)}\n{second.shown(style, room * 2 // 5, chat)}"


_SOLVED = (
    (TwoLists(MUSIC, NO_MUSIC, 10.0), "musical instruments"),
    (TwoLists(EXCEPTIONS, NO_EXCEPTIONS, 10.0), "names of exceptions"),
)


class Contrastive:
    """Half of the shown texts are inactive ones. A latent without any of those on the explainer's side gets no
    candidates: there is nothing to contrast."""

    name: ClassVar[str] = "contrastive"

    async def explain(
        self, latents: list[LatentEvidence], contexts: Contexts, writer: Writer, cfg: JudgingConfig, seed: int
    ) -> tuple[list[list[Explanation]], int]:
        questions = [self._question(latent, contexts, cfg) for latent in latents]
        return await explain_each(questions, self.name, writer, cfg, seed)

    def _question(self, latent: LatentEvidence, contexts: Contexts, cfg: JudgingConfig) -> Question | None:
        n_inactive = max(1, cfg.shown // 2)
        active = shown_positives(latent, contexts, max(1, cfg.shown - n_inactive))
        inactive = [text_of(contexts, example) for example in look_alikes(latent, n_inactive)]
        if not active or not inactive:
            return None
        return Question(
            TwoLists(active, inactive, latent.max_activation),
            cfg.marks,
            task="Name what is present in the first list and absent from the second, in a few words.",
            solved=_SOLVED,
            situation="One unit of a language model is active on some tokens of the first list, and on none of the "
            "second, though those texts look alike.",
            wanted="Name the most specific thing that is present in the first list and absent from the second.",
        )


def look_alikes(latent: LatentEvidence, n: int) -> list[Example]:
    """Near misses, the nearest first, and siblings' contexts in turn; random ones where there are neither."""
    near = sorted(latent.negatives("explain", NEAR_MISS), key=lambda example: -example.margin)
    in_turn = chain.from_iterable(zip_longest(near, latent.negatives("explain", SIBLING)))
    return ([example for example in in_turn if example] or latent.negatives("explain", RANDOM))[:n]
