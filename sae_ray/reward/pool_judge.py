"""A judge of the run as rounds see it: calibrated, with verdicts of earlier runs remembered.

With the default config one judge explains and scores. `judges.explainer` writes the explanations instead, and
`judges.heldout` reads them in the evaluation: a `PoolJudge` of that role.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from typing import Any, cast

import numpy as np

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.judge import explainer
from sae_ray.judge.calibrated import Calibrated, calibrated
from sae_ray.judge.calibration import Calibration
from sae_ray.judge.client import Judge
from sae_ray.judge.drift import DriftCheck, DriftReport
from sae_ray.judge.explainers.asking import Question, ask
from sae_ray.judge.explainers.base import Writer
from sae_ray.judge.explainers.showing import Excerpts, Text
from sae_ray.judge.metrics import added
from sae_ray.judge.pool import JudgePool
from sae_ray.judge.prompts import PROMPT_VERSION
from sae_ray.judge.roles import SCORER, Role
from sae_ray.judge.verdict_cache import VerdictCache, shared_cache
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.evidence import ContextScan, LatentPlan
from sae_ray.reward.rounds import Candidate
from sae_ray.reward.verdict_cut import LEAST_RATE
from sae_ray.storage import LocalStorage

CALIBRATION_FILE = "calibration.json"
HELDOUT: Role = "heldout"
PART = 64  # verdicts that are counted together
EXPLANATION_TOKENS = 20
RATE_SPAN_S = 30.0


class PoolJudge:
    """Implements `reward.rounds.Judge` on the run's judges. Make it where it is used: inside an event loop.

    Args:
        role: who scores: the run's scorer, or its held-out judge, which must be configured then.
        beside: another one of this process, whose verdict cache is used: a second one could only be read.
    """

    def __init__(self, config: RunConfig, role: Role = SCORER, beside: PoolJudge | None = None):
        self._config, self._role, self._beside = config, role, beside
        self._cache: VerdictCache | None = None
        self._storage = LocalStorage(config.run_dir)
        self._asked: tuple[Judge, Judge] | None = None
        self._judge: Calibrated | None = None
        self._drift: DriftCheck | None = None
        self._chats = False
        self._known: dict[tuple[str, str], float] = {}
        self._texts: ContextTexts | None = None
        self._column_of: dict[int, int] = {}
        self._scan: ContextScan | None = None
        self._background: Counter[str] = Counter()
        self._waiting = self._verdicts = self._parse_failures = 0
        self._answered: deque[tuple[float, int]] = deque()

    @property
    def cache(self) -> VerdictCache:
        """What all runs below one folder have paid for."""
        if self._beside is not None:
            return self._beside.cache
        if self._cache is None:
            self._cache = shared_cache(self._config.runs_dir)
        return self._cache

    @property
    def client(self) -> Judge:
        """Who scores."""
        return self._connected()[0]

    @property
    def writer(self) -> Judge:
        """Who explains; the scorer's own client unless `judges.explainer` is configured."""
        return self._connected()[1]

    def _connected(self) -> tuple[Judge, Judge]:
        if self._asked is None:
            # The held-out judge has nothing that could be asked before the evaluation starts it.
            config = self._config if self._role == HELDOUT else without_heldout(self._config)
            clients = JudgePool(config).clients(self.cache)
            own = clients[self._role]
            # Of the same judge a second client would ask twice as much at once.
            self._asked = own, clients["explainer"] if "explainer" in config.judges else own
        return self._asked

    # -- calibration ----------------------------------------------------------------------------------

    async def calibrate(self) -> dict[str, Any]:
        """The calibration on file, if it still stands, else a new one; see `judge.calibrated`.

        Returns:
            The report, as in `calibration.json` (`calibration-heldout.json` for the held-out judge).
        Raises:
            JudgeAtChance: no allowed mode beats chance.
        """
        key = CALIBRATION_FILE if self._role == SCORER else None
        self._judge = await calibrated(self._config, self._role, self.client, self._storage, key)
        # A server that echoes no prompt may offer chat alone, as OpenAI's does.
        self._chats = "likelihood" not in await self.writer.modes()
        return self._judge.report

    @property
    def judge(self) -> Calibrated:
        if self._judge is None:
            raise RuntimeError("the judge was asked before it was calibrated")
        return self._judge

    @property
    def calibration(self) -> Calibration:
        return self.judge.calibration

    @property
    def mode(self) -> str:
        return self.calibration.mode

    @property
    def rates(self) -> tuple[float, float]:
        """(false positive, false negative) rate of a verdict taken at probability 1/2, as `reward_batch` takes it."""
        false_positive, false_negative = np.clip(self.calibration.chosen.rates_at_half, LEAST_RATE, 1 - LEAST_RATE)
        return float(false_positive), float(false_negative)

    def probability(self, explanation: str, raw: float) -> float:
        """Calibrated P(the explanation holds), the explanation's own level (`judge.levels`) taken out."""
        level = [self._known.get((text, explanation)) for text in self.judge.references]
        known = [value for value in level if value is not None]
        return self.calibration.probability(raw - sum(known) / len(known) if known else raw)

    async def check_drift(self) -> DriftReport | None:
        """Asks some of the planted items again. None: the calibration has too few answers to compare with.

        Returns:
            The comparison; `unknown` when the judge answered too few of them now.
        Raises:
            UserError: the judge does not say any more what it said when it was calibrated. The verdicts in the bank and
                those to come would be two judges', so no new calibration could mend it.
        """
        judge = self.judge
        if not judge.calibration.anchors:
            return None
        if self._drift is None:
            self._drift = DriftCheck(judge.calibration)
        report = await self._drift.check(judge.again, self._verdicts)
        if report.status == "drifted":
            raise UserError(
                f"the judge {judge.name} is no longer the one that was calibrated ({report.summary}): bring that one "
                "back and give the same command, or start over with --fresh"
            )
        return report

    # -- verdicts -------------------------------------------------------------------------------------

    def about(self) -> dict[str, str]:
        """What a bank row says of the judge: enough to know later whether the verdict is still its own."""
        judge = self.judge
        return {
            "judge": judge.name,
            "judge_identity": judge.identity,
            "prompt_version": PROMPT_VERSION,
            "mode": self.mode,
        }

    def preload(self, bank: list[dict[str, Any]]) -> None:
        """Remembers banked verdicts: what this judge once said, asked in the same way, is not asked again."""
        about = self.about()
        for row in bank:
            if row["score"] is not None and all(row[key] == value for key, value in about.items()):
                self._known[row["text"], row["explanation"]] = row["score"]

    async def score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        levels = [(text, explanation) for explanation in {e for _, e in pairs} for text in self.judge.references]
        new = [pair for pair in dict.fromkeys([*pairs, *levels]) if pair not in self._known]
        # By text, so that the calls on one text stand together and share its KV.
        new.sort(key=lambda pair: pair[0])
        parts = [new[start : start + PART] for start in range(0, len(new), PART)]
        await asyncio.gather(*(self._ask(part) for part in parts))
        return [self._known.get(pair) for pair in pairs]

    async def priors(self, explanations: list[str]) -> list[float | None]:
        """log p of each explanation as the judge reads it without a text, nats; None where its mode reads no such."""
        if self.mode != "likelihood":
            return [None] * len(explanations)
        return await self.client.priors(explanations)

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
        phrases = await (self._by_chat(contexts, marks) if self._chats else self._by_example(contexts, marks))
        return found + [Candidate(phrase, "llm") for phrase in phrases]

    async def _by_example(self, contexts: list[list[str]], marks: list[list[bool]]) -> list[str]:
        """Phrases that go on a few-shot prompt."""
        prompt = explainer.explanation_prompt(contexts, marks)
        answers = await self.writer.generate(
            [prompt], EXPLANATION_TOKENS, n=self._config.rlaif.candidates, stop=explainer.STOP, seed=self._config.seed
        )
        parsed = [explainer.parse_explanation(completion) for completion in answers[0] or []]
        self._parse_failures += parsed.count(None)
        return [phrase for phrase in parsed if phrase is not None]

    async def _by_chat(self, contexts: list[list[str]], marks: list[list[bool]]) -> list[str]:
        """Phrases of a chat model, held to a schema, the texts between delimiters."""
        texts = [Text(tuple(pieces), tuple(map(float, each))) for pieces, each in zip(contexts, marks, strict=True)]
        question = Question(
            Excerpts(texts, 1.0),
            "delimiters",
            task="Name what the marked words in the texts have in common, in a few words.",
            solved=(),
            situation="One unit of a language model is active on some tokens of these excerpts.",
            wanted="Name the most specific thing that the active tokens, or what stands around them, have in common.",
        )
        settings = self._config.judging.model_copy(update={"candidates": self._config.rlaif.candidates})
        answers = await ask([question], cast(Writer, self.writer), settings, self._config.seed)
        self._parse_failures += answers.failures
        return answers.phrases[0]

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
        """The counters of who is asked (tokens, calls, retries) and the explanations that did not parse."""
        total = self.client.statistics()
        if self.writer is not self.client:
            total = added(total, self.writer.statistics())
        return {**total, "parse_failures": self._parse_failures}

    @property
    def last_error(self) -> str | None:
        """Of the last call that failed, if any did."""
        return self.client.last_error or self.writer.last_error


def without_heldout(config: RunConfig) -> RunConfig:
    """The run with the judges that it trains on: the held-out one would hold its GPU until the evaluation."""
    return config.model_copy(update={"judges": {role: keys for role, keys in config.judges.items() if role != HELDOUT}})


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
