"""Every queue, wait, age and rate of a run as the controller sees them, on Ray's metrics endpoint and in `status.json`.

In the order of the table at the head of `controller.py`. What judges' clients and S3 count, they export themselves
(`judge/metrics.py`, `s3_traffic.py`). Nothing here takes more than a look: what has no value yet is left out.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_ray.controller import Controller

EVERY_S = 1.0
# Shares are of this much of the past.
SPAN_S = 60.0

# Fields of RunStatus.
OF_STATUS = {
    "step": "of the last trained window",
    "fvu": "fraction of variance unexplained",
    "l0": "active latents per token",
    "dead_fraction": "share of dead latents",
    "trainer_tokens_per_s": "tokens trained per second, waits included",
    "producer_tokens_per_s": "tokens that all producers deliver per second",
    "trainer_wait_s": "longest wait of a rank for blocks in the last window",
    "blocks_held": "blocks produced and not yet trained",
    "blocks_leased": "blocks that producers are computing",
    "judge_queue": "texts that wait for a verdict",
    "verdicts": "verdicts so far",
    "verdicts_per_s": "verdicts per second",
    "rewards_applied": "rewards applied so far",
}
MEASURED = {
    "steps_per_s": "training steps per second",
    "producers_ready": "producers that have loaded their model",
    "producers_starting": "producers that are being placed or load their model",
    "producers_idle": "producers that wait for a lease",
    "producer_restarts": "producers that died and were replaced",
    "blocks_reissued": "leases that were issued again",
    "blocks_duplicate": "blocks that were delivered twice and dropped",
    "oldest_lease_s": "age of the oldest lease",
    "trainer_wait_share": "share of the trainer's last minute spent waiting for blocks",
    "producers_idle_share": "share of the producers' last minute spent waiting for a lease",
    "windows_in_flight": "mix windows handed to the ranks",
    "oldest_window_s": "age of the oldest of them",
    "generation": "of the trainer group: how often it was built again",
    "uncommitted_steps": "steps that a failure would cost",
    "commit_age_s": "since the last commit",
    "save_age_s": "of the save that is being written; 0 for none",
    "save_wait_s": "seconds that training has waited for a save, in all",
    "round_age_s": "of the open judging round; 0 for none",
    "round_wait_s": "seconds that training has waited for rounds, in all",
    "round_steps_ahead": "steps trained since the open round was asked for",
    "rounds_done": "judging rounds applied",
    "reward_age_steps": "steps trained since the applied rewards were judged",
    "explanations_shared": "latents of the last round without credit: a close one fits their explanation better",
    "verdict_age_s": "since the last verdict, while some are waited for; 0 otherwise",
    "judge_backlog_s": "since texts last did not wait for verdicts",
}
NAMES = {**OF_STATUS, **MEASURED}


class Gauges:
    """`sae_ray_*` gauges of a run on Ray's metrics endpoint."""

    def __init__(self, run: str):
        from ray.util.metrics import Gauge

        self._gauges = {
            name: Gauge(f"sae_ray_{name}", description=f"sae_ray: {told}", tag_keys=("run",))
            for name, told in NAMES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, name: str, value: float) -> None:
        self._gauges[name].set(value)


class Share:
    """Share of the last minute: of two sums that grow, how much one grew per growth of the other."""

    def __init__(self) -> None:
        self._sums: deque[tuple[float, float, float]] = deque([(-1.0, 0.0, 0.0)])

    def add(self, now: float, part: float, whole: float) -> None:
        """What both sums are at the time `now` (seconds)."""
        self._sums.append((now, part, whole))
        while len(self._sums) > 2 and self._sums[1][0] < now - SPAN_S:
            self._sums.popleft()

    @property
    def value(self) -> float | None:
        (_, part, whole), (_, parts, wholes) = self._sums[0], self._sums[-1]
        return min(1.0, (parts - part) / (wholes - whole)) if wholes > whole else None


class Measures:
    """Told of what happens in a run; `show` looks at the rest.

    Args:
        gauges: that are set; None: this run's, on Ray's endpoint.
    """

    def __init__(self, run: str, gauges: Gauges | None = None):
        self._gauges = gauges or Gauges(run)
        self._trainer, self._producers = Share(), Share()
        self._committed = self._judged = self._empty = time.monotonic()
        self._shown = 0.0
        self._verdicts = 0
        self._judged_at: int | None = None
        self._shared: int | None = None
        self._waited = {"save": 0.0, "round": 0.0}
        self._round_s: float | None = None  # the last wait for a round

    def committed(self) -> None:
        self._committed = time.monotonic()

    def rewarded(self, judged_at_step: int | None, shared: int | None = None) -> None:
        """A round's rewards are applied; `shared` of its latents lost theirs to a close one (`reward.sharing`)."""
        self._judged_at, self._shared = judged_at_step, shared

    def waited(self, what: str, seconds: float) -> None:
        """The trainer stood still for a "save" or a "round"."""
        self._waited[what] += seconds
        if what == "round":
            self._round_s = seconds

    def show(self, run: Controller, at_once: bool = False) -> None:
        """Brings `run.status` up to date; once a second its `measures` too, and every gauge that has a value.

        Args:
            at_once: the measures too, however lately that was: nothing is to come.
        """
        self._look(run)
        now = time.monotonic()
        if now - self._shown < EVERY_S and not at_once:
            return
        self._shown = now
        measured = self.measure(run, now)
        run.status.measures = {name: value for name, value in measured.items() if value is not None}
        for name in OF_STATUS:
            if (value := getattr(run.status, name)) is not None:
                self._gauges.set(name, value)
        for name, value in run.status.measures.items():
            self._gauges.set(name, value)

    def _look(self, run: Controller) -> None:
        status, stream = run.status, run.stream.counters()
        status.producer_tokens_per_s = stream["tokens_per_s"]
        status.blocks_held, status.blocks_leased = stream["held"], stream["leased"]
        status.trainer_tokens_per_s = run.rates.tokens_per_s()
        status.seconds_left = self.seconds_left(run)
        if counters := run.desk.counters:
            status.judge_queue, status.verdicts = counters["queue"], counters["verdicts"]
            status.verdicts_per_s = counters["verdicts_per_s"]
            if not run.desk.calibrated:
                status.judge = counters["state"]

    def seconds_left(self, run: Controller) -> float | None:
        """Until the last step: steps at the recent rate, and the waits for rounds to come at the last one's length."""
        rlaif, steps_per_s = run.config.rlaif, run.rates.steps_per_s()
        rounds_left = rlaif.rounds - run.rounds_done if rlaif.judged else 0
        if steps_per_s is None or (rounds_left and self._round_s is None):
            return None
        return (run.config.total_steps - run.status.step) / steps_per_s + rounds_left * (self._round_s or 0)

    def measure(self, run: Controller, now: float) -> dict[str, float | None]:
        """All of `MEASURED`; None for what has no value yet. `now`: of `time.monotonic`."""
        stream, desk, status = run.stream.counters(), run.desk, run.status
        waits = run.stream.waits  # what the number of producers is decided by
        self._trainer.add(now, waits.starved_s, waits.seconds)
        self._producers.add(now, waits.idle_s, waits.producer_s)
        queue, verdicts = status.judge_queue, status.verdicts
        if verdicts != self._verdicts or not queue:
            self._verdicts, self._judged = verdicts, now
        if not queue:
            self._empty = now
        saving = run.saving
        return {
            "steps_per_s": run.rates.steps_per_s(),
            "producers_ready": stream["ready"],
            "producers_starting": stream["starting"],
            "producers_idle": stream["idle"],
            "producer_restarts": stream["restarts"],
            "blocks_reissued": stream["reissued"],
            "blocks_duplicate": stream["duplicates"],
            "oldest_lease_s": run.stream.oldest_lease_s(now),
            "trainer_wait_share": self._trainer.value,
            "producers_idle_share": self._producers.value,
            "windows_in_flight": len(run.pipeline),
            "oldest_window_s": run.pipeline.oldest_s(now),
            "generation": run.generation,
            "uncommitted_steps": run.submitted_step - run.committed_step,
            "commit_age_s": now - self._committed,
            "save_age_s": 0.0 if saving is None else saving.age_s,
            "save_wait_s": self._waited["save"],
            "round_age_s": desk.round_age_s,
            "round_wait_s": self._waited["round"],
            "round_steps_ahead": run.submitted_step - desk.round_step if desk.round_open else 0,
            "rounds_done": run.rounds_done,
            "reward_age_steps": None if self._judged_at is None else run.submitted_step - self._judged_at,
            "explanations_shared": self._shared,
            "verdict_age_s": now - self._judged,
            "judge_backlog_s": now - self._empty,
        }


def of_status(status: Any) -> dict[str, float]:
    """What a `RunStatus` tells, by name, without what it does not know."""
    values = {name: getattr(status, name) for name in OF_STATUS} | status.measures
    return {name: value for name, value in values.items() if value is not None}
