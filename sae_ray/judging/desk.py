"""The judging desk: an async actor that explains and scores latents in batches and commits each.

What it needs it finds by itself (evidence on disk, judges by name), so that nothing but latent ids and counters
passes through the driver.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sae_ray import logs
from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.evidence.files import read_evidence
from sae_ray.evidence.types import QUANTILE, TOP, EvidenceSet, LatentEvidence
from sae_ray.judge import leniency
from sae_ray.judge.calibrated import Calibrated, calibrated
from sae_ray.judge.drift import DriftCheck
from sae_ray.judge.embedder import RemoteEmbedder
from sae_ray.judge.explainers import explainers
from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.metrics import added
from sae_ray.judge.pool import JudgePool, PoolWatch
from sae_ray.judge.prompts import Mode
from sae_ray.judge.roles import Role
from sae_ray.judge.scorers import scorers
from sae_ray.judge.scorers.base import Instruments, Score, ScoreJob
from sae_ray.judge.scorers.detection import Detection
from sae_ray.judge.scores import shuffled_explanations
from sae_ray.judge.subject_actor import RemoteSubject
from sae_ray.judge.verdict_cache import shared_cache
from sae_ray.judging import results
from sae_ray.judging.gather import evidence_prefix, kinds_of
from sae_ray.judging.selection import choose, halves
from sae_ray.storage import LocalStorage

HELD_OUT = "detection@heldout"


class JudgingDesk:
    """One per judging. `progress()` answers while a batch is under way.

    Args:
        embedder, subject: actors, or None where no scorer needs them.
        keys: of judges elsewhere, see `judge.pool.endpoint_keys`.
    """

    def __init__(
        self, config_json: str, embedder: Any = None, subject: Any = None, keys: Mapping[str, str] | None = None
    ):
        os.environ.update(keys or {})
        self.config = RunConfig.model_validate_json(config_json)
        logs.start_actor(self.config, "judging")
        self.storage = LocalStorage(self.config.run_dir)
        tokenizer = load_tokenizer(self.config.model)
        self.evidence: dict[str, EvidenceSet] = {
            kind: read_evidence(self.storage, evidence_prefix(kind), tokenizer) for kind in kinds_of(self.config)
        }
        self.embedder = None if embedder is None else RemoteEmbedder(embedder)
        self.subject = None if subject is None else RemoteSubject(subject)
        self._clients: dict[Any, Any] = {}
        self._judges: dict[str, Calibrated] = {}
        self._chosen: dict[tuple[str, int], Explanation] = {
            (row["kind"], row["latent"]): Explanation(row["explanation"], row["explainer"], row["cluster"])
            for row in results.read(self.storage, "explanations")
            if row["chosen"]
        }
        self._drift: DriftCheck | None = None
        self._parse_failures = 0
        self._watch = PoolWatch(self.config)
        self._state = "starting"

    def judged(self) -> dict[str, list[int]]:
        """Latents that there is enough evidence of, by kind."""
        return {kind: sorted(found.latents) for kind, found in self.evidence.items()}

    async def prepare(self) -> dict[str, Any]:
        """Measures the judges on planted items; the pool must serve. Returns the report of each role.

        Raises:
            JudgeAtChance: no verdict mode of a judge beats chance.
        """
        self._state = "calibrating"
        self._clients = dict(JudgePool(self.config).clients(shared_cache(self.config.runs_dir)))
        asked: tuple[Role, ...] = ("scorer", "heldout")
        for role in (role for role in asked if role in self._clients):
            self._judges[role] = await calibrated(self.config, role, self._clients[role], self.storage)
        self._state = "ready"
        return {role: judge.report for role, judge in self._judges.items()}

    async def judge(self, kind: str, latents: list[int], texts: int) -> dict[str, Any]:
        """Explains (those that have no explanation yet) and scores latents, and commits what was found.

        Args:
            texts: per class and latent.
        Returns:
            Counters: latents, scores, missing, stderr of each latent's first score, cost; usage: of all batches so far.
        """
        began, before = time.monotonic(), self.usage()
        found = self.evidence[kind]
        split = {latent: halves(found.latents[latent], found.contexts) for latent in latents}
        rows: dict[str, list[dict[str, Any]]] = {"verdicts": [], "explanations": [], "scores": []}
        self._state = f"explaining {len(latents)} {kind}s"
        await self._explain(kind, [split[latent][0] for latent in latents], found, rows)
        self._state = f"scoring {len(latents)} {kind}s"
        explained = [latent for latent in latents if (kind, latent) in self._chosen]
        scores = await self._score(kind, [split[latent][1] for latent in explained], found, texts, rows)
        after = self.usage()
        self._check_answered(before, after)
        results.commit(self.storage, rows)
        drift = await self._check_drift(after)
        first = self.config.judging.scorers[0]
        return {
            "kind": kind,
            "latents": len(latents),
            "unexplained": len(latents) - len(explained),
            "missing": sum(row["value"] is None for row in rows["scores"]),
            "stderr": {score.latent: score.stderr for score in scores if score.scorer == first},
            "seconds": round(time.monotonic() - began, 3),
            "cost": {name: after[name] - before.get(name, 0.0) for name in after},
            "usage": self.usage(),
            "drift": drift,
        }

    def progress(self) -> dict[str, Any]:
        self._watch.look()
        return {"state": self._state, **self.usage()}

    def usage(self) -> dict[str, float]:
        """Tokens and calls of all judges so far, and explanations that did not parse."""
        total: dict[str, float] = {"parse_failures": float(self._parse_failures)}
        for client in dict.fromkeys(self._clients.values()):
            total = added(total, client.statistics())
        # A share of time is that of the replicas that answer, as each client saw it since it first asked.
        return {name: value for name, value in total.items() if not name.endswith("_share") or np.isfinite(value)}

    # -- inside -----------------------------------------------------------------------------------------

    def _check_answered(self, before: dict[str, float], after: dict[str, float]) -> None:
        """A batch that no judge answered is an outage, not a finding: nothing of it is committed."""
        failed = after.get("failed", 0) - before.get("failed", 0)
        if failed > 0 and after.get("done", 0) == before.get("done", 0):
            errors = [client.last_error for client in self._clients.values() if client.last_error]
            told = errors[0] if errors else "no reason given"
            raise UserError(f"the judges answered none of {failed:.0f} questions; the last error: {told}")

    async def _check_drift(self, usage: dict[str, float]) -> str | None:
        """Every so many verdicts the judge is asked some planted items again; says what came of it."""
        judge = self._judges["scorer"]
        if not judge.calibration.anchors:
            return None
        if self._drift is None:
            self._drift = DriftCheck(judge.calibration)
        verdicts = int(usage.get("done", 0))
        if not self._drift.due(verdicts):
            return None

        async def ask(pairs: Sequence[tuple[str, str]], mode: Mode) -> list[float | None]:
            return await judge.score(pairs, mode, use_cache=False)

        return (await self._drift.check(ask, verdicts)).summary

    async def _explain(
        self, kind: str, latents: list[LatentEvidence], found: EvidenceSet, rows: dict[str, list[dict[str, Any]]]
    ) -> None:
        """Candidates of all explainers compete on texts that score nothing later."""
        settings, seed = self.config.judging, self.config.seed
        new = [latent for latent in latents if (kind, latent.latent) not in self._chosen]
        if not new:
            return
        writer = self._clients.get("explainer", self._clients["scorer"])
        writer.prompting = settings.prompting
        if settings.prompting == "auto":
            writer.prompting = "chat" if self._judges["scorer"].calibration.mode == "yes_no" else "few_shot"
        offered = await asyncio.gather(
            *(each.explain(new, found.contexts, writer, settings, seed) for each in explainers(settings.explainers))
        )
        candidates: list[list[Explanation]] = []
        for index in range(len(new)):
            distinct = {each.text.lower(): each for some, _ in offered for each in reversed(some[index])}
            candidates.append(list(distinct.values()))
        self._parse_failures += sum(failures for _, failures in offered)
        judge = self._judges["scorer"]
        n = max(4, settings.positives // 2)
        for latent, chosen in zip(
            new, await choose(new, candidates, found.contexts, judge, judge.calibration.probability, n), strict=True
        ):
            if chosen is None:
                continue
            self._chosen[kind, latent.latent] = chosen.explanation
            rows["verdicts"] += [{"kind": kind, "scorer": "selection", **row} for row in chosen.rows]
            rows["explanations"] += [
                {
                    "kind": kind, "latent": latent.latent, "explanation": each.text, "explainer": each.explainer,
                    "cluster": each.cluster, "chosen": each is chosen.explanation,
                    "f1": f1 if np.isfinite(f1) else None,
                }
                for each, f1 in chosen.candidates
            ]  # fmt: skip

    async def _score(
        self,
        kind: str,
        latents: list[LatentEvidence],
        found: EvidenceSet,
        texts: int,
        rows: dict[str, list[dict[str, Any]]],
    ) -> list[Score]:
        settings = self.config.judging.model_copy(update={"positives": texts, "negatives": texts})
        jobs = self._jobs(kind, latents)
        tools = {role: self._tools(role) for role in self._judges}
        runs = [(scorer, "scorer", scorer.name) for scorer in scorers(settings.scorers)]
        if kind != results.LATENT:
            # Neurons and random directions are no latents of the SAE, which is what the subject model computes.
            runs = [run for run in runs if "subject" not in run[0].needs]
        if "heldout" in tools:
            runs.append((Detection(), "heldout", HELD_OUT))
        all_scores: list[Score] = []
        for scorer, role, name in runs:
            scores = await scorer.score(jobs, found.contexts, tools[role], settings, self.config.seed)
            for job, score in zip(jobs, scores, strict=True):
                score = replace(score, scorer=name, extra=dict(score.extra) | _without_leniency(score))
                rows["scores"].append(results.score_row(kind, score, job.explanation, texts))
                rows["verdicts"] += [
                    {"kind": kind, "latent": score.latent, "scorer": name, "explanation": job.explanation.text, **each}
                    for each in map(_plain, score.verdicts)
                ]
                all_scores.append(score)
        return all_scores

    def _jobs(self, kind: str, latents: list[LatentEvidence]) -> list[ScoreJob]:
        """Each latent with its explanation and, as the null, another latent's of the same kind."""
        own = [self._chosen[kind, latent.latent] for latent in latents]
        if len(own) == 1:
            others = [each for (k, latent), each in self._chosen.items() if k == kind and latent != latents[0].latent]
            return [ScoreJob(latents[0], own[0], others[0] if others else None)]
        dealt = shuffled_explanations([each.text for each in own], self.config.seed) if own else []
        return [
            ScoreJob(latent, each, Explanation(text, "shuffled"))
            for latent, each, text in zip(latents, own, dealt, strict=True)
        ]

    def _tools(self, role: str) -> Instruments:
        return Instruments(self._judges[role], self.embedder, self.subject, self._judges[role].calibration)


def _without_leniency(score: Score) -> dict[str, float]:
    """Soft detection as the judge said it, and with what it grants any explanation taken out (`judge.leniency`)."""
    sides: dict[tuple[str, bool], list[float]] = {
        (p, positive): [] for p in ("score", "shuffled") for positive in (True, False)
    }
    for row in score.verdicts:
        probability = row.get("probability")
        if probability is not None and np.isfinite(probability) and row["purpose"] in ("score", "shuffled"):
            sides[row["purpose"], row["stratum"] in (TOP, QUANTILE)].append(float(probability))
    if not all(sides.values()):
        return {}
    own, wrong = ([sides[p, positive] for positive in (True, False)] for p in ("score", "shuffled"))
    found = leniency.detection(own[0], own[1], wrong[0], wrong[1])
    return {"soft_detection": found.raw, "without_leniency": found.corrected, "without_leniency_stderr": found.stderr}


def _plain(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict row as the Parquet file holds it."""
    known = {
        name: verdict.get(name) for name in ("context", "text", "stratum", "weight", "purpose", "raw", "probability")
    }
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in known.items()
    }


def check_settings(config: RunConfig) -> tuple[bool, bool]:
    """Whether the scorers need (an embedder, the subject model).

    Raises:
        UserError: an explainer or scorer is unknown, or stands twice.
    """
    settings = config.judging
    explainers(settings.explainers)
    chosen = scorers(settings.scorers)
    for key, names in (("explainers", settings.explainers), ("scorers", settings.scorers)):
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"judging.{key}: {twice[0]} stands twice")
    return tuple(any(need in scorer.needs for scorer in chosen) for need in ("embedder", "subject"))  # type: ignore[return-value]
