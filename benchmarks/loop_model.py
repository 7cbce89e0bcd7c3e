"""A discrete-event model of a run's loop: who waits for whom, and how long. Pure, standard library only.

`_script` is `sae_ray/controller.py` with actors replaced by durations: producers lease blocks inside a bounded window,
the trainer group takes whole mix windows with two in flight, rounds are judged by an autoscaled pool while the trainer
runs ahead by at most `max_staleness_steps`, and a due checkpoint drains the pipeline first.

Durations are those of a machine that does nothing else. With `Rates.cores` all share that many cores fairly, which is
what happens on one CPU machine; without it everyone has devices of their own. What is not modelled: faults, the
controller's own time (`controller_load.py` measures it), and how a replica's rate grows with the calls it has open.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loop_clock import Machine, gamma
from loop_judges import Judges

# As in sae_ray: BlockScheduler's leases per worker, and controller.WINDOWS_IN_FLIGHT.
LEASES, WINDOWS_IN_FLIGHT = 2, 2
TRAIN, SAVE, SCAN = "train", "save", "scan"
BLOCKS, REWARDS, EVIDENCE, JUDGE, START = "blocks", "rewards", "evidence", "judge start", "start"
# Who is to blame for a second of the trainer's time.
BLAMED = {
    TRAIN: "trainer", SCAN: "trainer", SAVE: "checkpoints", BLOCKS: "producers", EVIDENCE: "producers",
    REWARDS: "judges", JUDGE: "judges", START: "start",
}  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """What is run; names as in a run's config. The judge's work is counted in latents, not calls."""

    producers: int
    steps: int
    mix_blocks: int = 4
    window_blocks: int = 12
    steps_per_window: int = 8
    checkpoint_every: int = 1_000_000_000
    rlaif_steps: int = 0
    rounds: int = 0
    latents: int = 0
    evidence_blocks: int = 0
    max_staleness_steps: int = 60
    min_replicas: int = 1
    initial_replicas: int = 1
    max_replicas: int = 1
    target_latents: float = 8  # open latents per replica that autoscaling aims at
    open_latents: int = 16  # that the reward desk asks about at once
    upscale_delay_s: float = 5
    downscale_delay_s: float = 60
    upscaling_factor: float = 4

    @property
    def total_steps(self) -> int:
        return self.steps + self.rlaif_steps

    def round_start(self, number: int) -> int:
        return self.steps + number * self.rlaif_steps // self.rounds


@dataclass(frozen=True)
class Rates:
    """Seconds of one actor (the trainer group counts as one) with its threads or devices to itself.

    cv: standard deviation over mean; durations are gamma distributed, 0 makes them all alike.
    """

    block_s: float
    step_s: float
    latent_s: float = 0.0  # of one replica, in the first round
    later_latent_s: float | None = None  # in later rounds, whose explanations are known; None: the same
    rlaif_step_factor: float = 1.0  # 2 where a control copy is trained too
    window_s: float = 0.0  # fetching and mixing a window, which the ranks do not overlap with training
    scan_s: float = 0.0
    save_s: float = 0.0
    start_s: float = 0.0
    replica_start_s: float = 0.0
    calibration_s: float = 0.0
    block_cv: float = 0.0
    step_cv: float = 0.0
    latent_cv: float = 0.0
    cores: float | None = None
    producer_threads: float = 1
    trainer_threads: float = 1
    replica_threads: float = 1


@dataclass(frozen=True)
class Outcome:
    """time: the trainer's seconds by (phase, what it did or waited for). calibrated_at: after reconstruction began.
    segments: (steps, seconds) trained after each round's rewards. held: blocks produced and not trained at the end."""

    seconds: float
    steps: int
    phases: dict[str, float]
    time: dict[tuple[str, str], float]
    rounds: list[float]
    segments: list[tuple[int, float]]
    calibrated_at: float | None
    produced: int
    trained: int
    held: int
    most_held: int
    producer_busy: float  # share of the producers' time
    replica_seconds: float  # replicas up or starting
    replica_busy: float  # share of that in which they judged
    most_replicas: int

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds if self.seconds else math.nan

    def share(self, what: str, phase: str | None = None) -> float:
        """Of the trainer's time in a phase (None: in all), the share that went to `what`."""
        some = {kind: s for kind, s in self.time.items() if phase in (None, kind[0])}
        total = sum(some.values())
        return sum(s for (_, kind), s in some.items() if kind == what) / total if total else math.nan

    @property
    def blame(self) -> dict[str, float]:
        """Shares of the trainer's time by who it went to: trainer, producers, judges, checkpoints, start."""
        totals: Counter[str] = Counter()
        for (_, kind), seconds in self.time.items():
            totals[BLAMED[kind]] += seconds / self.seconds
        return dict(totals)

    @property
    def bottleneck(self) -> str:
        return max(self.blame.items(), key=lambda item: item[1])[0]


def bounds(loop: Loop, rates: Rates) -> dict[str, float]:
    """Least seconds that each population needs for its own share of the work, were the others infinitely fast."""
    windows = math.ceil(loop.total_steps / loop.steps_per_window)
    step_seconds = (loop.steps + loop.rlaif_steps * rates.rlaif_step_factor) * rates.step_s
    later = rates.latent_s if rates.later_latent_s is None else rates.later_latent_s
    judged = loop.latents * (rates.latent_s * min(loop.rounds, 1) + later * max(loop.rounds - 1, 0))
    return {
        "producers": (windows * loop.mix_blocks + loop.evidence_blocks) * rates.block_s / loop.producers,
        "trainer": windows * rates.window_s + step_seconds + loop.rounds * rates.scan_s,
        "judges": judged / max(1, loop.max_replicas),
    }


def simulate(loop: Loop, rates: Rates, seed: int = 0) -> Outcome:
    """One run from start to last step. The same arguments give the same outcome.

    Raises:
        RuntimeError: the loop cannot go on (a window that holds less than a mix, no replica ever).
    """
    return _Model(loop, rates, seed).run()


class _Model:
    def __init__(self, loop: Loop, rates: Rates, seed: int) -> None:
        self.loop, self.rates = loop, rates
        self.machine = Machine(rates.cores)
        self.rng = random.Random(seed)
        self.judges = Judges(self.machine, loop, rates, random.Random(seed + 1))
        # Producers and the window.
        self.leases: list[deque[int]] = [deque() for _ in range(loop.producers)]  # -1: an evidence block
        self.next_block = self.first_untrained = self.produced = self.held = self.most_held = 0
        self.delivered: Counter[int] = Counter()  # by window
        self.evidence_unleased = self.evidence_missing = 0
        self.producing = False
        # The trainer group and its pipeline.
        self.jobs: deque[tuple[str, float, Callable[[], None]]] = deque()
        self.job: str | None = None
        self.submitted = self.saved = self.window = self.batch = self.in_flight = 0
        self.unjudged = self.asking = 0
        # What is reported.
        self.phase, self.phase_began, self.reason = START, 0.0, START
        self.phases: dict[str, float] = {}
        self.time: Counter[tuple[str, str]] = Counter()
        self.rounds: list[float] = []
        self.segments: list[tuple[int, float]] = []
        self.calibrated_at: float | None = None
        self.busy_producers = self.replica_seconds = self.judging_seconds = 0.0

    def run(self) -> Outcome:
        for reason in self._script():
            self.reason = reason
            self.machine.advance(self._account)
        self._enter("end")
        seconds = self.machine.now
        return Outcome(
            seconds, self.submitted, self.phases, dict(self.time), self.rounds, self.segments, self.calibrated_at,
            self.produced, self.first_untrained, self.held, self.most_held,
            self.busy_producers / (seconds * self.loop.producers) if seconds else math.nan,
            self.replica_seconds,
            self.judging_seconds / self.replica_seconds if self.replica_seconds else math.nan,
            self.judges.most,
        )  # fmt: skip

    # -- the controller: each yield is one wait for anything at all, and names what the trainer would wait for ---------

    def _script(self) -> Iterator[str]:
        loop, rates = self.loop, self.rates
        if rates.start_s:
            started: list[bool] = []
            self.machine.after(rates.start_s, lambda: started.append(True))
            yield from self._while(lambda: not started, START)
        self.producing = True
        self._lease()
        # The SAE starts from the first window: the reconstruction phase begins when that is there.
        yield from self._while(lambda: self.delivered[0] < loop.mix_blocks, START)
        self._enter("reconstruction")
        if loop.rlaif_steps:
            self.judges.start()
            self.judges.ask(rates.calibration_s, self._on_calibrated)
        yield from self._train_until(loop.steps)
        yield from self._save()
        if loop.rlaif_steps:
            yield from self._rlaif()
            yield from self._save()

    def _rlaif(self) -> Iterator[str]:
        loop = self.loop
        self._enter("evidence")
        self.evidence_unleased = self.evidence_missing = loop.evidence_blocks
        self._lease()
        yield from self._while(lambda: self.evidence_missing > 0, EVIDENCE)
        self._enter("calibration")
        yield from self._while(lambda: self.calibrated_at is None, JUDGE)
        self._enter("RLAIF")
        for number in range(loop.rounds):
            start, asked = loop.round_start(number), self.machine.now
            self._give(SCAN, self.rates.scan_s, lambda number=number: self._ask_round(number))
            self.unjudged = loop.latents
            yield from self._train_until(min(start + loop.max_staleness_steps, loop.round_start(number + 1)))
            yield from self._while(lambda: self.unjudged > 0, REWARDS)
            self.rounds.append(self.machine.now - asked)
            at, began = self.submitted, self.machine.now
            yield from self._train_until(loop.round_start(number + 1))
            self.segments.append((self.submitted - at, self.machine.now - began))

    def _train_until(self, last: int) -> Iterator[str]:
        while self.submitted < last or self.in_flight:
            while (
                self.submitted < last
                and self.in_flight < WINDOWS_IN_FLIGHT
                and not self._save_due()
                and self.delivered[self.window] == self.loop.mix_blocks
            ):
                self._submit(last)
            if self._save_due() and self.submitted < last and not self.in_flight:
                yield from self._save()
                continue
            yield BLOCKS

    def _save(self) -> Iterator[str]:
        saved: list[bool] = []
        self.saved = self.submitted
        self._give(SAVE, self.rates.save_s, lambda: saved.append(True))
        yield from self._while(lambda: not saved, SAVE)

    def _save_due(self) -> bool:
        return self.submitted - self.saved >= self.loop.checkpoint_every

    def _while(self, condition: Callable[[], bool], reason: str) -> Iterator[str]:
        while condition():
            yield reason

    # -- producers ----------------------------------------------------------------------------------------

    def _lease(self) -> None:
        """One lease each before anyone gets a second; evidence first; train blocks inside the window only."""
        for depth in range(LEASES):
            for number, mine in enumerate(self.leases):
                if len(mine) > depth or not self.producing:
                    continue
                if self.evidence_unleased:
                    self.evidence_unleased -= 1
                    block = -1
                elif self.next_block < self.first_untrained + self.loop.window_blocks:
                    block, self.next_block = self.next_block, self.next_block + 1
                else:
                    return
                mine.append(block)
                if len(mine) == 1:
                    self._produce(number)

    def _produce(self, number: int) -> None:
        seconds = gamma(self.rates.block_s, self.rates.block_cv, self.rng)
        self.machine.work(seconds, self.rates.producer_threads, lambda: self._delivered(number))

    def _delivered(self, number: int) -> None:
        mine = self.leases[number]
        block = mine.popleft()
        if block < 0:
            self.evidence_missing -= 1
        else:
            self.produced += 1
            self.held += 1
            self.most_held = max(self.most_held, self.held)
            self.delivered[block // self.loop.mix_blocks] += 1
        if mine:
            self._produce(number)
        self._lease()

    # -- the trainer group ----------------------------------------------------------------------------------

    def _submit(self, last: int) -> None:
        loop, rates = self.loop, self.rates
        steps = min(loop.steps_per_window - self.batch, last - self.submitted)
        factor = rates.rlaif_step_factor if self.submitted >= loop.steps else 1.0
        seconds = rates.window_s + steps * gamma(rates.step_s, rates.step_cv, self.rng) * factor
        self.submitted, self.batch = self.submitted + steps, self.batch + steps
        ends = self.batch == loop.steps_per_window
        if ends:
            self.window, self.batch = self.window + 1, 0
        self.in_flight += 1
        self._give(TRAIN, seconds, lambda: self._trained(ends))

    def _trained(self, ends: bool) -> None:
        self.in_flight -= 1
        if ends:
            self.delivered.pop(self.first_untrained // self.loop.mix_blocks)
            self.first_untrained += self.loop.mix_blocks
            self.held -= self.loop.mix_blocks
            self._lease()

    def _give(self, kind: str, seconds: float, then: Callable[[], None]) -> None:
        self.jobs.append((kind, seconds, then))
        if self.job is None:
            self._next_job()

    def _next_job(self) -> None:
        self.job = None
        if self.jobs:
            self.job, seconds, then = self.jobs.popleft()

            def done() -> None:
                self._next_job()
                then()

            self.machine.work(seconds, self.rates.trainer_threads, done)

    # -- judging --------------------------------------------------------------------------------------------

    def _on_calibrated(self) -> None:
        self.calibrated_at = self.machine.now - self.phases.get(START, 0.0)

    def _ask_round(self, number: int) -> None:
        first = number == 0 or self.rates.later_latent_s is None
        seconds = self.rates.latent_s if first else self.rates.later_latent_s
        assert seconds is not None
        left = self.loop.latents

        def ask() -> None:
            nonlocal left
            if left:
                left -= 1
                self.judges.ask(seconds, judged)

        def judged() -> None:
            self.unjudged -= 1
            ask()

        for _ in range(min(self.loop.open_latents, left)):
            ask()

    # -- accounts -------------------------------------------------------------------------------------------

    def _enter(self, phase: str) -> None:
        if self.machine.now > self.phase_began:
            self.phases[self.phase] = self.machine.now - self.phase_began
        self.phase, self.phase_began = phase, self.machine.now

    def _account(self, seconds: float) -> None:
        self.time[self.phase, self.job or self.reason] += seconds
        self.busy_producers += seconds * sum(1 for mine in self.leases if mine)
        self.replica_seconds += seconds * (self.judges.up + self.judges.starting)
        self.judging_seconds += seconds * self.judges.serving
