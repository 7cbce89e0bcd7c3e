"""What the controller itself costs: its real loop, stream, leases and pipeline, over actors that are only durations.

    .venv/bin/python benchmarks/controller_load.py --actors 1000 --blocks 1000000

Nothing of Ray runs: a stand-in for the `ray` module answers each call at a simulated time, so that what remains is the
driver's own Python. Its CPU time per block says how many blocks a second one controller can carry, and what share of a
core it takes at a given rate; its memory is read along the way, because a run may last for weeks. Ray's own work
(submitting a task, waiting on references) is not in it.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

import sae_ray.activations.pool as pool_module
import sae_ray.activations.stream as stream_module
import sae_ray.controller as controller_module
import sae_ray.measures as measures_module
import sae_ray.telemetry as telemetry_module
import sae_ray.trainer.pipeline as pipeline_module
from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig
from sae_ray.config_file import parse_config
from sae_ray.controller import Controller
from sae_ray.measures import Measures
from sae_ray.telemetry import RateMeter, RunStatus
from sae_ray.trainer.mixing import Cursor
from sae_ray.trainer.pipeline import WindowPipeline
from sae_ray.trainer.rank import WindowResult

BLOCK_TOKENS = 16_368
RANKS = 64


class Ref:
    """A stand-in for an object reference: identity is all that the driver uses of one."""

    __slots__ = ("value",)

    def __init__(self, value: Any = None) -> None:
        self.value = value


class FakeRay:
    """Answers what the driver calls of `ray`, in simulated time. `seconds`: CPU time of that: not the driver's."""

    def __init__(self, block_s: float, seed: int = 0) -> None:
        self.now, self.seconds, self.block_s = 0.0, 0.0, block_s
        self.rng = random.Random(seed)
        self._events: list[tuple[float, int, Ref]] = []
        self._order = itertools.count()

    def finish(self, at: float, ref: Ref) -> Ref:
        heapq.heappush(self._events, (at, next(self._order), ref))
        return ref

    def remote(self, _cls: Any) -> Any:
        return _Call(lambda *_: _Producer(self))

    def wait(self, refs: list[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        """The next thing that happens anywhere; it is always among `refs`, because each trainer answers in order."""
        began = time.process_time()
        self.now, _, ref = heapq.heappop(self._events)
        self.seconds += time.process_time() - began
        return [ref], []

    def get(self, ref: Ref, timeout: float | None = None) -> Any:
        return ref.value

    def kill(self, _actor: Any) -> None:
        raise AssertionError("nothing dies here")

    ObjectRef = Ref


class _Call:
    """`method.remote(...)` and `method.options(...).remote(...)`."""

    def __init__(self, function: Any) -> None:
        self.remote = function

    def options(self, **_: Any) -> _Call:
        return self


class _Producer:
    def __init__(self, ray: FakeRay) -> None:
        self._ray, self._free_at = ray, 0.0
        info = {"widths": {"blocks.0.hook_resid_post": 8}, "dtype": "bfloat16"}
        self.ready = _Call(lambda: ray.finish(0.0, Ref(info)))
        self.produce = _Call(self._produce)

    def _produce(self, split: str, block_id: int) -> tuple[Ref, Ref]:
        ray = self._ray
        self._free_at = max(ray.now, self._free_at) + ray.block_s * (0.5 + ray.rng.random())
        meta = {"tokens": BLOCK_TOKENS, "seconds": 1.0, "corpus_seconds": 0.1, "forward_seconds": 0.9}
        return ray.finish(self._free_at, Ref(meta)), Ref()


class _Group:
    """The trainer group: all ranks answer together, `window_s` after the window before."""

    def __init__(self, ray: FakeRay, ranks: int, window_s: float) -> None:
        self._ray, self._ranks, self._window_s, self._free_at, self._step = ray, ranks, window_s, 0.0, 0

    def train_window(self, window: int, start: int, blocks: list[Ref], steps: int) -> list[Ref]:
        first, self._step = self._step, self._step + steps
        self._free_at = max(self._ray.now, self._free_at) + self._window_s
        row = {"step": self._step, "fvu": 0.2, "l0": 32.0, "dead_fraction": 0.0}
        result = WindowResult(
            window, first, self._step, Cursor(window + 1, 0), True, len(blocks) * BLOCK_TOKENS, 1.0, 0.1, 0, [row], {}
        )
        return [self._ray.finish(self._free_at, Ref(result)) for _ in range(self._ranks)]

    def take(self, _what: str, ref: Ref) -> WindowResult:
        return ref.value


class _Place:
    """A reservation that has its room at once."""

    def __init__(self, _ask: Any) -> None: ...

    def at(self, _bundle: int) -> None: ...

    def release(self) -> None: ...


class _Silent:
    """A desk, a log, a screen or gauges that have nothing to say."""

    counters: dict[str, Any] = {}  # noqa: RUF012
    calibrated = round_open = False
    round_age_s = 0.0

    def pending_refs(self) -> list[Ref]:
        return []

    def owns(self, _ref: Ref) -> bool:
        return False

    def pump(self, *_: Any) -> None: ...

    def set(self, *_: Any) -> None: ...

    def event(self, *_: Any, **__: Any) -> None: ...

    def metrics(self, *_: Any) -> None: ...

    def refresh(self, *_: Any) -> None: ...


class DrivenController(Controller):
    """The controller with its loop as it is, around a stream whose actors are stand-ins."""

    def __init__(self, config: RunConfig, ray: FakeRay, ranks: int, window_s: float) -> None:
        silent: Any = _Silent()
        self.config, self.status, self.interrupt = config, RunStatus(), type("Never", (), {"requested": False})()
        self.desk = self.log = self.progress = silent
        self.measures = Measures("load", silent)
        self.stream = BlockStream(config, scaled=True)
        self.place = None
        self.committed_step = self.saved_step = self.rounds_done = self.generation = 0
        self.saving = None
        self.group = _Group(ray, ranks, window_s)  # type: ignore[assignment]
        self.pipeline = WindowPipeline(config, self.group, Cursor(0, 0), 0)
        self.rates = RateMeter()


class _Clock:
    def __init__(self, ray: FakeRay) -> None:
        self.monotonic = lambda: ray.now


@contextmanager
def stand_in(ray: FakeRay) -> Iterator[None]:
    """Puts the stand-in, and its clock, where the driver's modules look for `ray` and `time`."""
    modules = (stream_module, pool_module, controller_module, measures_module, pipeline_module, telemetry_module)
    places = [(module, name) for module in modules for name in ("ray", "time") if hasattr(module, name)]
    places += [(pool_module, name) for name in ("Reservation", "wait_placed")]
    stands_for = {"ray": ray, "time": _Clock(ray), "Reservation": _Place, "wait_placed": lambda *_: None}
    real = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, stands_for[name])
    try:
        yield
    finally:
        for (module, name), was in zip(places, real, strict=True):
            setattr(module, name, was)


def config_of(producers: int, ranks: int, window_blocks: int | None) -> RunConfig:
    mix = 32
    return parse_config(
        {
            "name": "load",
            "hook": {"layer": 0},
            "corpus": {"context_length": 1024},
            "activations": {
                "producers": producers, "mix_blocks": mix, "window_blocks": window_blocks or 2 * producers + 4 * mix,
                "lease_timeout_s": 1e6,
            },
            "sae": {"d_sae": 4608},
            "trainer": {
                "tp": ranks, "steps": 1 << 40, "batch_tokens": 4 * BLOCK_TOKENS, "checkpoint_every": 1 << 50,
                "step_timeout_s": 1e9,
            },
            "rlaif": {"enabled": False},
        },
        "controller_load",
    )  # fmt: skip


class Sample(NamedTuple):
    blocks: int
    cpu_s: float  # the driver's own so far
    rss_mib: float
    simulated_s: float


def drive(
    actors: int,
    blocks: int,
    block_s: float = 2.0,
    ranks: int = RANKS,
    window_blocks: int | None = None,
    trainer_bound: bool = False,
    samples: int = 10,
) -> tuple[list[Sample], Controller]:
    """Trains `blocks` blocks; one sample after each tenth."""  # fmt: skip
    ray = FakeRay(block_s)
    producers = actors - ranks
    config = config_of(producers, ranks, window_blocks)
    mix = config.activations.mix_blocks
    # The trainer takes a tenth less time than the producers need for a window, or twice as much.
    window_s = mix * block_s / producers * (2 if trainer_bound else 0.9)
    found: list[Sample] = []
    with stand_in(ray):
        controller = DrivenController(config, ray, ranks, window_s)
        controller.stream.start()
        steps_per_block = 1 / 4
        process = psutil.Process()
        cpu = 0.0
        for part in range(1, samples + 1):
            began, inside = time.process_time(), ray.seconds
            controller._train_until(int(blocks * part / samples * steps_per_block))
            cpu += time.process_time() - began - (ray.seconds - inside)
            gc.collect()
            trained = controller.stream._scheduler.first_untrained
            found.append(Sample(trained, cpu, process.memory_info().rss / 2**20, ray.now))
    return found, controller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1000])
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--block-seconds", type=float, default=2.0, help="of one producer")
    parser.add_argument("--trainer-bound", action="store_true", help="the window is always full")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console, figures = Console(width=130), []
    table = Table(
        title=f"The controller's own CPU time and memory, {RANKS} ranks, a block every {args.block_seconds} s"
    )
    for heading in (
        "actors",
        "blocks",
        "blocks/s arriving",
        "CPU us/block",
        "of one core",
        "RSS after 10%",
        "at the end",
    ):
        table.add_column(heading, justify="right")
    for actors in args.actors:
        found, _ = drive(actors, args.blocks, args.block_seconds, trainer_bound=args.trainer_bound)
        first, last = found[0], found[-1]
        per_block = last.cpu_s / last.blocks
        rate = last.blocks / last.simulated_s
        table.add_row(
            f"{actors:,}", f"{last.blocks:,}", f"{rate:,.0f}", f"{per_block * 1e6:,.0f}", f"{per_block * rate:.1%}",
            f"{first.rss_mib:,.1f} MiB", f"{last.rss_mib:,.1f} MiB",
        )  # fmt: skip
        figures.append({"actors": actors, "samples": [sample._asdict() for sample in found]})
    console.print(table)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
