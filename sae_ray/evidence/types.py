"""The words of evidence. Nothing here computes.

A context is S consecutive token positions of a corpus. Its id is its number in the pass; its text is stored once,
in a `Contexts`, and examples refer to it. Every context is on one side only, by a hash of its token ids: what an
explainer may see, or what a scorer may judge. So no text is ever on both, not for any latent, not as a duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

Side = Literal["explain", "score"]
TOP, QUANTILE, NEAR_MISS, RANDOM, SIBLING = "top", "quantile", "near_miss", "random", "sibling"


class LatentSource(Protocol):
    """What is judged: latents of an SAE, random directions of the same densities, or neurons of the language model."""

    @property
    def kind(self) -> str:
        """ "latent", "random_direction", or a baseline's name such as "residual relu"."""
        ...

    @property
    def latents(self) -> np.ndarray:
        """Their ids, int64 [N]."""
        ...

    def activations(self, raw_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(activations, margins) [T, N] float32 of raw hook activations: 0 where inactive; pre-activation minus
        threshold, so that the largest margins among inactive tokens are the near misses."""
        ...


def side_of(tokens_S: np.ndarray) -> Side:
    """The one side a context is on: one in four explains. A pure function of its token ids."""
    digest = hashlib.blake2b(np.ascontiguousarray(tokens_S, dtype=np.int32).tobytes(), digest_size=4).digest()
    return "explain" if digest[0] < 64 else "score"


@dataclass(frozen=True)
class Contexts:
    """Token ids of the contexts that examples refer to, -1 is padding; each is stored once.

    tokens: context id -> int32 [S]. tokenizer: of the subject model (Hugging Face).
    """

    tokens: Mapping[int, np.ndarray]
    tokenizer: Any

    def text(self, context: int) -> str:
        tokens_S = self.tokens[context]
        return self.tokenizer.decode(tokens_S[tokens_S >= 0].tolist(), skip_special_tokens=True)

    def pieces(self, context: int) -> list[str]:
        """Each token as text, padding left out; joined they are (nearly) the text."""
        return [self.tokenizer.decode([int(token)]) for token in self.tokens[context] if token >= 0]


@dataclass(frozen=True)
class Example:
    """A context as one latent sees it.

    acts_S: float32 [S], the latent's activation on each token, 0 where it is inactive or the token is not kept.
    stratum: TOP, QUANTILE, NEAR_MISS, RANDOM or SIBLING. weight: how many contexts of the corpus this one stands for
    (inverse sampling propensity), so that weighted means are those of the corpus. quantile: of QUANTILE examples,
    0 is the weakest group. margin: largest pre-activation minus threshold. sibling: of SIBLING examples, whose.
    """

    context: int
    acts_S: np.ndarray
    stratum: str
    weight: float = 1.0
    quantile: int = -1
    margin: float = 0.0
    sibling: int = -1

    @property
    def active(self) -> bool:
        return bool((self.acts_S > 0).any())

    @property
    def peak(self) -> int:
        """Position of the strongest activation; of the largest pre-activation is not known for inactive ones: 0."""
        return int(self.acts_S.argmax())


@dataclass(frozen=True)
class LatentEvidence:
    """All that one pass found out about one latent.

    density: share of tokens it fires on. contexts_active: share of contexts it fires in. max_activation: the largest.
    firing_entropy: of the token ids it fires on, nats. unigram_share: share of firings on its commonest token.
    top_tokens: (token id, share of firings), commonest first. promoted, suppressed: (token as text, logit), what its
    decoder row adds to the output logits. siblings: (latent, decoder cosine, co-occurrence Jaccard), closest first.
    explain, score: examples on either side, positives (TOP, QUANTILE) and negatives.
    """

    latent: int
    density: float
    contexts_active: float
    max_activation: float
    firing_entropy: float = float("nan")
    unigram_share: float = float("nan")
    top_tokens: tuple[tuple[int, float], ...] = ()
    promoted: tuple[tuple[str, float], ...] = ()
    suppressed: tuple[tuple[str, float], ...] = ()
    siblings: tuple[tuple[int, float, float], ...] = ()
    explain: tuple[Example, ...] = ()
    score: tuple[Example, ...] = ()

    def positives(self, side: Side) -> list[Example]:
        return [example for example in getattr(self, side) if example.stratum in (TOP, QUANTILE)]

    def negatives(self, side: Side, *strata: str) -> list[Example]:
        """Of the named strata, or of all that are no positives."""
        wanted = strata or (NEAR_MISS, RANDOM, SIBLING)
        return [example for example in getattr(self, side) if example.stratum in wanted]


@dataclass(frozen=True)
class EvidenceSet:
    """The evidence of a pass: the latents that fired often enough to be judged, and those that did not."""

    latents: dict[int, LatentEvidence]
    contexts: Contexts
    n_tokens: int
    n_contexts: int
    skipped: dict[int, str] = field(default_factory=dict)  # latent -> why, e.g. "dead", "3 active contexts"
