"""The controller's side of the activation stream: producer actors, leases, and references to blocks.

Tensors stay in the object store. What passes through here are object references and a few numbers per block.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from sae_ray.activations.pool import Producer, ProducerPool
from sae_ray.activations.producer import ActivationProducer
from sae_ray.activations.scaling import ProducerScaling, Seen, Shares, Trainer
from sae_ray.activations.scheduler import BlockKey, BlockScheduler
from sae_ray.config import RunConfig
from sae_ray.corpus.reader import Split
from sae_ray.errors import UserError
from sae_ray.reservation import Reservation
from sae_ray.storage import absolute

Event = dict[str, Any]
_RATE_SPAN_S = 30.0


@dataclass(frozen=True)
class _Pending:
    producer: Producer
    key: BlockKey
    block_ref: ray.ObjectRef


class BlockStream:
    """Blocks in id order, from producers that may die.

    The caller waits on `pending_refs()` together with whatever else it waits for, and hands what is ready to
    `on_ready`. Nothing here blocks but `start`.

    Args:
        producer: class of the actors; made with the config's JSON and then `extra`.
        train_blocks: how many train blocks to produce unasked; None: as many as there are.
        scaled: whether the caller `observe`s, so that `activations.producers` may be a range; if not, a range means
            its largest number.
    """

    def __init__(
        self,
        config: RunConfig,
        producer: type[ActivationProducer] = ActivationProducer,
        extra: tuple[Any, ...] = (),
        train_blocks: int | None = None,
        scaled: bool = False,
    ) -> None:
        if config.activations.store is not None:  # other nodes do not share the driver's working directory
            update = {"store": absolute(config.activations.store)}
            config = config.model_copy(update={"activations": config.activations.model_copy(update=update)})
        self._cfg = config
        activations = config.activations
        number = activations.least_producers if scaled else activations.most_producers
        self._pool = ProducerPool(config, number, producer, extra)
        self._scaling = ProducerScaling(number, activations.most_producers)
        self._mix_blocks = activations.mix_blocks
        self._scheduler = BlockScheduler(activations.window_blocks, activations.lease_timeout_s)
        self._scheduler.train_blocks = train_blocks
        self._roomy: dict[int, None] = {}  # slots whose producers may take a lease, in the order they came to have room
        self._pending: dict[ray.ObjectRef, _Pending] = {}
        self._blocks: dict[BlockKey, tuple[ray.ObjectRef, dict[str, Any]]] = {}
        self._restarts = 0
        self._totals = dict.fromkeys(("blocks", "tokens", "duplicates", "reissued"), 0)
        self._seconds = dict.fromkeys(("seconds", "corpus_seconds", "forward_seconds"), 0.0)
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_tokens = 0
        self._dtype: str | None = None
        self._widths: dict[str, int] | None = None

    # -- life -------------------------------------------------------------------------------------------

    def start(self, on_wait: Callable[[str], None] | None = None, beside: Sequence[Reservation] = ()) -> None:
        """Start all producers and wait until each has loaded its model.

        Args:
            beside: reservations of others that are waited for too, so that all have their places before anyone starts.
        Raises:
            UserError: a producer cannot be placed within `ray.wait_s`, or cannot load the model or corpus.
        """
        self._pool.start(time.monotonic, on_wait or (lambda _: None), beside)
        while waiting := list(self._pool.starting):
            if on_wait is not None:
                on_wait(f"{self._pool.ready} of {len(self._pool.slots)} producers ready")
            done, _ = ray.wait(waiting, timeout=1.0, fetch_local=False)
            now = time.monotonic()
            for ref in done:
                self.on_ready(ref, now)
            self._check_startup(now)

    def stop(self) -> None:
        """End all producers and let go of all blocks."""
        self._pool.stop()
        self._roomy.clear()
        self._pending.clear()
        self._blocks.clear()

    @property
    def widths(self) -> dict[str, int]:
        """Hook name -> width of its activations."""
        if self._widths is None:
            raise RuntimeError("no producer is ready: call start() first")
        return self._widths

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        if self._dtype is None:
            raise RuntimeError("no producer is ready: call start() first")
        return self._dtype

    @property
    def producers(self) -> list[dict[str, Any]]:
        """What each live producer reported when it was ready: pid, node_id, dtype, ..."""
        return [p.info for _, p in sorted(self._pool.slots.items()) if p.info is not None]

    # -- the event loop ---------------------------------------------------------------------------------

    def pump(self, now: float) -> list[Event]:
        """Hand leases to producers with room, and end producers whose lease has timed out.

        What came in time and was not looked at, because the caller was busy elsewhere, is taken first.

        Raises:
            UserError: producers died or hung more than `activations.max_restarts` times, or a restarted one
                finds no place within `ray.wait_s`.
        """
        events: list[Event] = []
        if self._scheduler.expired(now) or self._pool.overdue(now):
            pending = self.pending_refs()
            for ref in ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)[0] if pending else []:
                events += self.on_ready(ref, now)
        for worker, key in self._scheduler.expired(now):
            if (producer := self._pool.by_worker(worker)) is not None:
                ray.kill(producer.actor)
                limit = self._cfg.activations.lease_timeout_s
                reason = f"{key.split} block {key.block_id} took over activations.lease_timeout_s = {limit:g} s"
                events.append(self._replace(producer, now, reason))
        events += self._check_startup(now)
        # One lease each before anyone gets a second, so that a short window is spread over all. Only those with room
        # are looked at: of a thousand producers, a look at all for each block would be most of the driver's time.
        progress = True
        while progress:
            progress = False
            for slot in list(self._roomy):
                producer = self._pool.slots[slot]
                if (lease := self._scheduler.lease(producer.worker, now)) is None:
                    if self._scheduler.has_room(producer.worker):  # nothing is up for a lease
                        return events
                    del self._roomy[slot]
                    continue
                progress = True
                meta_ref, block_ref = producer.actor.produce.options(num_returns=2).remote(*lease)
                self._pending[meta_ref] = _Pending(producer, lease, block_ref)
        return events

    def pending_refs(self) -> list[ray.ObjectRef]:
        return [*self._pool.starting, *self._pending]

    def owns(self, ref: ray.ObjectRef) -> bool:
        return ref in self._pending or ref in self._pool.starting

    def on_ready(self, ref: ray.ObjectRef, now: float) -> list[Event]:
        """Take in a finished reference of `pending_refs()`. Returns what is worth logging.

        Raises:
            UserError: from the producer (a bad corpus line, say), or too many producers died.
        """
        if (starting := self._pool.starting.pop(ref, None)) is not None:
            return self._on_started(starting, now)
        pending = self._pending.pop(ref, None)
        if pending is None:  # of a producer that was replaced in the same round
            return []
        try:
            meta = self._get(ref)
        except RayActorError as error:
            return self._on_death(pending.producer, now, error)
        outcome = self._scheduler.complete(pending.producer.worker, pending.key, now)
        events = self._after_delivery(pending.producer)
        if outcome != "accepted":
            self._totals["duplicates"] += 1
            return [*events, {"what": f"{outcome}_block", "split": pending.key.split, "block_id": pending.key.block_id}]
        meta["node_id"] = (pending.producer.info or {}).get("node_id", "")  # in whose object store it lies
        self._blocks[pending.key] = (pending.block_ref, meta)
        self._totals["blocks"] += 1
        self._totals["tokens"] += meta["tokens"]
        for name in self._seconds:
            self._seconds[name] += meta[name]
        self._recent.append((now, meta["tokens"]))
        self._recent_tokens += meta["tokens"]
        return events

    # -- how many producers -----------------------------------------------------------------------------

    def observe(self, trainer: Trainer, now: float) -> list[Event]:
        """Takes in what the trainer does now; adds or lets go producers where their number is a range.

        A producer goes when its leases are done, so nothing is computed twice; which blocks there are, and what is in
        them, does not depend on it.
        """
        ready = self._pool.ready
        self._scaling.observe(Seen(trainer, ready, self._idle), now)
        if self._scaling.least == self._scaling.most or self._pool.starting:
            return []
        if (wanted := self._scaling.wanted()) == ready:
            return []
        staying = [p for _, p in sorted(self._pool.slots.items()) if not p.leaving]
        if len(staying) != ready:  # one is still on its way out
            return []
        events = []
        for _ in range(wanted - ready):
            self._pool.add(now)
        for producer in staying[wanted:]:
            producer.leaving = True
            self._roomy.pop(producer.slot, None)
            events += self._after_delivery(producer)
        told = "more_producers" if wanted > ready else "fewer_producers"
        return [{"what": told, "from": ready, "to": wanted, "because": self._scaling.because}, *events]

    @property
    def waits(self) -> Shares:
        """Who has waited for whom, over the whole of what was observed."""
        return self._scaling.total

    def _after_delivery(self, producer: Producer) -> list[Event]:
        """A producer that has a lease less: it has room for another, or it goes."""
        if not producer.leaving:
            self._roomy[producer.slot] = None
            return []
        if self._scheduler.works(producer.worker) or self._pool.slots.get(producer.slot) is not producer:
            return []
        self._scheduler.worker_died(producer.worker)
        self._pool.remove(producer)
        return [{"what": "producer_left", "producer": producer.slot}]

    # -- train blocks -----------------------------------------------------------------------------------

    def seek(self, window: int) -> None:
        """Continue with mix window `window`: after a resume, or back to a commit when ranks were rebuilt."""
        for key in self._scheduler.seek(window * self._mix_blocks):
            self._blocks.pop(key, None)
        self._drop_lost()  # not sooner: a window that its ranks have fetched is trained all the same

    def window_ready(self, window: int) -> bool:
        """Raises UserError: the activation store ends before this window."""
        end = self._scheduler.train_blocks
        if end is not None and (window + 1) * self._mix_blocks > end:
            raise UserError(
                f"activations.store = {self._cfg.activations.store}: holds {end} train blocks, and the run has come to "
                f"window {window}, blocks {window * self._mix_blocks} to {(window + 1) * self._mix_blocks - 1}"
            )
        return all(self._scheduler.holds(key) for key in self._window(window))

    def window_refs(self, window: int) -> list[ray.ObjectRef]:
        """References to the block dicts of a mix window, in id order."""
        return [self._blocks[key][0] for key in self._window(window)]

    def window_tokens(self, window: int) -> int:
        """Kept tokens of a mix window."""
        return sum(self._blocks[key][1]["tokens"] for key in self._window(window))

    def trained(self, window: int) -> None:
        """Drop a mix window's blocks and free their slots."""
        keys = self._window(window)
        self._scheduler.trained(key.block_id for key in keys)
        for key in keys:
            del self._blocks[key]

    def lost(self, split: Split, block_ids: Iterable[int]) -> None:
        """Blocks whose objects died with their node; they are computed again."""
        for block_id in block_ids:
            key = BlockKey(split, block_id)
            if self._scheduler.lost(key):
                self._blocks.pop(key, None)
                self._totals["reissued"] += 1

    # -- blocks of other splits -------------------------------------------------------------------------

    def fetch(self, split: Split, block_ids: Iterable[int]) -> None:
        """Ask for blocks outside the stream (evidence, heldout). They are kept until `release`."""
        self._scheduler.request(BlockKey(split, block_id) for block_id in block_ids)

    def fetched(self, split: Split, block_ids: Iterable[int]) -> bool:
        return all(self._scheduler.holds(BlockKey(split, block_id)) for block_id in block_ids)

    def fetched_refs(self, split: Split, block_ids: Iterable[int]) -> list[ray.ObjectRef]:
        return [self._blocks[BlockKey(split, block_id)][0] for block_id in block_ids]

    def fetched_meta(self, split: Split, block_id: int) -> dict[str, Any]:
        """What its producer said of a block."""
        return self._blocks[BlockKey(split, block_id)][1]

    def release(self, split: Split, block_ids: Iterable[int]) -> None:
        keys = [BlockKey(split, block_id) for block_id in block_ids]
        self._scheduler.release(keys)
        for key in keys:
            self._blocks.pop(key, None)

    # -- telemetry --------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """tokens_per_s (all producers, last 30 s; None at first), held, leased, blocks, tokens, duplicates,
        reissued, restarts, how many producers are ready, starting and idle (without a lease), and the producers'
        summed seconds, corpus_seconds and forward_seconds."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - _RATE_SPAN_S:
            self._recent_tokens -= self._recent.popleft()[1]
        rate = None
        if len(self._recent) >= 2:
            # The first block only marks the start of the span.
            span = max(now - self._recent[0][0], 1e-9)
            rate = (self._recent_tokens - self._recent[0][1]) / span
        return {
            "tokens_per_s": rate,
            "held": self._scheduler.n_held,
            "leased": self._scheduler.n_leased,
            "restarts": self._restarts,
            "ready": self._pool.ready,
            "starting": len(self._pool.starting),
            "idle": self._idle,
            **self._totals,
            **self._seconds,
        }

    def oldest_lease_s(self, now: float) -> float:
        """How long ago the oldest lease was given (looks at all: not for every block)."""
        return self._scheduler.oldest_lease_s(now)

    # -- inside -----------------------------------------------------------------------------------------

    @property
    def _idle(self) -> int:
        """Producers that serve and hold no lease, because nothing is up for one."""
        return self._pool.ready - self._scheduler.n_working

    def _drop_lost(self) -> None:
        """Held blocks whose object died with its node are up for a lease again."""
        if not self._blocks:
            return
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for key in [key for key, (_, meta) in self._blocks.items() if meta["node_id"] not in alive]:
            self.lost(key.split, [key.block_id])

    def _window(self, window: int) -> list[BlockKey]:
        first = window * self._mix_blocks
        return [BlockKey("train", block_id) for block_id in range(first, first + self._mix_blocks)]

    def _on_started(self, producer: Producer, now: float) -> list[Event]:
        try:
            info = self._get(producer.ready_ref)
        except RayActorError as error:
            return self._on_death(producer, now, error)
        # Producers that round differently would make the numbers depend on who computed a block.
        if self._dtype not in (None, info["dtype"]):
            raise UserError(
                f"model.dtype = {self._cfg.model.dtype}: means {self._dtype} on one node and {info['dtype']} "
                "on another; name one of them"
            )
        self._dtype, self._widths = info["dtype"], info["widths"]
        if (stored := info.get("stored_train_blocks")) is not None:
            self._scheduler.train_blocks = stored
        producer.info = info
        self._roomy[producer.slot] = None
        return [{"what": "producer_ready", "producer": producer.slot, "generation": producer.generation, **info}]

    def _on_death(self, producer: Producer, now: float, error: Exception) -> list[Event]:
        if self._pool.slots.get(producer.slot) is not producer:
            return []
        return [self._replace(producer, now, str(error).split("\n", 1)[0])]

    def _replace(self, producer: Producer, now: float, reason: str) -> Event:
        """Put a new actor into the slot of a dead one and give up the dead one's leases."""
        reissued = self._scheduler.worker_died(producer.worker)
        for ref in [ref for ref, pending in self._pending.items() if pending.producer is producer]:
            del self._pending[ref]
        self._roomy.pop(producer.slot, None)
        self._restarts += 1
        self._totals["reissued"] += len(reissued)
        limit = self._cfg.activations.max_restarts
        if self._restarts > limit:
            raise UserError(f"producers died {self._restarts} times (activations.max_restarts = {limit}): {reason}")
        if producer.leaving:
            self._pool.remove(producer)
        else:
            self._pool.replace(producer, now)
        return {
            "what": "producer_died",
            "producer": producer.slot,
            "reason": reason,
            "reissued": [f"{key.split}/{key.block_id}" for key in reissued],
        }

    def _check_startup(self, now: float) -> list[Event]:
        """Those that were to help and found no place are let go; raises UserError for those that are owed."""
        late = self._pool.late(now)
        for producer in late:
            self._pool.remove(producer)
            self._scaling.refused()
        return [{"what": "producer_found_no_place", "producer": producer.slot} for producer in late]

    @staticmethod
    def _get(ref: ray.ObjectRef) -> dict[str, Any]:
        """A small result; a user's error inside an actor comes out as itself."""
        try:
            return ray.get(ref, timeout=60)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
