"""Who computes which block next. Pure: no Ray, no clock; `now` is an argument.

Train blocks are wanted in id order, from the first untrained one to the end of the window. A block in there
is held (computed), leased, or up for a lease, and the lowest of the last kind goes first. So a lease that its
producer loses needs no queue of its own: it is the lowest again. A slot comes free when a block is trained.

Blocks of other splits are requested by name, are served before train blocks (someone waits for all of them),
and are held until released.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from sae_ray.corpus.reader import Split

Outcome = Literal["accepted", "duplicate", "stale"]


class BlockKey(NamedTuple):
    split: Split
    block_id: int


class BlockScheduler:
    """Leases of blocks to workers.

    Args:
        window_blocks: train blocks leased or held at once, at most.
        lease_timeout_s: seconds after which a lease goes to someone else.
        leases_per_worker: how many leases a worker holds; with two, it never idles while the driver is busy.

    `train_blocks` is how many train blocks there are at all; None: they never end.
    """

    def __init__(self, window_blocks: int, lease_timeout_s: float, leases_per_worker: int = 2) -> None:
        self.window_blocks = window_blocks
        self.lease_timeout_s = lease_timeout_s
        self.leases_per_worker = leases_per_worker
        self.first_untrained = 0
        self.train_blocks: int | None = None
        self._held: set[BlockKey] = set()
        self._leased: set[BlockKey] = set()
        self._low = 0  # train blocks from the first untrained one up to here are held or leased
        self._earliest = math.inf  # no lease ends before
        self._requested: dict[BlockKey, None] = {}  # in the order of the requests
        self._deadlines: dict[str, dict[BlockKey, float]] = {}  # worker -> its leases, oldest first
        self._working = 0  # workers that hold a lease

    # -- workers ----------------------------------------------------------------------------------------

    def lease(self, worker: str, now: float) -> BlockKey | None:
        """The next block for `worker`; None if it has enough, or nothing is up for a lease."""
        mine = self._deadlines.setdefault(worker, {})
        if len(mine) >= self.leases_per_worker:
            return None
        key = self._next()
        if key is not None:
            self._working += not mine
            mine[key] = now + self.lease_timeout_s
            self._leased.add(key)
            self._earliest = min(self._earliest, mine[key])
        return key

    def has_room(self, worker: str) -> bool:
        """Whether `worker` may take another lease; then `lease` gives None only where nothing is up for one."""
        return len(self._deadlines.get(worker, ())) < self.leases_per_worker

    def complete(self, worker: str, key: BlockKey, now: float) -> Outcome:
        """A worker delivers. Only an accepted block may be kept; the others are dropped by the caller.

        duplicate: the block is held already (its lease had timed out and was issued again).
        stale: the block is trained, released, or no longer inside the window.
        """
        mine = self._deadlines.get(worker, {})
        if mine.pop(key, None) is not None:
            self._leased.discard(key)
            self._working -= not mine
        for waiting in mine:  # its next block starts only now
            mine[waiting] = now + self.lease_timeout_s
        if key in self._held:
            return "duplicate"
        if not self._wanted(key):
            return "stale"
        self._held.add(key)
        return "accepted"

    def worker_died(self, worker: str) -> list[BlockKey]:
        """Gives up all leases of `worker`; returns those that are up for a lease again."""
        leases = self._deadlines.pop(worker, {})
        self._working -= bool(leases)
        self._leased.difference_update(leases)
        self._look_again(leases)
        return [key for key in leases if self._wanted(key) and key not in self._held]

    def expired(self, now: float) -> list[tuple[str, BlockKey]]:
        """Leases past their deadline, as (worker, block); the caller ends the worker, then `worker_died`."""
        if now < self._earliest:
            return []
        ends = [(at, worker, key) for worker, leases in self._deadlines.items() for key, at in leases.items()]
        self._earliest = min((at for at, _, _ in ends), default=math.inf)
        return [(worker, key) for at, worker, key in ends if now >= at]

    # -- consumers --------------------------------------------------------------------------------------

    def trained(self, block_ids: Iterable[int]) -> None:
        """Frees the slots of train blocks, which must be the lowest ones and held.

        Raises:
            ValueError: a block is trained out of order, twice, or was never delivered.
        """
        for block_id in block_ids:
            key = BlockKey("train", block_id)
            if block_id != self.first_untrained or key not in self._held:
                raise ValueError(
                    f"train block {block_id} reported as trained; block {self.first_untrained} is next"
                    + ("" if key in self._held else f" and block {block_id} is not held")
                )
            self._held.remove(key)
            self.first_untrained += 1

    def seek(self, first_untrained: int) -> list[BlockKey]:
        """Continue with another train block; returns the held blocks that are dropped by it."""
        self.first_untrained = self._low = first_untrained
        dropped = [key for key in self._held if not self._wanted(key)]
        self._held.difference_update(dropped)
        return sorted(dropped)

    def request(self, keys: Iterable[BlockKey]) -> None:
        """Ask for blocks of other splits; they stay held until released."""
        self._requested.update(dict.fromkeys(keys))

    def release(self, keys: Iterable[BlockKey]) -> None:
        """No longer needed, delivered or not."""
        for key in keys:
            self._requested.pop(key, None)
            self._held.discard(key)
            self._look_again([key])

    def lost(self, key: BlockKey) -> bool:
        """A held block's object is gone with its node: up for a lease again. False if it was not held."""
        was_held = key in self._held
        self._held.discard(key)
        self._look_again([key])
        return was_held

    # -- views ------------------------------------------------------------------------------------------

    def holds(self, key: BlockKey) -> bool:
        return key in self._held

    @property
    def n_held(self) -> int:
        return len(self._held)

    def oldest_lease_s(self, now: float) -> float:
        """How long ago the oldest lease was given, or its worker was done with the one before; 0 for none."""
        ends = min((min(leases.values()) for leases in self._deadlines.values() if leases), default=None)
        return 0.0 if ends is None else max(0.0, now - (ends - self.lease_timeout_s))

    @property
    def n_working(self) -> int:
        """Workers that hold a lease."""
        return self._working

    def works(self, worker: str) -> bool:
        return bool(self._deadlines.get(worker))

    @property
    def n_leased(self) -> int:
        return len(self._leased)

    def _next(self) -> BlockKey | None:
        for key in self._requested:
            if self._up(key):
                return key
        last = self.first_untrained + self.window_blocks
        last = last if self.train_blocks is None else min(last, self.train_blocks)
        # Looking from the first untrained block each time would cost as much as there are leases.
        self._low = max(self._low, self.first_untrained)
        while self._low < last:
            if self._up(key := BlockKey("train", self._low)):
                return key
            self._low += 1
        return None

    def _up(self, key: BlockKey) -> bool:
        return key not in self._held and key not in self._leased

    def _look_again(self, keys: Iterable[BlockKey]) -> None:
        """These may be up for a lease again."""
        self._low = min([self._low, *(key.block_id for key in keys if key.split == "train")])

    def _wanted(self, key: BlockKey) -> bool:
        if key in self._requested:
            return True
        return key.split == "train" and 0 <= key.block_id - self.first_untrained < self.window_blocks
