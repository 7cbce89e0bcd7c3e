"""Explains a latent without a language model: the words that it fires on more than the corpus has them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_ray.evidence.types import Contexts, LatentEvidence
from sae_ray.judge.explainer import lexical_explanation, normalised
from sae_ray.judge.explainers.base import Explanation, Writer
from sae_ray.judge.explainers.showing import text_of

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig


class Lexical:
    """Deterministic and free: the floor that a language model's candidates have to clear."""

    name: ClassVar[str] = "lexical"

    async def explain(
        self, latents: list[LatentEvidence], contexts: Contexts, writer: Writer, cfg: JudgingConfig, seed: int
    ) -> tuple[list[list[Explanation]], int]:
        """At most one candidate each. A latent that fires on no words has none, which is no failure."""
        usual = usual_counts(contexts) if latents else Counter[str]()
        found = []
        for latent in latents:
            texts = [text_of(contexts, example) for example in latent.positives("explain")]
            words = [word for text in texts for word in text.active_words]
            phrase = lexical_explanation([text.pieces for text in texts], words, usual)
            found.append([Explanation(phrase, self.name)] if phrase else [])
        return found, 0


def usual_counts(contexts: Contexts) -> Counter[str]:
    """How often each normalised token occurs in all the contexts; what `explainer.background` counts, by token id."""
    counts = Counter[int]()
    for tokens_S in contexts.tokens.values():
        ids, n = np.unique(tokens_S[tokens_S >= 0], return_counts=True)
        counts.update(dict(zip(ids.tolist(), n.tolist(), strict=True)))
    # Each id is decoded once: decoding every token of every context takes minutes on a large pass.
    usual = Counter[str]()
    for token, n_seen in counts.items():
        if word := normalised(contexts.tokenizer.decode([token])):
            usual[word] += n_seen
    return usual
