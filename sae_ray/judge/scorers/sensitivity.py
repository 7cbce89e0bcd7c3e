"""Sensitivity: does the latent fire on new texts that show what its explanation says?

The other scorers see texts that the corpus has; a latent that fires on some of the texts that its explanation covers
passes them. Here the judge writes texts from the explanation alone, and the subject model says where the latent fires.
Reference: Juang et al. 2024 (generation scoring).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_ray.evidence.types import Contexts
from sae_ray.judge.explainers.base import Writer
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob
from sae_ray.judge.scorers.verdicts import NAN, OWN, SHUFFLED, asks_questions, judge_of, wilson
from sae_ray.judge.scores import Estimate

if TYPE_CHECKING:
    from sae_ray.config import JudgingConfig

_MAX_TOKENS = 48
_LEAST_CHARACTERS = 8
_SHOWN = (
    ("vehicles and transport", "The train to the coast leaves at noon, and buses wait for it outside the station."),
    ("arithmetic operations", "To find the total, multiply each row by two and then add the offset to the sum."),
    ("file, path, open", "It tries to open the file at the given path and fails when the folder does not exist."),
)


def completion_prompt(explanation: str) -> str:
    """Few-shot, for a model that continues texts. It writes up to the end of a line."""
    shown = "".join(f"Topic: {topic}\nText: {text}\n\n" for topic, text in _SHOWN)
    return f"Short texts, each with words that its topic is about.\n\n{shown}Topic: {_one_line(explanation)}\nText:"


def chat_prompt(explanation: str) -> str:
    """For a model that follows instructions."""
    return (
        "Write one short text, one or two sentences, that clearly shows the following: "
        f"{_one_line(explanation)}\nIf it names words, use them. Write the text only, on one line, without a title."
    )


class Sensitivity:
    """value: share of generated texts that the latent fires in, with Wilson's interval.

    `chance` is the share of the corpus's contexts that it fires in; generated texts may be somewhat longer or shorter
    than those. Texts that come twice count once, copies of the prompt's own examples and empty answers are missing.
    Verdicts are one per text: raw is its strongest activation, and the text is there as well.

    Args:
        texts: asked for per explanation; None: `judging.positives`.
        chat: whether the judge is asked in chat form; None: where it calibrated best on questions.
    """

    name: ClassVar[str] = "sensitivity"
    needs: ClassVar[tuple[str, ...]] = ("judge", "subject")

    def __init__(self, texts: int | None = None, chat: bool | None = None) -> None:
        self._texts = texts
        self._chat = chat

    async def score(
        self, jobs: Sequence[ScoreJob], contexts: Contexts, tools: Instruments, cfg: JudgingConfig, seed: int
    ) -> list[Score]:
        judge, subject = judge_of(tools, self.name), tools.subject
        assert subject is not None
        chat = asks_questions(tools) if self._chat is None else self._chat
        # One job's null is another's explanation: its texts are written once, and both latents look at them.
        latents_of: dict[str, list[int]] = {}
        for job in jobs:
            for explanation in filter(None, (job.explanation, job.shuffled)):
                latents = latents_of.setdefault(explanation.text, [])
                if job.latent.latent not in latents:
                    latents.append(job.latent.latent)
        written = await write_texts(judge, list(latents_of), self._texts or cfg.positives, chat, seed)
        measured = await asyncio.gather(
            *(subject.activations(written[each].texts, latents_of[each]) for each in latents_of if written[each].texts)
        )
        peaks: dict[tuple[str, int], list[float]] = {}
        with_texts = [each for each in latents_of if written[each].texts]
        for explanation_text, activations in zip(with_texts, measured, strict=True):
            for column, latent in enumerate(latents_of[explanation_text]):
                peaks[explanation_text, latent] = [
                    float(acts_TN[:, column].max()) if len(acts_TN) else float("nan") for acts_TN in activations
                ]
        return [self._scored(job, written, peaks) for job in jobs]

    def _scored(self, job: ScoreJob, written: dict[str, Written], peaks: dict[tuple[str, int], list[float]]) -> Score:
        latent = job.latent.latent
        rows: list[dict[str, Any]] = []
        shares: dict[str, Estimate] = {}
        for purpose, explanation in ((OWN, job.explanation), (SHUFFLED, job.shuffled)):
            texts = written[explanation.text].texts if explanation is not None else []
            of_texts = peaks.get((explanation.text, latent), []) if explanation is not None else []
            known = [(text, peak) for text, peak in zip(texts, of_texts, strict=True) if np.isfinite(peak)]
            fires = sum(peak > 0 for _, peak in known)
            shares[purpose] = wilson(fires / max(1, len(known)), len(known))
            rows += [_row(text, purpose, peak) for text, peak in known]
        own, null = shares[OWN], shares[SHUFFLED]
        about = written[job.explanation.text]
        extra = {
            "missing": float(about.asked - about.duplicates - own.n),
            "duplicates": float(about.duplicates),
            "shuffled_stderr": null.stderr,
        }
        return Score(
            self.name, latent, own.value, own.low, own.high, own.stderr, null.value if job.shuffled else NAN,
            job.latent.contexts_active, own.n, tuple(rows), extra,
        )  # fmt: skip


def _row(text: str, purpose: str, peak: float) -> dict[str, Any]:
    """One line of the verdicts: a text that no context is, with what was written."""
    return {
        "context": -1,
        "stratum": "generated",
        "weight": 1.0,
        "purpose": purpose,
        "raw": peak,
        "probability": float(peak > 0),
        "text": text,
    }


@dataclass(frozen=True)
class Written:
    """Texts from one explanation, each once; `asked` = texts + duplicates + what is missing."""

    texts: list[str]
    asked: int
    duplicates: int


async def write_texts(judge: Writer, explanations: list[str], n: int, chat: bool, seed: int) -> dict[str, Written]:
    """`n` texts asked of the judge for each of some different explanations."""
    prompts = [chat_prompt(each) if chat else completion_prompt(each) for each in explanations]
    # At temperature 1: texts should differ from each other more than they should be good.
    answers = await judge.generate(
        prompts,
        max_tokens=2 * _MAX_TOKENS if chat else _MAX_TOKENS,
        n=n,
        temperature=1.0,
        top_p=0.95,
        stop=() if chat else ("\n",),
        seed=seed,
        chat=chat,
    )
    copied = {_key(text) for _, text in _SHOWN}
    written = {}
    for explanation, answer in zip(explanations, answers, strict=True):
        kept: dict[str, str] = {}
        duplicates = 0
        for text in map(cleaned, answer or []):
            key = _key(text)
            if len(text) < _LEAST_CHARACTERS or key in copied:
                continue
            duplicates += key in kept
            kept.setdefault(key, text)
        written[explanation] = Written(list(kept.values()), n, duplicates)
    return written


def cleaned(answer: str) -> str:
    """The first line that holds something, without quotes around it or a label before it."""
    line = next((line for line in answer.split("\n") if line.strip()), "").strip()
    if line.lower().startswith("text:"):
        line = line[len("text:") :].strip()
    if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'":
        line = line[1:-1].strip()
    return line


def _one_line(explanation: str) -> str:
    return " ".join(explanation.split()).rstrip(".")


def _key(text: str) -> str:
    return " ".join(text.lower().split())
