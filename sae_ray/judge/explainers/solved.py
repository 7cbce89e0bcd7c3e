"""Texts of imagined latents that few-shot prompts show with their explanations."""

from __future__ import annotations

from sae_ray.judge.explainers.showing import Text


def text(sentence: str, *active: str) -> Text:
    """The first of the active words is the most active one (10 of 10)."""
    words = sentence.split()
    acts = {word: 10.0 - 4.0 * i for i, word in enumerate(active)}
    return Text(
        tuple((" " if i else "") + word for i, word in enumerate(words)), tuple(acts.get(word, 0.0) for word in words)
    )


MUSIC = (
    text("he tuned his guitar before supper", "guitar"),
    text("the violin was louder than the cello", "violin", "cello"),
)
NO_MUSIC = (text("he cleaned his boots before supper"),)
EXCEPTIONS = (
    text("raises KeyError if the name is unknown", "KeyError"),
    text("catch TypeError and ValueError here", "TypeError", "ValueError"),
)
NO_EXCEPTIONS = (text("returns None if the name is unknown"),)
