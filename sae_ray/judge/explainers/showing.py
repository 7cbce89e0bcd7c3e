"""How evidence is put into a prompt: contexts as lines with marks, and the most common active tokens. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_ray.evidence.examples import for_explainer
from sae_ray.evidence.types import Contexts, Example, LatentEvidence
from sae_ray.judge.explainer import normalised
from sae_ray.judge.marks import Style, escaped, marked

# A shorter line shows too little around the peak; a longer one, too few texts.
_LINE_LEAST, _LINE_MOST = 60, 160
_WORDS = 8


@dataclass(frozen=True)
class Text:
    """A context as it is shown: tokens as text and the latent's activation on each, of one length."""

    pieces: tuple[str, ...]
    acts: tuple[float, ...]

    @property
    def active_words(self) -> list[str]:
        return [p.strip() for p, act in zip(self.pieces, self.acts, strict=True) if act > 0 and p.strip()]

    def flat(self) -> Text:
        """With line breaks and tabs as spaces, but where the latent is active: small models write escapes off."""
        shown = zip(self.pieces, self.acts, strict=True)
        return Text(tuple(p if act > 0 else re.sub(r"\s+", " ", p) for p, act in shown), self.acts)


def text_of(contexts: Contexts, example: Example) -> Text:
    """Padding and special tokens are left out; runs of spaces, of which code is full, are shown as one."""
    tokens_S = contexts.tokens[example.context]
    real_S = tokens_S >= 0
    special = set(getattr(contexts.tokenizer, "all_special_ids", ()))
    kept = [
        (re.sub(r"[ \t]{2,}", " ", piece), float(act))
        for piece, token, act in zip(
            contexts.pieces(example.context), tokens_S[real_S], example.acts_S[real_S], strict=True
        )
        if int(token) not in special
    ]
    return Text(tuple(p for p, _ in kept), tuple(act for _, act in kept))


def shown_positives(latent: LatentEvidence, contexts: Contexts, n: int) -> list[Text]:
    """The texts that an explainer shows of a latent, on some token of which it is active."""
    texts = [text_of(contexts, example) for example in for_explainer(latent, n)]
    return [text for text in texts if text.active_words]


@dataclass(frozen=True)
class Excerpts:
    """Texts that a latent is active in: marked lines, and its commonest active tokens."""

    texts: Sequence[Text]
    max_activation: float
    heading: str = "Texts:"

    def shown(self, style: Style, room: int, chat: bool) -> str:
        texts = [each if chat else each.flat() for each in fitting(self.texts, room)]
        characters = _line_length(texts, room)
        lines = ["- " + marked(t.pieces, t.acts, style, self.max_activation, characters).strip() for t in texts]
        counts = Counter(word for text in self.texts for word in text.active_words)
        words = ", ".join(escaped(word, style) for word, _ in counts.most_common(_WORDS))
        return "\n".join([self.heading, *lines, f"Marked words: {words}"])


@dataclass(frozen=True)
class LookAlikes:
    """Texts that it is not active in, cut around the first token that is one of `words`."""

    texts: Sequence[Text]
    words: frozenset[str]
    heading: str

    def shown(self, style: Style, room: int, chat: bool) -> str:
        texts = [each if chat else each.flat() for each in fitting(self.texts, room)]
        characters = _line_length(texts, room)
        lines = []
        for text in texts:
            centre = next((i for i, p in enumerate(text.pieces) if normalised(p) in self.words), 0)
            inactive = [0.0] * len(text.pieces)
            lines.append("- " + marked(text.pieces, inactive, style, 1.0, characters, centre=centre).strip())
        return "\n".join([self.heading, *lines])


def fitting(texts: Sequence[Text], room: int) -> Sequence[Text]:
    """The first texts, as many as can have a line each."""
    return texts[: max(1, room // _LINE_LEAST)]


def _line_length(texts: Sequence[Text], room: int) -> int:
    return int(np.clip(room // max(1, len(texts)), _LINE_LEAST, _LINE_MOST))
