"""Who waits for whom, and how many producers keep the trainer busy. Pure: no Ray, no clock; `now` is an argument.

What the loop saw at one turn counts until its next turn. Time in which the trainer waits for something else than blocks
(rewards, the first window, a checkpoint) says nothing about producers and counts for neither side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Trainer = Literal["trains", "starves", "elsewhere"]

# More producers where the trainer has waited for more than this share of so many seconds.
GROW_SHARE, GROW_AFTER_S = 0.05, 30.0
# One fewer where it has hardly waited for so long, and this many producers' time was idle: without one of them the
# others still have a quarter of a producer to spare.
SHRINK_SHARE, SHRINK_AFTER_S, SHRINK_IDLE = 0.01, 60.0, 1.25
# Where this share of the producers' time is idle, blocks are held back by the window, and more producers do not help.
HELD_BACK = 0.5
# What is longer ago than this counts half, and so on.
FORGET_S = 120.0
# A number that starved the trainer is not tried again for so long.
REMEMBER_S = 600.0


class Seen(NamedTuple):
    """What the loop sees at one turn."""

    trainer: Trainer
    ready: int  # producers that serve
    idle: int  # of those: without a lease, because nothing is up for one


@dataclass
class Shares:
    """Seconds of the trainer, and producer-seconds, by what they were spent on."""

    trained_s: float = 0.0
    starved_s: float = 0.0
    produced_s: float = 0.0
    idle_s: float = 0.0

    def add(self, seen: Seen, seconds: float) -> None:
        if seen.trainer == "elsewhere":
            return
        if seen.trainer == "trains":
            self.trained_s += seconds
        else:
            self.starved_s += seconds
        self.idle_s += seconds * seen.idle
        self.produced_s += seconds * (seen.ready - seen.idle)

    def halved(self) -> Shares:
        return Shares(self.trained_s / 2, self.starved_s / 2, self.produced_s / 2, self.idle_s / 2)

    @property
    def seconds(self) -> float:
        return self.trained_s + self.starved_s

    @property
    def producer_s(self) -> float:
        return self.produced_s + self.idle_s

    @property
    def trainer_wait_share(self) -> float | None:
        """Share of its time that the trainer waited for blocks; None before there was any."""
        return self.starved_s / self.seconds if self.seconds else None

    @property
    def producers_idle_share(self) -> float | None:
        """Share of their time in which producers had nothing to do."""
        return self.idle_s / self.producer_s if self.producer_s else None

    def told(self) -> str:
        """Which side waits, in words."""
        if self.trainer_wait_share is None or self.producers_idle_share is None:
            return "nothing was trained yet"
        told = f"the trainer waited for blocks {self.trainer_wait_share:.1%} of its time, "
        told += f"producers idled {self.producers_idle_share:.1%}"
        if self.trainer_wait_share <= GROW_SHARE:
            return told
        if self.producers_idle_share >= HELD_BACK:
            return f"{told}: a larger activations.window_blocks would let them work"
        return f"{told}: more activations.producers would help"


class ProducerScaling:
    """Decides how many producers there should be, between `least` and `most`.

    Args:
        least, most: equal where their number is fixed; then this only keeps the shares.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self.total = Shares()  # of the whole run
        self._lately = Shares()  # since the number of producers last changed
        self._seen: Seen | None = None
        self._at = 0.0
        self._too_few = 0
        self._remembered_at = -math.inf
        self._refused_at = -math.inf

    def observe(self, seen: Seen, now: float) -> None:
        """Takes in what the loop sees now."""
        if self._seen is not None:
            self.total.add(self._seen, now - self._at)
            self._lately.add(self._seen, now - self._at)
            if self._seen.ready != seen.ready:
                self._lately = Shares()
            elif self._lately.seconds > FORGET_S:
                self._lately = self._lately.halved()
        self._seen, self._at = seen, now

    @property
    def because(self) -> str:
        """What was seen since the number last changed, in words."""
        return self._lately.told()

    def refused(self) -> None:
        """The cluster had no place for one more."""
        self._refused_at = self._at

    def wanted(self) -> int:
        """How many producers there should be; asked while none is starting or leaving."""
        lately, seen = self._lately, self._seen
        if seen is None or self.least == self.most:
            return self.least if seen is None else max(seen.ready, self.least)
        now, waits, idle = seen.ready, lately.trainer_wait_share or 0.0, lately.producers_idle_share or 0.0
        may_grow = self._at - self._refused_at > REMEMBER_S and now < self.most
        if may_grow and lately.seconds >= GROW_AFTER_S and waits > GROW_SHARE and idle < HELD_BACK:
            self._too_few, self._remembered_at = now, self._at
            # They feed the trainer for 1 - waits of its time; never more than twice as many at once.
            enough = math.ceil(now / max(1 - waits, 0.5))
            return max(self.least, min(self.most, max(enough, now + 1)))
        may_shrink = now - 1 > self._too_few or self._at - self._remembered_at > REMEMBER_S
        if lately.seconds >= SHRINK_AFTER_S and waits < SHRINK_SHARE and idle * now >= SHRINK_IDLE and may_shrink:
            return max(self.least, now - 1)
        return max(self.least, min(self.most, now))
