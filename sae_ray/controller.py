"""The run's top loop. It carries metadata and object references, never a tensor.

| who waits         | for what                          | who unblocks it          | deadline                      |
|-------------------|-----------------------------------|--------------------------|-------------------------------|
| places            | free resources, or new nodes      | Ray, its autoscaler      | `ray.wait_s`                  |
| a producer        | a lease                           | `BlockStream.pump`       | none: idle is fine            |
| the stream        | a block                           | a producer, or its death | `activations.lease_timeout_s` |
| the trainer group | the blocks of the next mix window | `BlockStream`            | the lease's                   |
| the controller    | a trained window                  | all ranks, or a death    | `trainer.step_timeout_s`      |
| a second save     | the one in flight                 | the ranks' writers       | 3 x `trainer.step_timeout_s`  |
| the RLAIF phase   | a judged round                    | `RewardDesk`             | `rlaif.round_timeout_s`       |
| the desk          | verdicts                          | the judge pool           | `judge.deadline_s`            |

One thread, one `ray.wait` over everything pending. The trainer runs ahead of a requested judging round by at
most `rlaif.max_staleness_steps`; then it waits, visibly. Rewards are applied between two windows, and the
event log says at which step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray

from sae_ray import logs
from sae_ray.activations.scaling import Trainer
from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig
from sae_ray.errors import RunInterrupted, UserError
from sae_ray.judge.pool import JudgePool
from sae_ray.measures import Measures
from sae_ray.placement import trainer_ask
from sae_ray.reservation import Reservation
from sae_ray.reward.applied import AppliedRounds
from sae_ray.reward.link import Calibrated, DeskDied, DeskLink, JudgedRound
from sae_ray.reward.pool_judge import without_heldout
from sae_ray.session import Deadline, Interrupt
from sae_ray.storage import LocalStorage
from sae_ray.telemetry import Progress, RateMeter, RunLog, RunStatus
from sae_ray.trainer import checkpoint
from sae_ray.trainer.claim import Claim
from sae_ray.trainer.group import RankDied, TrainerGroup
from sae_ray.trainer.mixing import Cursor
from sae_ray.trainer.pipeline import TrainedWindow, WindowPipeline
from sae_ray.trainer.saving import Saving

POLL_S = 1.0
WINDOWS_IN_FLIGHT = 2


class Controller:
    """One run, from an idle cluster to its last checkpoint."""

    def __init__(self, config: RunConfig, status: RunStatus, progress: Progress, log: RunLog, interrupt: Interrupt):
        self.config = config
        self.status = status
        self.progress = progress
        self.log = log
        self.interrupt = interrupt
        self.measures = Measures(config.name)
        self.stream = BlockStream(config, scaled=True)
        self.place: Reservation | None = None  # the trainer's, over all its generations
        # The held-out judge starts when the evaluation asks it, unless an alarm does.
        judges = config if config.rlaif.alarms.asks_held_out else without_heldout(config)
        self.judge = JudgePool(judges, keep_serve=config.ray.address == "local")
        self.desk = DeskLink(config, self.judge)
        self.claim = Claim(checkpoint.home(config), config.name)
        self.committed_step = 0
        self.saved_step = 0  # of the last snapshot: committed, or on its way
        self.saving: Saving | None = None
        self.rounds_done = self.saved_rounds = self.committed_rounds = 0  # applied, and in those snapshots
        self.generation = 0
        self.group: TrainerGroup
        self.pipeline: WindowPipeline
        self._evidence: list[ray.ObjectRef] = []
        self.rates = RateMeter()

    @property
    def submitted_step(self) -> int:
        """Steps handed to the ranks so far."""
        return self.pipeline.step

    # -- phases ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the last step; every phase can be entered by a resumed run."""
        self.progress.phase("starting", "producers and trainer ranks")
        # All places before any judge deploys: judges would take what is free, and keep it.
        self.place = Reservation(trainer_ask(self.config.trainer))
        self.stream.start(on_wait=self._on_wait, beside=[self.place])
        for producer in self.stream.producers:
            self.log.event("stream", what="producer_ready", **producer)
        died: RankDied | None = None
        while True:
            try:
                if died is not None:
                    self._end_generation(died)
                self._start_group()
                return self._phases()
            except RankDied as error:
                died = error

    def _phases(self) -> None:
        """All phases from wherever the group stands, after a resume as after a rebuild."""
        config = self.config
        if config.rlaif.judged and self.submitted_step < config.total_steps and not self.desk.started:
            self.desk.start()
        if self.submitted_step < config.trainer.steps:
            self.progress.phase("reconstruction", f"{config.trainer.steps} steps")
            self._train_until(config.trainer.steps)
            self._save(pin="reconstruction")
        elif not config.trainer.steps and checkpoint.latest(checkpoint.home(config)) is None:
            self._save(pin="reconstruction")  # the SAE that was brought along, to compare with
        if config.rlaif.enabled and self.submitted_step < config.total_steps:
            self._rlaif_phase()
        self._finish_save()
        if self.committed_step < self.submitted_step:
            self._save(pin="final")
        self.measures.show(self, at_once=True)
        waits = self.stream.waits
        self.log.event(
            "waits", trainer_wait_share=waits.trainer_wait_share, producers_idle_share=waits.producers_idle_share
        )
        self.progress.say(waits.told())

    def _rlaif_phase(self) -> None:
        config = self.config.rlaif
        self.progress.phase("evidence", f"{config.evidence_blocks} blocks of the evidence split")
        self._evidence = self._wait_evidence()
        if config.judged:
            self.progress.phase("calibration", "planted items, both verdict modes")
            limit = self.judge.start_limit_s + config.round_timeout_s
            self._wait_while(
                lambda: not self.desk.calibrated,
                Deadline(limit, f"the judge {self.judge.names} to start and be calibrated"),
            )
        if config.control and not self.group.has_control:
            self.group.fork_control()
        self.progress.phase("RLAIF", f"{config.steps} steps, {config.rounds} rounds, {config.latents} latents")
        for number in range(self.rounds_done, config.rounds):
            if config.judged:
                self._judge_round(number)
            else:
                self._replay_round(number)
        self._train_until(self.config.total_steps)

    def _judge_round(self, number: int) -> None:
        start = round_start(self.config, number)
        self._train_until(start)
        self.desk.open_round(number, self.submitted_step, self.group.rank_handles, self._evidence)
        self.log.event("round_requested", round=number, step=self.submitted_step)
        ahead = start + self.config.rlaif.max_staleness_steps
        self._train_until(min(ahead, round_start(self.config, number + 1)))
        self._wait_round(number)

    def _replay_round(self, number: int) -> None:
        """Another run's round, after the same step; nobody is asked anything."""
        folder = str(self.config.rlaif.replay_rewards)
        applied = AppliedRounds(LocalStorage(folder)).read(number)
        self._train_until(applied.at_step)
        self.status.judge = "replayed"
        self._apply(number, {**applied.summary, "replayed_from": folder}, applied.batch)

    # -- training -------------------------------------------------------------------------------------

    def _train_until(self, last_step: int) -> None:
        """Trains up to and including `last_step`."""
        while self.submitted_step < last_step or len(self.pipeline):
            self._submit_windows(last_step)
            self._wait_once(for_blocks=self.submitted_step < last_step)
            if self._save_due() and self.submitted_step < last_step and not len(self.pipeline):
                self._save()
            if self.interrupt.requested:
                self._stop_early()

    def _submit_windows(self, last_step: int) -> None:
        while (
            self.submitted_step < last_step
            and len(self.pipeline) < WINDOWS_IN_FLIGHT
            and not self._save_due()
            and self.stream.window_ready(self.pipeline.cursor.window)
        ):
            window = self.pipeline.cursor.window
            self.pipeline.submit(
                self.stream.window_refs(window),
                self.stream.window_tokens(window),
                last_step - self.submitted_step,
            )

    def _wait_once(self, for_blocks: bool = False) -> None:
        """Waits for anything at all, then hands each result to whoever it belongs to.

        Args:
            for_blocks: what an idle trainer waits for is blocks.
        """
        now = time.monotonic()
        trainer: Trainer = "trains" if len(self.pipeline) else "starves" if for_blocks else "elsewhere"
        for event in [*self.stream.observe(trainer, now), *self.stream.pump(now)]:
            self.log.event("stream", **event)
        self.desk.pump()
        self._pump_save()
        saving = self.saving.pending_refs() if self.saving is not None else []
        pending = [*self.stream.pending_refs(), *self.pipeline.pending_refs(), *self.desk.pending_refs(), *saving]
        done, _ = ray.wait(pending, num_returns=1, timeout=POLL_S, fetch_local=False) if pending else ([], [])
        for ref in done:
            if ref in saving:
                continue  # taken by the next turn's `_pump_save`
            if self.desk.owns(ref):
                self._on_judged(self.desk.on_ready(ref))
            elif self.stream.owns(ref):
                for event in self.stream.on_ready(ref, time.monotonic()):
                    self.log.event("stream", **event)
            elif (trained := self.pipeline.on_ready(ref)) is not None:
                self._on_window(trained)
        self.pipeline.check_deadlines()
        self.measures.show(self)
        self.progress.refresh()

    def _on_window(self, trained: TrainedWindow) -> None:
        if trained.ends_window:
            self.stream.trained(trained.window)
        result, status = trained.result, self.status
        status.trainer_wait_s = trained.wait_seconds
        logs.bind(step=result.last_step)
        rate = result.tokens / max(result.seconds - result.block_wait_seconds, 1e-9)
        self.log.metrics([row | {"rank_tokens_per_s": rate} for row in result.metrics])
        status.step = result.last_step
        status.tokens += result.tokens
        self.rates.add(result.tokens, result.last_step)
        if result.metrics:
            last = result.metrics[-1]
            status.fvu, status.l0, status.dead_fraction = last["fvu"], last["l0"], last["dead_fraction"]

    def _save_due(self) -> bool:
        return self.submitted_step - self.saved_step >= self.config.trainer.checkpoint_every

    def _save(self, pin: str | None = None) -> None:
        """Snapshots what has been trained, which is all that was submitted; training goes on while it is written.

        A pinned checkpoint is never pruned, and is committed before this returns.
        """
        self._finish_save()
        self.saving = self.group.begin_save(
            self.claim,
            self.submitted_step,
            self.pipeline.cursor,
            extra={
                "rounds_done": self.rounds_done,
                "rewards_applied": self.status.rewards_applied,
                "tokens": self.status.tokens,
            },
            pin=pin,
        )
        self.saved_step, self.saved_rounds = self.submitted_step, self.rounds_done
        if pin:
            self._finish_save()

    def _pump_save(self) -> None:
        """Commits the save in flight, if there is one and its files are written."""
        if self.saving is None or (cost := self.saving.pump(idle=not len(self.pipeline))) is None:
            return
        self.committed_step, self.committed_rounds, pin = self.saving.step, self.saved_rounds, self.saving.pin
        self.saving = None
        self.log.event("commit", step=self.committed_step, pin=pin, **cost)
        self.measures.committed()
        self.claim.check()
        checkpoint.prune(self.claim.home, self.config.trainer.keep_checkpoints)

    def _finish_save(self) -> None:
        began = time.monotonic()
        while self.saving is not None:
            self._wait_once()
        self.measures.waited("save", time.monotonic() - began)

    def _stop_early(self) -> None:
        self.progress.phase("stopping", "committing a checkpoint")
        while len(self.pipeline):
            self._wait_once()
        self._finish_save()
        if self.submitted_step > self.committed_step:
            self._save()
            self._finish_save()
        raise RunInterrupted(
            f"stopped at step {self.submitted_step} of {self.config.total_steps}; "
            "the checkpoint is committed, the same command resumes"
        )

    # -- the trainer group's life ---------------------------------------------------------------------

    def _start_group(self) -> None:
        """Builds the group from the last commit, or from scratch on the first window's activations."""
        logs.bind(generation=self.generation)
        self.group = TrainerGroup.start(self.config, self.stream.widths, self.generation, self._on_wait, self.place)
        self.log.event("group", generation=self.generation, nodes=self.group.addresses)
        self.claim.hold()  # before it is read what is there: nobody may commit after that
        path = checkpoint.latest(self.claim.home)
        if path is None:
            self.pipeline = WindowPipeline(self.config, self.group, Cursor(0, 0), 0)
            self.committed_step = self.saved_step = self.status.step = self.status.tokens = 0
            self.stream.seek(0)
            self._wait_first_window()
            self.group.build(self.stream.window_refs(0))
            return
        manifest = self.group.load_checkpoint(path)
        step, cursor, extra = manifest["step"], Cursor(*manifest["cursor"]), manifest["extra"]
        self.pipeline = WindowPipeline(self.config, self.group, cursor, step)
        self.committed_step = self.saved_step = self.status.step = step
        self.rounds_done = self.committed_rounds = extra["rounds_done"]
        self.status.rewards_applied, self.status.tokens = extra["rewards_applied"], extra["tokens"]
        self.stream.seek(cursor.window)
        self.log.event("resume", step=step, generation=self.generation)
        if self.generation == 0:
            self.progress.say(f"resuming at step {step} of {self.config.total_steps}, from {path}")
            if self.log.is_new:
                self.progress.say(
                    f"{self.config.run_dir} is new: metrics and verdicts of the steps before that were in the old one"
                )

    def _wait_first_window(self) -> None:
        deadline = Deadline(
            self.config.activations.lease_timeout_s * self.config.activations.mix_blocks,
            "the first mix window of activation blocks",
        )
        while not self.stream.window_ready(0):
            self._wait_once()
            deadline.check()
            if self.interrupt.requested:
                raise RunInterrupted("stopped before training began; nothing to resume")

    def _end_generation(self, died: RankDied) -> None:
        """A dead rank ends its generation: the whole group is built again from the last commit."""
        self.generation += 1
        self.log.event("rank_died", error=str(died), generation=self.generation)
        limit = self.config.trainer.max_restarts
        if self.generation > limit:
            told = f"the run was set back {self.generation} times (trainer.max_restarts = {limit})"
            raise UserError(f"{told}: {died}; the same command resumes from the last commit")
        who = "the reward desk" if isinstance(died, DeskDied) else "a trainer rank"
        self.progress.say(f"{who} died; building the group again from step {self.committed_step}")
        self.desk.abandon_round()
        self.rates.restart()  # steps begin again further back
        self.saving = None  # it never counted
        if hasattr(self, "group"):
            self.group.stop()
        if self.place is not None and not self.place.placed:  # it went with its node
            self.place.release()
            self.place = Reservation(trainer_ask(self.config.trainer))
        self.log.rewind(self.committed_step)

    # -- judging --------------------------------------------------------------------------------------

    def _wait_evidence(self) -> list[ray.ObjectRef]:
        ids = list(range(self.config.rlaif.evidence_blocks))
        limit = self.config.activations.lease_timeout_s * len(ids)
        deadline = Deadline(limit, f"{len(ids)} evidence blocks from the producers")
        self.stream.fetch("evidence", ids)
        self._wait_while(lambda: not self.stream.fetched("evidence", ids), deadline)
        return self.stream.fetched_refs("evidence", ids)

    def _wait_round(self, number: int) -> None:
        """The trainer has run ahead as far as it may; the rewards decide when it goes on."""
        if self.desk.round_open:
            self.progress.phase("RLAIF", f"step {self.submitted_step}: waiting for round {number + 1}")
        began = time.monotonic()
        self._wait_while(lambda: self.desk.round_open, Deadline(float("inf"), "a round"))
        self.measures.waited("round", time.monotonic() - began)
        self.rates.restart()
        self.progress.phase("RLAIF", f"round {self.rounds_done} of {self.config.rlaif.rounds} applied")

    def _on_judged(self, answer: Calibrated | JudgedRound) -> None:
        """Notes a calibration; installs a round's credit on every rank, between two windows."""
        if isinstance(answer, Calibrated):
            report = answer.report
            self.log.event("calibration", **report)
            self.progress.say(report["summary"])
            self.status.judge = f"{report['mode']} AUROC {report['auroc']:.2f}"
            return
        self._apply(answer.number, answer.summary, answer.batch)
        self.desk.keep(answer.number, self.submitted_step, self.committed_rounds)

    def _apply(self, number: int, summary: dict[str, Any], batch: Any) -> None:
        """A round's rewards (or a reference to them) on every rank, behind all steps that were submitted."""
        step = self.submitted_step
        self.group.apply_rewards(batch, self._evidence)
        self.rounds_done = number + 1
        self.status.rewards_applied += summary["rewards"]
        self.measures.rewarded(summary.get("judged_at_step"), summary.get("shared"))
        self.log.event("rewards_applied", round=number, at_step=step, **summary)
        alarms = f"; {summary['alarms']['told']}" if "alarms" in summary else ""
        null = "" if summary["mean_shuffled"] is None else f" (shuffled {summary['mean_shuffled']:.3f})"
        self.progress.say(
            f"round {number + 1}: {summary['verdicts']} verdicts, mean AUROC {summary['mean_auroc']:.3f}{null}, "
            f"{summary['rewards']} rewards applied at step {step}{alarms}"
        )
        if summary["drift"] is not None and summary["drift"]["status"] != "ok":
            self.progress.say(summary["drift"]["summary"])

    # -- shared ---------------------------------------------------------------------------------------

    def _wait_while(self, condition: Callable[[], bool], deadline: Deadline) -> None:
        while condition():
            self._wait_once()
            deadline.check()
            if self.interrupt.requested:
                self._stop_early()

    def _on_wait(self, message: str) -> None:
        self.status.detail = message
        self.progress.refresh()
        if self.interrupt.requested:
            raise RunInterrupted("stopped before training began")

    def prepare_evaluation(self) -> None:
        """Frees the trainer's place and the desk; producers and judges stay for the evaluation."""
        self._stop_group()
        self.desk.stop()

    def _stop_group(self) -> None:
        if hasattr(self, "group"):
            self.group.stop()
        if self.place is not None:
            self.place.release()

    def close(self) -> None:
        """Removes this run from the cluster: actors, placement groups, Serve apps."""
        self.desk.stop()
        self.judge.shutdown()
        self._stop_group()
        if self.saving is not None:  # it failed, perhaps for want of room
            with contextlib.suppress(UserError):
                self.claim.check()  # or what is uncommitted may be the save of who has taken over
                checkpoint.discard_uncommitted(self.claim.home)
        self.stream.stop()


def round_start(config: RunConfig, number: int) -> int:
    """Step at which judging round `number` is requested; rounds divide the RLAIF phase evenly."""
    return config.trainer.steps + number * config.rlaif.steps // config.rlaif.rounds
