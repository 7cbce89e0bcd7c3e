"""The controller's side of judging: the judge pool, the desk, and what is pending at them.

Like `BlockStream` for producers and `WindowPipeline` for ranks: the controller waits on `pending_refs()` with
everything else and hands what is ready to `on_ready`. Nothing here blocks, but for the small file of `keep`.

A desk that dies ends the generation, as a rank does: what it knew and had not written is judged again from the last
commit, by a new desk, and comes out the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.judge.pool import JudgePool, endpoint_keys
from sae_ray.reward.desk import RewardDesk
from sae_ray.reward.steering_actor import SteeringModel
from sae_ray.session import Deadline
from sae_ray.trainer.group import RankDied

JUDGE_POLL_S = 2.0


class DeskDied(RankDied):
    """The desk's process or its node is gone."""


@dataclass(frozen=True)
class Calibrated:
    report: dict[str, Any]


@dataclass(frozen=True)
class JudgedRound:
    number: int
    summary: dict[str, Any]
    batch: ray.ObjectRef  # of a RewardBatch


@dataclass(frozen=True)
class _OpenRound:
    number: int
    ref: ray.ObjectRef
    deadline: Deadline
    step: int
    began: float


class DeskLink:
    """One run's judging. Until `start`, nothing is pending."""

    def __init__(self, config: RunConfig, judge: JudgePool):
        self._config = config
        self._judge = judge
        self._desk: Any = None
        self._steering: Any = None
        self._calibration: ray.ObjectRef | None = None
        self._round: _OpenRound | None = None
        self._asked: ray.ObjectRef | None = None
        self._polled = 0.0
        self.calibrated = False
        self.counters: dict[str, Any] = {}  # the desk's last answer: state, queue, verdicts, verdicts_per_s

    @property
    def started(self) -> bool:
        return self._desk is not None

    @property
    def round_open(self) -> bool:
        return self._round is not None

    @property
    def round_age_s(self) -> float:
        """Since the open round was asked for; 0 for none."""
        return time.monotonic() - self._round.began if self._round is not None else 0.0

    @property
    def round_step(self) -> int:
        """What the trainer had reached when the open round was asked for; 0 for none."""
        return self._round.step if self._round is not None else 0

    def start(self) -> None:
        """Asks for judges, a desk and what it needs; returns at once. Training goes on while they come up."""
        self._judge.start()
        config, rewards = self._config.model_dump_json(), self._config.rlaif.rewards
        if rewards.weights.causality:
            place = rewards.causality
            steering: Any = ray.remote(SteeringModel).options(num_cpus=place.cpus, num_gpus=place.gpus)
            self._steering = steering.remote(config, "cuda" if place.gpus else "cpu", rewards.threads)
        desk = ray.remote(RewardDesk).options(num_cpus=0, max_concurrency=8)
        self._desk = desk.remote(config, endpoint_keys(self._config), self._steering)

    def stop(self) -> None:
        for actor in (self._desk, self._steering):
            if actor is not None:
                ray.kill(actor)
        self._desk = self._steering = self._calibration = self._round = self._asked = None
        self.calibrated = False

    def pump(self) -> None:
        """Starts the calibration once all judges serve, and refreshes the counters.

        Raises:
            UserError: a judge's deployment failed, or a round is overdue.
            DeskDied: while something is asked of it.
        """
        if self._desk is None:
            return
        now = time.monotonic()
        if not self.calibrated and self._calibration is None and now - self._polled >= JUDGE_POLL_S:
            self._polled = now
            if self._judge.ready(timeout=0):
                self._calibration = self._desk.calibrate.remote()
        if self._asked is None:
            self._asked = self._desk.progress.remote()
        elif ray.wait([self._asked], timeout=0)[0]:
            wanted = not self.calibrated or bool(self.pending_refs())
            try:
                self.counters, self._asked = self._value(self._asked, "the reward desk"), None
            except DeskDied:
                if wanted:  # else whoever opens the next round hears of it, if anybody does
                    raise
        # One that is judged is not overdue, however late the controller looks.
        if (late := self._round) is not None and not late.deadline.left_s and not ray.wait([late.ref], timeout=0)[0]:
            late.deadline.check()

    def pending_refs(self) -> list[ray.ObjectRef]:
        refs = [self._calibration, self._round.ref if self._round is not None else None]
        return [ref for ref in refs if ref is not None]

    def owns(self, ref: ray.ObjectRef) -> bool:
        return ref in self.pending_refs()

    def on_ready(self, ref: ray.ObjectRef) -> Calibrated | JudgedRound:
        """Takes a finished reference of `pending_refs()`.

        Raises:
            UserError: the judge is at chance, has changed or answers nothing, or no latent could be judged.
            RankDied: a rank that the round was scanning is gone, a node with the evidence, or the desk itself.
        """
        if ref == self._calibration:
            self._calibration = None
            report = self._value(ref, "judge calibration")
            self.calibrated = True
            return Calibrated(report)
        assert self._round is not None
        number, self._round = self._round.number, None
        summary, batch = self._value(ref, f"judging round {number}")
        return JudgedRound(number, summary, batch)

    def open_round(self, number: int, step: int, ranks: list[Any], evidence: list[ray.ObjectRef]) -> None:
        """Requests a round on the SAE as the ranks hold it after `step`.

        Raises:
            DeskDied: since the last round.
        """
        if self._desk is None:
            raise DeskDied(f"the reward desk died before round {number}")
        ref = self._desk.judge_round.remote(number, step, ranks, evidence)
        deadline = Deadline(self._config.rlaif.round_timeout_s, f"judging round {number}")
        self._round = _OpenRound(number, ref, deadline, step, time.monotonic())

    def keep(self, number: int, at_step: int, committed_rounds: int) -> None:
        """The desk writes the rewards of a round that has been applied; returns when they are on disk.

        Args:
            committed_rounds: those that the last checkpoint knows: a crash goes back to the one after them.
        Raises:
            UserError: they cannot be written.
            DeskDied: before they were.
        """
        if self._desk is None:
            raise DeskDied(f"the reward desk died before the rewards of round {number} were written")
        self._value(self._desk.keep.remote(number, at_step, committed_rounds), f"the rewards of round {number}")

    def abandon_round(self) -> None:
        """Forgets an open round whose ranks are gone. What it banked stays, so asking again is cheap."""
        if self._round is not None:
            ray.cancel(self._round.ref)
            self._round = None

    def _value(self, ref: ray.ObjectRef, what: str) -> Any:
        try:
            return ray.get(ref, timeout=60)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            if isinstance(error.cause, (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)):
                raise RankDied(f"{what}: {error.cause}") from error
            raise RuntimeError(f"{what} failed: {error}") from error
        except ray.exceptions.RayActorError as error:
            self.stop()  # the controller starts another with the next generation
            raise DeskDied(f"the reward desk died ({what}): {' '.join(str(error).split())}") from error
