"""The reward desk: turns the trainer's latents into evidence, verdicts, bank rows and rewards.

An async Ray actor between the trainer ranks and the judge pool. It pulls scans from the ranks and token ids
from the evidence blocks itself, so that neither passes through the controller, and it never holds up a
training step: ranks answer a scan between two windows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray

from sae_ray import logs
from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.judge.drift import DriftReport
from sae_ray.judge.pool import PoolWatch
from sae_ray.reward.applied import AppliedRound, AppliedRounds
from sae_ray.reward.bank import VerdictBank
from sae_ray.reward.carried import CarriedOver
from sae_ray.reward.composition import LatentReward
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.credit import ESTIMATORS, RewardBatch
from sae_ray.reward.decoder import DecoderFacts, duplicate_share, look_at_decoder
from sae_ray.reward.evidence import (
    POSITIVE,
    ContextScan,
    LatentPlan,
    PlannedVerdict,
    choose_latents,
    make_plans,
)
from sae_ray.reward.history import UnitRows
from sae_ray.reward.parts import OF_ROWS, OF_WHOLE_DECODER, Outcome, RewardParts
from sae_ray.reward.pool_judge import HELDOUT, PoolJudge, without_heldout
from sae_ray.reward.round_batch import reward_batch
from sae_ray.reward.rounds import Candidate, Choice, compete, detect, rewards_of
from sae_ray.reward.sharing import one_holder_each
from sae_ray.reward.siblings import look_around
from sae_ray.reward.watch import held_out_scores, told, unscanned, watch
from sae_ray.storage import LocalStorage

CHUNK_LATENTS = 8  # latents whose verdicts are committed together: what a crash can lose
CHUNKS_AT_ONCE = 2  # a replica; while one's explanations are being written, the judge reads the other's texts


@dataclass(frozen=True)
class _Judged:
    """A chunk of a round. held_out: what the held-out judge makes of the same explanations, where it is asked."""

    choices: list[Choice]
    rewards: list[LatentReward]
    rows: list[dict[str, Any]]
    held_out: list[LatentReward]


class RewardDesk:
    """One per run, as an actor. `progress()` answers while a round is under way.

    Args:
        keys: of judges elsewhere, see `judge.pool.endpoint_keys`.
        steering: actor handle of a `SteeringModel`, where the reward needs one.
    """

    def __init__(self, config_json: str, keys: Mapping[str, str] | None = None, steering: Any = None):
        os.environ.update(keys or {})
        self.config = RunConfig.model_validate_json(config_json)
        logs.start_actor(self.config, "desk")
        self.judge = PoolJudge(self.config)
        # Only an alarm that is asked for reads its verdicts before the evaluation.
        asked = self.config.rlaif.alarms.asks_held_out
        self.heldout = PoolJudge(self.config, HELDOUT, beside=self.judge) if asked else None
        self.parts = RewardParts(self.config, self.judge, steering)
        # Trust needs the shuffled null as well, except of an estimator that takes the reward: that one asks of trust
        # only whether there is any, and beating chance is enough for it.
        own = ESTIMATORS[self.config.rlaif.estimator]
        self._null = self.config.rlaif.rewards.weights.interpretability > 0 or not own.uses_reward
        self.bank = VerdictBank(LocalStorage(self.config.run_dir))
        self.applied = AppliedRounds(LocalStorage(self.config.run_dir))
        self._last: AppliedRound | None = None  # judged last, and not necessarily applied yet
        self.carried = CarriedOver(self.config.rlaif, LocalStorage(self.config.run_dir))
        self._watch = PoolWatch(self.config if self.heldout is not None else without_heldout(self.config))
        self._state = "starting"
        self._explanations: dict[int, Candidate] = {}
        for row in self.bank.read():
            if row["chosen"] and row["purpose"] == "score":
                self._explanations[row["latent"]] = Candidate(row["explanation"], row["explainer"])

    async def calibrate(self) -> dict[str, Any]:
        """Measures the judge on planted items, or finds its calibration on file; the pool must serve.

        Returns:
            The report that is also written to `calibration.json`.
        Raises:
            JudgeAtChance: no verdict mode of this judge beats chance.
            UserError: what parts of the reward need cannot be had.
        """
        self._state = "calibrating"
        report = await self.judge.calibrate()
        if self.heldout is not None:
            await self.heldout.calibrate()
        await self.parts.prepare()
        self._state = report["mode"]
        self.judge.preload(self.bank.read())
        return report

    async def judge_round(
        self, number: int, step: int, ranks: list[Any], evidence: list[ray.ObjectRef]
    ) -> tuple[dict[str, Any], ray.ObjectRef]:
        """One round: choose latents, scan, explain, judge, reward.

        Args:
            step: what the trainer had reached when the round was requested.
            ranks: the tp ranks that together hold all latents, in latent order.
            evidence: references to the evidence blocks.
        Returns:
            (summary for the log, reference to the `RewardBatch`).
        Raises:
            UserError: the judge has changed since it was calibrated, answers nothing, or no latent could be judged.
        """
        began = time.monotonic()
        logs.bind(step=step, round=number)
        # Straight after a calibration there is nothing to find.
        fresh = number == 0 and not self.judge.judge.on_file
        drift = None if fresh else await self.judge.check_drift()
        before = self.judge.usage()
        rng = np.random.default_rng([self.config.seed, 7, number])
        texts = ContextTexts(self.config, [await ref for ref in evidence])
        self.carried.start(number)
        latents = await self._latents_of_round(number, ranks, evidence, texts.n_contexts, rng)
        scan = await self._scan(ranks, evidence, self.carried.to_scan(latents))
        unit = await self._unit_rows(ranks, scan.latents)
        if self.carried.on:
            self.carried.begin(latents, scan, unit)
        tokens, asked = self.config.judge.context_tokens, self.config.rlaif.siblings > 0
        near = await look_around(ranks, evidence, tokens, latents, scan, unit) if asked else None
        # In a thread: over many contexts and latents this takes long, and `progress` is to answer meanwhile.
        plans = await asyncio.to_thread(make_plans, self.config, scan, number, latents, near)
        self.judge.bind(texts, scan)
        followed = await self._scan_followed(number, ranks, evidence, scan)
        decoder = await self._look_at_decoder(ranks, evidence, scan)
        chunks = asyncio.Semaphore(CHUNKS_AT_ONCE * self.config.judge.replicas_worth)

        async def judge(start: int) -> _Judged:
            async with chunks:
                return await self._judge_chunk(number, step, start, plans[start : start + CHUNK_LATENTS], scan, texts)

        judged = await asyncio.gather(*(judge(start) for start in range(0, len(plans), CHUNK_LATENTS)))
        choices = [choice for chunk in judged for choice in chunk.choices]
        rewards = one_holder_each([reward for chunk in judged for reward in chunk.rewards], choices, scan, unit)
        rows = [row for chunk in judged for row in chunk.rows]
        after = self.judge.usage()
        if after["failed"] > before["failed"] and after["done"] == before["done"]:
            raise UserError(
                f"rlaif: round {number}: the judge {self.judge.judge.name} answered none of "
                f"{after['failed'] - before['failed']:.0f} questions; the last error: {self.judge.last_error}"
            )
        if not rewards:
            raise UserError(
                f"rlaif: round {number} found no latent that could be judged ({len(latents)} chosen, {len(plans)} "
                "planned); more evidence_blocks or fewer positives would give each latent more active contexts"
            )
        deal = np.random.default_rng([self.config.seed, 10, number]) if self.config.rlaif.shuffle_verdicts else None
        own = self.config.rlaif.verdict_cut == "own"
        batch = reward_batch(number, step, rewards, rows, self.judge.rates, deal, own_cuts=own)
        decoder_ND = unit.decoder_ND if ESTIMATORS[self.config.rlaif.estimator].of_decoder else None
        batch = self.carried.finish(batch, rewards, scan).judged_at(unit.latents, unit.encoder_ND, decoder_ND)
        batch, about, memory = await self._weighed(
            batch,
            Outcome(scan, texts, choices, rewards, decoder),
            [reward for chunk in judged for reward in chunk.held_out],
            followed,
        )
        credited = [reward for reward in rewards if reward.credit_weight > 0]
        summary = {
            "judged_at_step": step,
            "latents": len(rewards),
            "rewards": len(credited),
            "shared": sum(reward.lost_to is not None for reward in rewards),
            "verdicts": sum(row["score"] is not None for row in rows),
            "missing": sum(row["score"] is None for row in rows),
            "mean_auroc": float(np.mean([reward.auroc for reward in rewards])),
            "mean_shuffled": float(np.mean([reward.shuffled for reward in rewards])) if self._null else None,
            "seconds": time.monotonic() - began,
            "usage": self.judge.usage(),
            "drift": None if drift is None else drift_row(drift),
            **about,
            **self.carried.summary(),
        }
        self._last = AppliedRound(batch, -1, summary, memory)
        return summary, ray.put(batch)

    def keep(self, number: int, at_step: int, committed_rounds: int = 0) -> None:
        """Writes the round judged last into the run's folder: it has been installed after step `at_step`.

        Args:
            committed_rounds: those that the last checkpoint knows; what only earlier ones needed is removed.
        """
        if self._last is None or self._last.batch.round != number:
            raise RuntimeError(f"round {number} is to be kept, and is not the one that was judged last")
        self.applied.write(replace(self._last, at_step=at_step))
        self.carried.forget(committed_rounds)

    def progress(self) -> dict[str, Any]:
        """Live counters of the judging: queue, verdicts, verdicts per second while judging."""
        self._watch.look()
        return {"state": self._state, **self.judge.progress()}

    async def _latents_of_round(
        self, number: int, ranks: list[Any], evidence: list[ray.ObjectRef], n_contexts: int, rng: np.random.Generator
    ) -> np.ndarray:
        """By `rlaif.choose`: unless it says otherwise, those of the first round again, so that their rewards can be
        followed."""
        config = self.config.rlaif
        if number and self._explanations and config.choose == "first":
            return np.array(sorted(self._explanations))[: config.latents]
        counts = await asyncio.gather(
            *(rank.count_contexts.remote(evidence, self.config.judge.context_tokens) for rank in ranks)
        )
        need = config.positives + config.explainer_examples
        if number and config.choose == "value":
            now = await self._unit_rows(ranks, self.carried.history.latents())
            return self.carried.choose(np.concatenate(counts), n_contexts, need, now, rng)
        return choose_latents(np.concatenate(counts), n_contexts, config.latents, need, config.max_context_share, rng)

    async def _scan(self, ranks: list[Any], evidence: list[ray.ObjectRef], latents: np.ndarray) -> ContextScan:
        tokens = self.config.judge.context_tokens
        return ContextScan.merge(
            await asyncio.gather(*(rank.scan.remote(evidence, tokens, latents.tolist()) for rank in ranks))
        )

    async def _look_at_decoder(
        self, ranks: list[Any], evidence: list[ray.ObjectRef], scan: ContextScan
    ) -> DecoderFacts | None:
        """What parts and alarms need of it, as it was scanned; None where they need nothing."""
        needed, alarms = self.parts.needed, self.config.rlaif.alarms
        whole = bool(needed & OF_WHOLE_DECODER) or (alarms.enabled and alarms.duplicates)
        if not whole and not needed & OF_ROWS:
            return None
        return await look_at_decoder(
            ranks,
            self.config.sae.d_sae,
            scan,
            lambda latents: self._scan(ranks, evidence, latents),
            whole=whole,
            near="splitting" in needed,
        )

    async def _scan_followed(
        self, number: int, ranks: list[Any], evidence: list[ray.ObjectRef], scan: ContextScan
    ) -> ContextScan | None:
        """Of latents that the alarms follow and this round does not judge; None: there are none.

        Apart from the round's own scan, in which they would be siblings to judge others against.
        """
        if not self.config.rlaif.alarms.enabled:
            return None
        latents = unscanned(self.applied.memory_before(number).get("alarms", {}), scan)
        return await self._scan(ranks, evidence, latents) if len(latents) else None

    async def _weighed(
        self, batch: RewardBatch, outcome: Outcome, held_out: Sequence[LatentReward], followed: ContextScan | None
    ) -> tuple[RewardBatch, dict[str, Any], dict[str, Any]]:
        """(the batch with the parts' advantages and the alarms' factor, both for the log, and for the next round).

        With interpretability alone and without alarms the batch is as it was.
        """
        alarms = self.config.rlaif.alarms
        about: dict[str, Any] = {}
        memory: dict[str, Any] = {}
        if not self.parts.needed and not alarms.enabled:
            return batch, about, memory
        # Of the files, so that a resumed run, or a round that is judged again, goes on from the same numbers.
        before = self.applied.memory_before(batch.round)
        if self.parts.needed:
            combined, memory["parts"] = await self.parts.combine(outcome, before.get("parts", {}))
            rollouts = self.parts.rollouts
            if rollouts is not None and self.config.rlaif.shuffle_verdicts:
                deal = np.random.default_rng([self.config.seed, 24, batch.round])
                rollouts = replace(rollouts, reward=deal.permutation(rollouts.reward))
            batch = replace(batch, reward=self.parts.rewards_of(combined, batch.latents), rollouts=rollouts)
            about["parts"] = finite(combined.log)
            if rollouts is not None:
                about["rollouts"] = int(np.isfinite(rollouts.reward).sum())
        if alarms.enabled:
            twins = None
            if alarms.duplicates and outcome.decoder is not None and outcome.decoder.whole_MO is not None:
                twins = await asyncio.to_thread(duplicate_share, outcome.decoder.whole_MO)
            report, memory["alarms"] = await asyncio.to_thread(
                watch,
                alarms,
                before.get("alarms", {}),
                outcome.scan,
                outcome.texts,
                twins,
                held_out_scores(outcome.rewards, held_out),
                followed,
            )
            batch = replace(batch, gamma_factor=report.factor)
            about["alarms"] = {"state": report.state, "told": told(report), **finite(report.log())}
        return batch, about, memory

    async def _unit_rows(self, ranks: list[Any], latents: np.ndarray) -> UnitRows:
        return UnitRows.merge(await asyncio.gather(*(rank.unit_rows.remote(latents.tolist()) for rank in ranks)))

    async def _judge_chunk(
        self, number: int, step: int, start: int, plans: list[LatentPlan], scan: ContextScan, texts: ContextTexts
    ) -> _Judged:
        column_of = {int(latent): column for column, latent in enumerate(scan.latents)}

        def make_row(
            plan: LatentPlan,
            candidate: Candidate,
            verdict: PlannedVerdict,
            raw: float | None,
            *,
            chosen: bool,
            purpose: str,
        ) -> dict[str, Any]:
            column = column_of[plan.latent]
            return {
                "round": number, "sae_step": step, "latent": plan.latent, "explanation": candidate.text,
                "explainer": candidate.explainer, "chosen": chosen, "purpose": purpose, "context": verdict.context,
                "text": texts[verdict.context], "kind": verdict.kind, "active": verdict.kind == POSITIVE,
                "activation": float(scan.act_CN[verdict.context, column]),
                "token": int(scan.token_CN[verdict.context, column]), "weight": verdict.weight,
                "margin": float(scan.margin_CN[verdict.context, column]),
                **self.judge.about(), "score": raw,
                "probability": None if raw is None else self.judge.probability(candidate.text, raw),
            }  # fmt: skip

        choices, rows = await compete(plans, self._explanations, texts, self.carried.explainer(self.judge), make_row)
        seed = [self.config.seed, 8, number, start]
        detections, more = await detect(
            choices, texts, self.judge, make_row, np.random.default_rng(seed), null=self._null
        )
        rewards = rewards_of(choices, detections)
        held_out: list[LatentReward] = []
        if self.heldout is not None:
            # The same pairs and the same shuffling; nothing is trained on these verdicts, so none is banked.
            found, _ = await detect(
                choices, texts, self.heldout, lambda *_, **__: {}, np.random.default_rng(seed), null=self._null
            )
            held_out = rewards_of(choices, found)
        rows += more
        if rows:
            self.bank.append(rows)
        self._explanations |= {r.latent: Candidate(r.explanation, r.explainer) for r in rewards}
        return _Judged(choices, rewards, rows, held_out)


def drift_row(report: DriftReport) -> dict[str, Any]:
    """A drift check for the event log; figures that could not be had are None."""
    return {"summary": report.summary} | finite(asdict(report))


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as None: they could not be had."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in values.items()
    }
