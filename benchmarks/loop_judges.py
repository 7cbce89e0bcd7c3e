"""The judge pool of the loop's model: replicas that take one latent after another, and how many there are when."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from loop_clock import Machine, gamma

if TYPE_CHECKING:
    from loop_model import Loop, Rates


class Judges:
    """Replicas that take one latent after another, and Ray Serve's rule for how many there are."""

    def __init__(self, machine: Machine, loop: Loop, rates: Rates, rng: random.Random) -> None:
        self.machine, self.loop, self.rates, self.rng = machine, loop, rates, rng
        self.up = self.starting = self.serving = self.most = 0
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._trend, self._ticket = 0, 0

    def start(self) -> None:
        self._grow(self.loop.initial_replicas)

    def ask(self, seconds: float, then: Callable[[], None]) -> None:
        self._queue.append((seconds, then))
        self._turn()

    def _turn(self) -> None:
        while self._queue and self.serving < self.up:
            seconds, then = self._queue.popleft()
            self.serving += 1
            drawn = gamma(seconds, self.rates.latent_cv, self.rng)
            self.machine.work(drawn, self.rates.replica_threads, lambda then=then: self._served(then))
        self._watch()

    def _served(self, then: Callable[[], None]) -> None:
        self.serving -= 1
        then()
        self._turn()

    def _wanted(self) -> int:
        busy = math.ceil((self.serving + len(self._queue)) / self.loop.target_latents)
        return min(self.loop.max_replicas, max(self.loop.min_replicas, busy))

    def _watch(self) -> None:
        """A need for more or fewer replicas counts once it has lasted for its delay."""
        have = self.up + self.starting
        trend = (self._wanted() > have) - (self._wanted() < have)
        if trend == self._trend:
            return
        self._trend, self._ticket = trend, self._ticket + 1
        if trend:
            delay = self.loop.upscale_delay_s if trend > 0 else self.loop.downscale_delay_s
            self.machine.after(delay, lambda ticket=self._ticket: self._scale(ticket))

    def _scale(self, ticket: int) -> None:
        if ticket != self._ticket:
            return
        have, wanted = self.up + self.starting, self._wanted()
        if wanted > have:
            # From no replica at all Serve starts no more than this, however much waits.
            self._grow(min(wanted - have, math.ceil(self.loop.upscaling_factor)) if not have else wanted - have)
        else:
            self.up -= min(have - wanted, self.up - self.serving)
        self._trend = 0
        self._watch()

    def _grow(self, count: int) -> None:
        for _ in range(count):
            self.starting += 1
            # Loading is one thread's work, whatever the replica does later.
            self.machine.work(self.rates.replica_start_s, min(1, self.rates.replica_threads), self._started)
        self.most = max(self.most, self.up + self.starting)

    def _started(self) -> None:
        self.starting -= 1
        self.up += 1
        self._turn()
