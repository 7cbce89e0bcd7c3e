"""Simulated time: work that shares cores, and timers that do not."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable


class Machine:
    """Simulated time: work that shares cores, and timers that do not.

    All work is slowed alike where more threads want to run than there are cores, so one clock of work done serves
    for all of it, and the order in which work ends never changes.
    """

    def __init__(self, cores: float | None) -> None:
        self.now = 0.0
        self._cores = math.inf if cores is None else cores
        self._done, self._threads = 0.0, 0.0
        self._work: list[tuple[float, int, float, Callable[[], None]]] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def work(self, seconds: float, threads: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._work, (self._done + seconds, next(self._order), threads, then))
        self._threads += threads

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + seconds, next(self._order), then))

    def advance(self, account: Callable[[float], None]) -> None:
        """To the next event; `account` is told how long that took, before anything changes."""
        if not self._work and not self._timers:
            raise RuntimeError("nothing left to happen: the loop waits for what nobody does")
        slowdown = max(1.0, self._threads / self._cores)
        ends = self.now + (self._work[0][0] - self._done) * slowdown if self._work else math.inf
        rings = self._timers[0][0] if self._timers else math.inf
        step = max(0.0, min(ends, rings) - self.now)
        account(step)
        self.now += step
        if rings < ends:
            self._done += step / slowdown
            heapq.heappop(self._timers)[2]()
            return
        self._done, _, threads, then = heapq.heappop(self._work)
        # Without work left the sum is exactly 0: rounding must not pile up over a long run.
        self._threads = self._threads - threads if self._work else 0.0
        then()


def gamma(mean: float, cv: float, rng: random.Random) -> float:
    """A gamma distributed duration; cv is its standard deviation over its mean, 0 gives the mean itself."""
    return mean if not cv or not mean else rng.gammavariate(cv**-2, mean * cv**2)
