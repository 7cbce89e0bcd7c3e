"""What a judge's work looks like from outside: counters of a caller, Ray's metrics, and an engine's busy time.

Two shares of a replica's time are told apart. `busy`: at least one request was with the engine, so nobody else kept it
waiting. `stepping`: the engine's workers were executing a batch. A busy engine that does not step spends its time on
scheduling, on messages between processes, or waits for a core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

# Whose rise is exported, as `sae_ray_pool_<name>`; the rest of `Counters` are sums of these or levels.
_EXPORTED = (
    *("done", "failed", "unreadable", "retries", "back_pressure", "cache_hits", "disk_hits"),
    *("prompt_tokens", "cached_tokens", "output_tokens"),
)
_CALL_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300]
# up, busy and step seconds of a replica
_Report = tuple[float, ...]


@dataclass
class Counters:
    """What a client has asked for, in readings and prompts. `submitted == done + failed + running` at every moment.

    unreadable: answers (of those done) that held no usable number: NaN, a placeholder, garbage. retries: calls asked
    again after a failure. back_pressure: calls put off because every replica's queue was full. cache_hits, disk_hits:
    readings that memory and the verdict cache answered. queued: calls that wait for one of the caller's own slots.
    """

    submitted: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0
    unreadable: int = 0
    calls: int = 0
    queued: int = 0
    open_calls: int = 0
    retries: int = 0
    back_pressure: int = 0
    cache_hits: int = 0
    disk_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed: int = 0
    call_seconds: float = 0.0


class PoolMetrics:
    """`sae_ray_pool_*` on Ray's metrics endpoint, tagged with the run and the judge's role.

    Made where Ray runs; a caller without a run's name, or without Ray, exports nothing.
    """

    def __init__(self, run: str, role: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        tags = {"run": run, "role": role}
        self._sent = Counters()
        self._counters = {
            name: Counter(f"sae_ray_pool_{name}", description=f"judge pool: {name}", tag_keys=tuple(tags))
            for name in _EXPORTED
        }
        self._levels = {
            name: Gauge(f"sae_ray_pool_{name}", description=f"judge pool: {name}", tag_keys=tuple(tags))
            for name in ("queued_calls", "open_calls", "running", "replicas", "busy_share", "step_share")
        }
        self._seconds = Histogram(
            "sae_ray_pool_call_seconds",
            description="judge pool: seconds from a call's slot to its answer, retries included",
            boundaries=_CALL_SECONDS,
            tag_keys=tuple(tags),
        )
        for metric in (*self._counters.values(), *self._levels.values(), self._seconds):
            metric.set_default_tags(tags)

    def call(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def update(self, counters: Counters, shares: BusyShare) -> None:
        """Export what has changed since the last time."""
        for name, metric in self._counters.items():
            if (rise := getattr(counters, name) - getattr(self._sent, name)) > 0:
                metric.inc(rise)
        self._sent = Counters(**{each.name: getattr(counters, each.name) for each in fields(Counters)})
        self._levels["queued_calls"].set(counters.queued)
        self._levels["open_calls"].set(counters.open_calls)
        self._levels["running"].set(counters.running)
        for name, share in (("busy_share", shares.value), ("step_share", shares.stepping)):
            if share is not None:
                self._levels[name].set(share)

    def replicas(self, running: int) -> None:
        self._levels["replicas"].set(running)


class BusyClock:
    """How long something had at least one request running, and when it last finished one. Seconds of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._busy = 0.0
        self._since: float | None = None
        self._progress = self._began
        self.running = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        now = self._clock()
        if self.running == 0:
            self._since = self._progress = now
        self.running += 1
        try:
            yield
        finally:
            now = self._clock()
            self.running -= 1
            self._progress = now
            if self.running == 0 and self._since is not None:
                self._busy += now - self._since
                self._since = None

    @property
    def busy_s(self) -> float:
        return self._busy + (0.0 if self._since is None else self._clock() - self._since)

    @property
    def up_s(self) -> float:
        return self._clock() - self._began

    @property
    def stalled_s(self) -> float:
        """Seconds without a finished request while some are running; 0 when idle."""
        return self._clock() - self._progress if self.running else 0.0


class StepClock:
    """Seconds that an engine's workers have spent on batches, as the engine core itself timed each.

    The core reads its clock when it begins to wait for a batch's result and when that is there. While it schedules the
    next batch beside a running one it does not wait, so this is a lower bound; what it misses is the core's own work.
    A worker that waits for a processor core that others use is executing by this clock, as it is by the wall's.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0

    def add(self, elapsed_ms: float) -> None:
        self.seconds += elapsed_ms / 1000
        self.steps += 1


class BusyShare:
    """Over the replicas that answered a caller: busy seconds per second between each one's first and last report."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[_Report, _Report]] = {}

    def add(self, report: Mapping[str, Any]) -> None:
        """report: `replica`, `up_seconds`, `busy_seconds` and, if known, `step_seconds`, as `JudgeServer` attaches
        them to every answer."""
        now = tuple(float(report.get(key, math.nan)) for key in ("up_seconds", "busy_seconds", "step_seconds"))
        first, last = self._seen.get(report["replica"], (now, now))
        # Answers overtake each other.
        self._seen[report["replica"]] = (min(first, now), max(last, now))

    @property
    def value(self) -> float | None:
        """Share of the time in which at least one request was with the engine; None before a second report."""
        return self._share(1)

    @property
    def stepping(self) -> float | None:
        """Share of the time in which the engine executed a batch (see `StepClock`); None where no replica tells it."""
        return self._share(2)

    def _share(self, column: int) -> float | None:
        up = sum(last[0] - first[0] for first, last in self._seen.values())
        spent = sum(last[column] - first[column] for first, last in self._seen.values())
        return spent / up if up > 0 and math.isfinite(spent) else None


def added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Counters of two clients together; shares of time (each of its own replicas) and versions do not add up."""
    total = dict(one)
    for name, value in other.items():
        if name.endswith("_share"):
            known = [each for each in (total.get(name, math.nan), value) if math.isfinite(each)]
            total[name] = max(known, default=math.nan)
        elif name != "prompt_version":
            total[name] = total.get(name, 0) + value
    return total
