"""The producer actors of a stream: placed, started, replaced, added and let go. Leases are `stream.py`'s."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from sae_ray.activations.producer import ActivationProducer
from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.placement import producer_ask, waits_for
from sae_ray.reservation import Reservation, cluster_nodes, wait_placed
from sae_ray.storage import aws_environment


@dataclass
class Producer:
    """One slot of the pool and the actor that fills it now; `worker` is new for every actor."""

    slot: int
    generation: int
    actor: Any
    ready_ref: ray.ObjectRef
    started: float
    info: dict[str, Any] | None = None
    leaving: bool = False  # gets no more leases and ends with its last one

    @property
    def worker(self) -> str:
        return f"{self.slot}.{self.generation}"


class ProducerPool:
    """Slots and their actors. The first `number` slots lie in one reservation, each further one in its own.

    Args:
        producer: class of the actors; made with the config's JSON and then `extra`.
    """

    def __init__(
        self, config: RunConfig, number: int, producer: type[ActivationProducer], extra: tuple[Any, ...] = ()
    ) -> None:
        self._cfg, self._class, self._extra = config, producer, extra
        self.number = number
        self.slots: dict[int, Producer] = {}
        self.starting: dict[ray.ObjectRef, Producer] = {}
        self._place: Reservation | None = None
        self._grown: dict[int, Reservation] = {}  # slot -> its own place
        self._generations: dict[int, int] = {}

    def reserve(self) -> None:
        """Asks for the places of the first slots, without waiting. Idempotent."""
        if self._place is None:
            self._place = Reservation(producer_ask(self._cfg.activations, self.number))

    def start(self, now: Callable[[], float], on_wait: Callable[[str], None], beside: Sequence[Reservation]) -> None:
        """Waits for the places, and for those of `beside`, and starts the actors.

        Raises:
            UserError: not within `ray.wait_s`, or never.
        """
        self.reserve()
        assert self._place is not None
        wait_placed([*beside, self._place], self._cfg.ray, on_wait)
        for slot in range(self.number):
            self._spawn(slot, now())

    def stop(self) -> None:
        """Ends all actors and gives their places back."""
        for producer in self.slots.values():
            _end(producer)
        self.slots.clear()
        self.starting.clear()
        for place in [*self._grown.values(), *([self._place] if self._place else [])]:
            with contextlib.suppress(Exception):
                place.release()
        self._place, self._grown = None, {}

    @property
    def ready(self) -> int:
        return len(self.slots) - len(self.starting)

    def by_worker(self, worker: str) -> Producer | None:
        found = self.slots.get(int(worker.partition(".")[0]))
        return found if found is not None and found.worker == worker else None

    def add(self, now: float) -> Producer:
        """One more producer, in the lowest free slot."""
        slot = next(slot for slot in range(len(self.slots) + 1) if slot not in self.slots)
        return self._spawn(slot, now)

    def replace(self, producer: Producer, now: float) -> None:
        """A new actor in the slot, and in the place, of one that died."""
        self.starting.pop(producer.ready_ref, None)
        self._spawn(producer.slot, now)

    def remove(self, producer: Producer) -> None:
        """Ends an actor and gives its place back, where it has one of its own."""
        _end(producer)
        self.starting.pop(producer.ready_ref, None)
        del self.slots[producer.slot]
        if (place := self._grown.pop(producer.slot, None)) is not None:
            place.release()

    def overdue(self, now: float) -> list[Producer]:
        """Not known to have started within `ray.wait_s`."""
        return [producer for producer in self.starting.values() if now - producer.started > self._cfg.ray.wait_s]

    def late(self, now: float) -> list[Producer]:
        """Added beyond the first, and not started within `ray.wait_s`: the run goes on without them.

        Raises:
            UserError: one of the first is late; says what it waits for.
        """
        limit = self._cfg.ray.wait_s
        late = self.overdue(now)
        owed = [producer for producer in late if producer.slot not in self._grown]
        if owed:
            ask = replace(producer_ask(self._cfg.activations, 1), bundles=len(owed))
            raise UserError(
                f"{len(owed)} of {len(self.slots)} producers did not start within ray.wait_s = {limit:g} s; "
                f"{waits_for(ask, 0, cluster_nodes())}"
            )
        return late

    def _spawn(self, slot: int, now: float) -> Producer:
        activations = self._cfg.activations
        if slot < self.number and self._place is not None:
            place, bundle = self._place, slot
        else:
            if slot not in self._grown:
                self._grown[slot] = Reservation(producer_ask(activations, 1))
            place, bundle = self._grown[slot], 0
        remote_class: Any = ray.remote(self._class)
        actor = remote_class.options(
            num_cpus=activations.cpus,
            num_gpus=activations.gpus,
            resources=dict(activations.resources),
            max_restarts=0,
            runtime_env={"env_vars": _environment(activations.threads)},
            scheduling_strategy=place.at(bundle),
        ).remote(self._cfg.model_dump_json(), *self._extra)
        ready_ref = actor.ready.remote()
        generation = self._generations[slot] = self._generations.get(slot, -1) + 1
        producer = Producer(slot, generation, actor, ready_ref, now)
        self.slots[slot] = self.starting[ready_ref] = producer
        return producer


def _end(producer: Producer) -> None:
    with contextlib.suppress(Exception):
        ray.kill(producer.actor)


def _environment(threads: int) -> dict[str, str]:
    """Environment of a producer: thread caps, the driver's caches and S3 settings."""
    passed = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "SAE_RAY_CACHE")
    return {
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **{name: os.environ[name] for name in passed if name in os.environ},
        **aws_environment(),
    }
