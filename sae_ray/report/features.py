"""Latents as the page shows them: ranked, with scores per version and texts token by token."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from sae_ray.report.findings import in_order, latest_version, version_label

SHOWN_EXAMPLES = 6


@dataclass(frozen=True)
class Token:
    lead: str  # spaces before the word; they are not shaded, so that words stand apart
    text: str
    strength: float  # 0 to 1 of the strongest activation of this latent in this version
    title: str
    sign: bool  # nothing but signs that stand for whitespace


@dataclass(frozen=True)
class Example:
    tokens: list[Token]
    kind: str
    probability: float | None


@dataclass(frozen=True)
class Score:
    """One version's explanation of a latent and how well it detects; None is not measured."""

    version: str
    label: str
    auroc: float | None
    low: float | None
    high: float | None
    shuffled: float | None
    explanation: str | None
    explainer: str | None
    density: float | None
    n_verdicts: int | None
    examples: list[Example]

    @property
    def margin(self) -> float | None:
        """AUROC over its shuffled null."""
        return None if self.auroc is None or self.shuffled is None else self.auroc - self.shuffled


@dataclass(frozen=True)
class Latent:
    latent: int
    scores: list[Score]

    def score(self, version: str | None) -> Score | None:
        return next((score for score in self.scores if score.version == version), None)


def read_latents(evaluation: dict[str, Any]) -> list[Latent]:
    return [
        Latent(row["latent"], [_score(row, version) for version in in_order(row.get("versions") or {})])
        for row in evaluation.get("latents") or []
        if "latent" in row
    ]


def ranked_version(latents: list[Latent]) -> str | None:
    """The version that best and worst are taken from."""
    return latest_version({score.version: True for latent in latents for score in latent.scores})


def best_and_worst(latents: list[Latent], n: int) -> tuple[list[Latent], list[Latent]]:
    """The `n` latents whose explanations beat their null by most, and the `n` by least; none is in both.

    Where fewer than 2n were measured, the better half goes to the best.
    """
    version = ranked_version(latents)
    measured: list[tuple[float, Latent]] = []
    for latent in latents:
        score = latent.score(version)
        if score is not None and score.margin is not None:
            measured.append((score.margin, latent))
    measured.sort(key=lambda item: (-item[0], item[1].latent))
    n_best = min(n, (len(measured) + 1) // 2)
    n_worst = min(n, len(measured) - n_best)
    ordered = [latent for _, latent in measured]
    return ordered[:n_best], ordered[len(ordered) - n_worst :][::-1]


def _score(row: dict[str, Any], version: str) -> Score:
    values = row["versions"][version] or {}
    shown = (row.get("examples") or {}).get(version) or []
    peak = max((value or 0.0 for example in shown for value in example.get("activations") or []), default=0.0)
    names = ("auroc", "low", "high", "shuffled", "explanation", "explainer", "density", "n_verdicts")
    return Score(
        version=version,
        label=version_label(version),
        examples=[example_of(example, peak) for example in shown],
        **{name: values.get(name) for name in names},
    )


def example_of(example: dict[str, Any], peak: float) -> Example:
    """A text as it is shown; `peak` is the activation of full colour."""
    activations = [value or 0.0 for value in example.get("activations") or []]
    texts = example.get("tokens") or []
    activations += [0.0] * (len(texts) - len(activations))
    tokens = [_token(text, value, peak) for text, value in zip(texts, activations, strict=False)]
    return Example(tokens, example.get("kind") or "", example.get("verdict_probability"))


def _token(text: str, activation: float, peak: float) -> Token:
    strength = max(0.0, activation / peak) if peak > 0 else 0.0
    seen = visible(text, lit=activation > 0)
    word = seen.lstrip(" ") if text.strip() else seen
    return Token(
        lead=seen[: len(seen) - len(word)],
        text=word,
        strength=strength,
        title=f"activation {activation:.3g}" if activation > 0 else "",
        sign=not text.strip(),
    )


def visible(text: str, lit: bool) -> str:
    """A token's text with the characters that a reader could not see, or that would move others, spelt out.

    Line breaks become a sign instead of a break. Plain spaces between words stay as they are unless the token
    is nothing but spaces and the latent fires on it.
    """
    if text and not text.strip(" "):
        shown = "·" * min(len(text), 4) + ("…" if len(text) > 4 else "")
        return shown if lit else text[:4]
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    # The joiners shape letters of some scripts and emoji; they move nothing.
    known = {"\n": "↵", "\r": "␍", "\t": "⇥", "\u200c": "\u200c", "\u200d": "\u200d"}
    if character in known:
        return known[character]
    # Cc, Cf: controls, also those that turn the direction of text; Cs: half a surrogate pair.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨{ord(character):04x}⟩"
    return character
