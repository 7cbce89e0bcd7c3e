"""Verdicts relative to what the same explanation gets on ordinary texts of the corpus.

How high an explanation's verdicts stand depends on its length and words, and on how near they are to everything in the
corpus. Its mean over a few reference texts, drawn without looking at any latent, takes that out; in the likelihood mode
the prior cancels. On planted items this is worth 0.02 to 0.07 AUROC where explanations are compared with each other
(`benchmarks/judge_validity.md`). Neutral texts that are not of the corpus do not do: they made it worse.

Cost: one verdict per explanation and reference, however many texts are judged on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sae_ray.judge.prompts import Mode


class Judge(Protocol):
    async def score(self, pairs: Sequence[tuple[str, str]], mode: Mode) -> list[float | None]: ...

    async def modes(self) -> tuple[Mode, ...]: ...


class Levelled:
    """A judge whose verdicts have their explanation's level taken out; asks where `client` is asked.

    Args:
        client: `JudgeClient`, or anything that scores; it remembers the references' verdicts, not this.
        references: texts of the corpus, of the length of those that are judged; 16 do.
    Raises:
        ValueError: there are no references.
    """

    def __init__(self, client: Judge, references: Sequence[str]) -> None:
        if not references:
            raise ValueError("levels need at least one reference text")
        self._client, self._references = client, list(dict.fromkeys(references))

    async def modes(self) -> tuple[Mode, ...]:
        return await self._client.modes()

    async def score(self, pairs: Sequence[tuple[str, str]], mode: Mode, **options: Any) -> list[float | None]:
        """As `JudgeClient.score`; None also where no reference of the explanation was answered."""
        explanations = list(dict.fromkeys(explanation for _, explanation in pairs))
        # By text, so that a reference's KV serves all explanations.
        levels = [(text, explanation) for text in self._references for explanation in explanations]
        answers = await self._client.score([*pairs, *levels], mode, **options)
        known: dict[str, list[float]] = {explanation: [] for explanation in explanations}
        for (_, explanation), answer in zip(levels, answers[len(pairs) :], strict=True):
            if answer is not None:
                known[explanation].append(answer)
        return [
            None
            if answer is None or not known[explanation]
            else answer - sum(known[explanation]) / len(known[explanation])
            for (_, explanation), answer in zip(pairs, answers[: len(pairs)], strict=True)
        ]
