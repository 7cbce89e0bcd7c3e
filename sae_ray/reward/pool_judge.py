"""The judge pool as rounds see it: calibrated, with verdicts of earlier runs remembered."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter, deque
from typing import Any

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.corpus import open_corpus, split_of
from sae_ray.judge import explainer, planting
from sae_ray.judge.calibration import Calibration, calibrate
from sae_ray.judge.client import JudgeClient
from sae_ray.judge.deploy import JudgeApp
from sae_ray.judge.levels import Levelled
from sae_ray.judge.prompts import PROMPT_VERSION
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.evidence import ContextScan, LatentPlan
from sae_ray.reward.rounds import Candidate
from sae_ray.storage import LocalStorage

CALIBRATION_FILE = "calibration.json"
PLANTED_DOCUMENTS = 1500
REFERENCE_TEXTS = 8
PART = 64  # verdicts that are counted together
EXPLANATION_TOKENS = 20
RATE_SPAN_S = 30.0


class PoolJudge:
    """Implements `reward.rounds.Judge` on the run's judge pool. Make it where it is used: inside an event loop."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._storage = LocalStorage(config.run_dir)
        self._client: JudgeClient | None = None
        self._calibration: Calibration | None = None
        self._known: dict[tuple[str, str], float] = {}
        self._references: list[str] = []
        self._texts: ContextTexts | None = None
        self._column_of: dict[int, int] = {}
        self._scan: ContextScan | None = None
        self._background: Counter[str] = Counter()
        self._waiting = self._verdicts = self._parse_failures = 0
        self._answered: deque[tuple[float, int]] = deque()

    @property
    def client(self) -> JudgeClient:
        if self._client is None:
            judge = self._config.judge
            self._client = JudgeClient(JudgeApp(judge, self._config.name).handle(), judge)
        return self._client

    # -- calibration ----------------------------------------------------------------------------------

    async def calibrate(self) -> dict[str, Any]:
        """The run's calibration: the one on file if it is of this judge and these prompts, else a new one.

        Returns:
            The report, as in `calibration.json`.
        Raises:
            JudgeAtChance: no allowed mode beats chance.
        """
        config, settings = self._config, self._config.judge.calibration
        tokenizer = load_tokenizer(config.model)
        found = (d for d in open_corpus(config.corpus).documents(config.seed) if split_of(d) == "evidence")
        documents = list(itertools.islice(found, PLANTED_DOCUMENTS))
        self._references = [
            tokenizer.decode(tokenizer.encode(document)[: config.judge.context_tokens], skip_special_tokens=True)
            for document in documents[:: max(1, len(documents) // REFERENCE_TEXTS)][:REFERENCE_TEXTS]
        ]
        report = self._on_file()
        if report is None:
            items = planting.plant_items(
                documents,
                settings.concepts,
                settings.texts_per_concept,
                config.judge.context_tokens,
                tokenizer,
                settings.seed,
            )
            levelled = Levelled(self.client, self._references)
            report = _report(config, await calibrate(levelled, items, config.judge))
            self._storage.write(CALIBRATION_FILE, json.dumps(report, indent=1).encode())
        self._calibration = Calibration.from_dict(report["calibration"])
        return report

    def _on_file(self) -> dict[str, Any] | None:
        if not self._storage.exists(CALIBRATION_FILE):
            return None
        report = json.loads(self._storage.read(CALIBRATION_FILE))
        same = report["judge"] == self._config.judge.model and report["prompt_version"] == PROMPT_VERSION
        return report if same and self._config.judge.mode in ("auto", report["mode"]) else None

    @property
    def calibration(self) -> Calibration:
        if self._calibration is None:
            raise RuntimeError("the judge was asked before it was calibrated")
        return self._calibration

    @property
    def mode(self) -> str:
        return self.calibration.mode

    @property
    def rates(self) -> tuple[float, float]:
        """(false positive, false negative) rate of a verdict taken at probability 1/2."""
        return self.calibration.chosen.false_positive, self.calibration.chosen.false_negative

    def probability(self, explanation: str, raw: float) -> float:
        """Calibrated P(the explanation holds), the explanation's own level (`judge.levels`) taken out."""
        level = [self._known.get((text, explanation)) for text in self._references]
        known = [value for value in level if value is not None]
        return self.calibration.probability(raw - sum(known) / len(known) if known else raw)

    # -- verdicts -------------------------------------------------------------------------------------

    def preload(self, bank: list[dict[str, Any]]) -> None:
        """Remembers banked verdicts: what a judge once said is not asked again."""
        judge, mode = self._config.judge.model, self.mode
        for row in bank:
            if row["score"] is not None and row["judge"] == judge and row["mode"] == mode:
                self._known[row["text"], row["explanation"]] = row["score"]

    async def score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        levels = [(text, explanation) for explanation in {e for _, e in pairs} for text in self._references]
        new = [pair for pair in dict.fromkeys([*pairs, *levels]) if pair not in self._known]
        # By text, so that the calls on one text stand together and share its KV.
        new.sort(key=lambda pair: pair[0])
        parts = [new[start : start + PART] for start in range(0, len(new), PART)]
        await asyncio.gather(*(self._ask(part) for part in parts))
        return [self._known.get(pair) for pair in pairs]

    async def _ask(self, pairs: list[tuple[str, str]]) -> None:
        """Asks the pool; the client bounds how many calls are open at once."""
        self._waiting += len(pairs)
        try:
            values = await self.client.score(pairs, self.calibration.mode)
        finally:
            self._waiting -= len(pairs)
        self._known |= {pair: value for pair, value in zip(pairs, values, strict=True) if value is not None}
        self._verdicts += len(pairs)
        self._answered.append((time.monotonic(), len(pairs)))

    # -- explanations ---------------------------------------------------------------------------------

    def bind(self, texts: ContextTexts, scan: ContextScan) -> None:
        """The contexts and responses that the next plans refer to."""
        self._texts, self._scan = texts, scan
        self._column_of = {int(latent): column for column, latent in enumerate(scan.latents)}
        self._background = explainer.background([texts.pieces(context) for context in range(texts.n_contexts)])

    async def explain(self, plan: LatentPlan) -> list[Candidate]:
        """The language model's candidates and the lexical one, from the plan's explainer examples alone."""
        assert self._texts is not None
        assert self._scan is not None
        column = self._column_of[plan.latent]
        peak_of = {
            context: self._texts.offset_of(int(self._scan.token_CN[context, column]))
            for context in {*plan.explainer, *plan.unjudged}
        }
        found: list[Candidate] = []
        unjudged = [self._texts.pieces(context) for context in plan.unjudged]
        fired = [whole_word(self._texts.pieces(context), peak_of[context]) for context in plan.unjudged]
        lexical = explainer.lexical_explanation(unjudged, fired, self._background)
        if lexical is not None:
            found.append(Candidate(lexical, "lexical"))
        contexts = [self._texts.pieces(context) for context in plan.explainer]
        marks = [
            [offset == peak_of[context] for offset in range(len(pieces))]
            for context, pieces in zip(plan.explainer, contexts, strict=True)
        ]
        prompt = explainer.explanation_prompt(contexts, marks)
        answers = await self.client.generate(
            [prompt], EXPLANATION_TOKENS, n=self._config.rlaif.candidates, stop=explainer.STOP, seed=self._config.seed
        )
        for completion in answers[0] or []:
            phrase = explainer.parse_explanation(completion)
            if phrase is None:
                self._parse_failures += 1
            else:
                found.append(Candidate(phrase, "llm"))
        return found

    # -- counters -------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        now = time.monotonic()
        while self._answered and self._answered[0][0] < now - RATE_SPAN_S:
            self._answered.popleft()
        rate = None
        if len(self._answered) >= 2:
            span = now - self._answered[0][0]
            rate = (sum(n for _, n in self._answered) - self._answered[0][1]) / max(span, 1e-9)
        return {"queue": self._waiting, "verdicts": self._verdicts, "verdicts_per_s": rate}

    def usage(self) -> dict[str, Any]:
        """The client's counters (tokens, calls, retries) and the explanations that did not parse."""
        return {**self.client.statistics(), "parse_failures": self._parse_failures}


def whole_word(pieces: list[str], index: int) -> str:
    """The word that a token is part of: a fragment means little to a reader."""
    if not pieces[index].strip().isalpha():
        return pieces[index]
    start, end = index, index + 1
    while start > 0 and pieces[start][:1].isalpha() and pieces[start - 1][-1:].isalpha():
        start -= 1
    while end < len(pieces) and pieces[end].isalpha():
        end += 1
    return "".join(pieces[start:end])


def _report(config: RunConfig, calibration: Calibration) -> dict[str, Any]:
    modes = {
        name: {
            "auroc": each.auroc.value,
            "low": each.auroc.low,
            "high": each.auroc.high,
            "false_positive_rate": each.false_positive,
            "false_negative_rate": each.false_negative,
            "n": each.items,
            "missing": each.missing,
            "seconds": round(each.seconds, 2),
        }
        for name, each in calibration.modes.items()
    }
    told = ", ".join(
        f"{name} AUROC {mode['auroc']:.2f} ({mode['low']:.2f} to {mode['high']:.2f})" for name, mode in modes.items()
    )
    return {
        "judge": config.judge.model,
        "mode": calibration.mode,
        "auroc": calibration.chosen.auroc.value,
        "prompt_version": PROMPT_VERSION,
        "summary": f"judge {config.judge.model} on planted items: {told}; the run uses {calibration.mode}",
        "modes": modes,
        "calibration": calibration.to_dict(),
    }
