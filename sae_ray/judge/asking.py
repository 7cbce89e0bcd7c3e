"""What all judges have in common: verdicts put together from readings, cached, bounded, retried, counted.

A verdict is assembled here from raw readings (`modes.py`), so that priors are read once and shared. Who is asked, and
what its errors mean, is a subclass's: `client.JudgeClient` asks the pool, `endpoint.EndpointClient` a server that
speaks OpenAI's API.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import ray

from sae_ray.config import JudgeConfig
from sae_ray.judge import modes
from sae_ray.judge.metrics import BusyShare, Counters, PoolMetrics
from sae_ray.judge.prompts import MODES, PROMPT_VERSION, Mode
from sae_ray.judge.verdict_cache import VerdictCache, judge_identity

Reading = tuple[float, int]
Pair = tuple[str, str]
Key = tuple[str, str, Mode]
Items = list[tuple[str, list[str]]]

_CACHED_READINGS = 1_000_000
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 10.0


class BadAnswer(Exception):
    """A judge answered something that is no answer: broken JSON, a wrong shape."""


class Refused(Exception):
    """A judge said that it will not answer this; asking again would not help."""


class PutOff(Exception):
    """A judge is too busy to accept this. after_s: how long it asked to wait, if it did."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Common(TypedDict, total=False):
    """What every client may be given, by keyword.

    calibration: what `calibration.calibrate` found; then `score` may be called without a mode. cache: readings on
    disk; shared by the clients of one process. labels: (run, role) for Ray's metrics; None exports nothing.
    """

    calibration: Any
    cache: VerdictCache | None
    labels: tuple[str, str] | None


class Judge(ABC):
    """Verdicts and generations. Use it inside one event loop; make one per actor.

    Args:
        cfg: the judge's section (deadlines, attempts, calls in flight).
        common: see `Common`.
    """

    # Per call: enough to keep vLLM's batch full, few enough to lose little when a replica dies.
    readings_per_call: ClassVar[Mapping[Mode, int]] = dict.fromkeys(MODES, 64)
    prompts_per_call: ClassVar[int] = 8

    def __init__(self, cfg: JudgeConfig, **common: Unpack[Common]) -> None:
        cache, labels = common.get("cache"), common.get("labels")
        self._cfg = cfg
        self.calibration = common.get("calibration")
        self.counters = Counters()
        self.busy = BusyShare()
        self.last_error: str | None = None
        self._slots = asyncio.Semaphore(cfg.calls_in_flight)
        self._readings: OrderedDict[Key, Reading] = OrderedDict()
        self._pending: dict[Key, asyncio.Future[Reading | None]] = {}
        self._cache = cache
        self._identity = judge_identity(cfg) if cache is not None else ""
        self._metrics = PoolMetrics(*labels) if labels is not None and ray.is_initialized() else None

    def known_as(self, name: str) -> None:
        """What answers, where only its server can say: readings of one by another name are not its own."""
        if self._cache is not None:
            self._identity = f"{judge_identity(self._cfg)} {name}"

    def statistics(self) -> dict[str, float]:
        """The counters, and of the replicas' engines the share of time in which they had requests (`busy_share`) and
        executed batches (`step_share`); NaN where no replica told it."""
        had, executed = self.busy.value, self.busy.stepping
        return {
            **asdict(self.counters),
            "busy_share": math.nan if had is None else had,
            "step_share": math.nan if executed is None else executed,
            "prompt_version": float(PROMPT_VERSION),
        }

    async def modes(self) -> tuple[Mode, ...]:
        """The verdict modes that this judge can answer in."""
        return MODES

    async def score(
        self, pairs: Sequence[Pair], mode: Mode | None = None, use_cache: bool = True
    ) -> list[float | None]:
        """Verdicts of (text, explanation) pairs, in order: higher means that the text shows it more.

        The scale is the mode's own (nats); `Calibration.probability` maps it to probabilities. None is missing: the
        deadline passed, attempts ran out, the answer was unreadable, or the text does not fit the judge. It never
        means "no".
        """
        mode = mode or self._calibrated_mode()
        keys = modes.needed(pairs, mode)
        readings = await self._read(keys, mode, use_cache)
        return [modes.verdict(text, explanation, mode, readings) for text, explanation in pairs]

    async def priors(self, explanations: Sequence[str]) -> list[float | None]:
        """log p(explanation | no text), nats, in order; None is missing. Likelihood verdicts have read it already."""
        keys = [(modes.NO_TEXT, explanation) for explanation in explanations]
        readings = await self._read(keys, "likelihood", use_cache=True)
        found = [readings.get(key) for key in keys]
        return [None if reading is None else reading[0] for reading in found]

    async def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int = 32,
        n: int = 1,
        temperature: float = 0.7,
        top_p: float = 0.95,
        stop: Sequence[str] = (),
        seed: int | None = None,
        chat: bool = False,
        schema: dict[str, Any] | None = None,
    ) -> list[list[str] | None]:
        """`n` continuations per prompt, in order. None is missing; an empty list means that the prompt was too long.

        With a JSON `schema` the engine holds every answer to it; only one cut off at `max_tokens` is no valid JSON.
        """

        async def batch(start: int) -> list[list[str] | None]:
            some = list(prompts[start : start + self.prompts_per_call])
            seeded = None if seed is None else seed + start
            arguments = (some, max_tokens, n, temperature, top_p, list(stop), seeded, chat, schema)
            answer = await self._counted(len(some), lambda request_id: self._send_generate(request_id, *arguments))
            return answer["texts"] if answer else [None] * len(some)

        return [t for each in await _all(batch(i) for i in range(0, len(prompts), self.prompts_per_call)) for t in each]

    @abstractmethod
    async def describe(self) -> dict[str, Any]:
        """What answers: at least `model`."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of connections. The verdict cache is its opener's to close."""

    @abstractmethod
    async def _send_read(self, request_id: str, items: Items, mode: Mode) -> dict[str, Any]:
        """`readings`: per item a list of (nats, tokens) or None; `usage`: counters by name; maybe `engine`."""

    @abstractmethod
    async def _send_generate(self, request_id: str, prompts: list[str], *arguments: Any) -> dict[str, Any]:
        """`texts`: per prompt a list of strings; `usage`; maybe `engine`. Arguments as `generate` has them."""

    @abstractmethod
    def _weigh(self, error: Exception) -> Literal["put_off", "again", "give_up", "raise"]:
        """What a failed call means: wait for room, one attempt spent, no answer ever, or not ours to handle."""

    def _calibrated_mode(self) -> Mode:
        if self.calibration is None:
            raise ValueError("score needs a mode: this client has no calibration")
        mode: Mode = self.calibration.mode
        return mode

    async def _read(self, keys: Sequence[Pair], mode: Mode, use_cache: bool) -> dict[Pair, Reading | None]:
        """Raw readings by (text, explanation): from memory, a call under way, the disk, or the judge."""
        found: dict[Pair, Reading | None] = {}
        waiting: dict[Pair, asyncio.Future[Reading | None]] = {}
        asked: list[Pair] = []
        for text, explanation in dict.fromkeys(keys):
            key = (digest(text), explanation, mode)
            if use_cache and key in self._readings:
                found[text, explanation] = self._readings[key]
                self.counters.cache_hits += 1
            elif use_cache and key in self._pending:
                waiting[text, explanation] = self._pending[key]
                self.counters.cache_hits += 1
            else:
                asked.append((text, explanation))
        if use_cache and self._cache is not None:
            stored = self._cache.get_many(self._identity, mode, asked)
            self.counters.disk_hits += len(stored)
            for pair, reading in stored.items():
                found[pair] = reading
                self._settle(pair, mode, reading)
            asked = [pair for pair in asked if pair not in stored]
        wanted: dict[str, list[str]] = {}
        loop = asyncio.get_running_loop()
        for text, explanation in asked:
            wanted.setdefault(text, []).append(explanation)
            if use_cache:
                self._pending[digest(text), explanation, mode] = loop.create_future()

        async def ask(items: Items) -> None:
            pairs = [(text, each) for text, explanations in items for each in explanations]
            readings: list[Reading | None] = [None] * len(pairs)
            try:
                answer = await self._counted(len(pairs), lambda request_id: self._send_read(request_id, items, mode))
                if answer is not None:
                    readings = [self._readable(r, mode) for row in answer["readings"] for r in row]
                    known = {pair: r for pair, r in zip(pairs, readings, strict=True) if r is not None}
                    if use_cache and self._cache is not None:
                        self._cache.put_many(self._identity, mode, known)
            finally:
                for pair, reading in zip(pairs, readings, strict=True):
                    found[pair] = reading
                    self._settle(pair, mode, reading)

        try:
            await _all(ask(items) for items in batches(wanted, self.readings_per_call[mode]))
        finally:
            # Of calls that were cancelled before they began.
            for pair in asked:
                self._settle(pair, mode, found.get(pair))
        for pair, future in waiting.items():
            found[pair] = await future
        return found

    def _readable(self, reading: Any, mode: Mode) -> Reading | None:
        if reading is None:
            return None
        value, tokens = reading
        # A log-probability above 0 is as much garbage as NaN is.
        if math.isfinite(value) and tokens > 0 and (mode != "likelihood" or value <= 1e-3):
            return float(value), int(tokens)
        self.counters.unreadable += 1
        return None

    def _settle(self, pair: Pair, mode: Mode, reading: Reading | None) -> None:
        key = (digest(pair[0]), pair[1], mode)
        if reading is not None:
            self._readings[key] = reading
            while len(self._readings) > _CACHED_READINGS:
                self._readings.popitem(last=False)
        future = self._pending.pop(key, None)
        if future is not None and not future.done():
            future.set_result(reading)

    async def _counted(self, units: int, send: Callable[[str], Awaitable[dict[str, Any]]]) -> dict[str, Any] | None:
        """One call that counts as `units`; None after the deadline or the last attempt."""
        counters = self.counters
        counters.submitted += units
        counters.running += units
        answer = None
        try:
            answer = await self._call(send)
        finally:
            counters.running -= units
            if answer is None:
                counters.failed += units
            else:
                counters.done += units
                for name, value in answer["usage"].items():
                    if hasattr(counters, name):
                        setattr(counters, name, getattr(counters, name) + value)
                if "engine" in answer:
                    self.busy.add(answer["engine"])
            if self._metrics is not None:
                self._metrics.update(counters, self.busy)
        return answer

    async def _call(self, send: Callable[[str], Awaitable[dict[str, Any]]]) -> dict[str, Any] | None:
        # One id for all attempts: a replica that still has the work does not do it twice.
        request_id = uuid.uuid4().hex
        self.counters.queued += 1
        try:
            await self._slots.acquire()
        finally:
            self.counters.queued -= 1
        started = time.monotonic()
        self.counters.calls += 1
        self.counters.open_calls += 1
        try:
            return await self._with_retries(lambda: send(request_id), started + self._cfg.deadline_s)
        finally:
            self.counters.open_calls -= 1
            self._slots.release()
            seconds = time.monotonic() - started
            self.counters.call_seconds += seconds
            if self._metrics is not None:
                self._metrics.call(seconds)

    async def _with_retries(
        self, once: Callable[[], Awaitable[dict[str, Any]]], deadline: float
    ) -> dict[str, Any] | None:
        attempt, backoff = 1, _FIRST_BACKOFF_S
        while True:
            asked_to_wait, limit = 0.0, asyncio.timeout(deadline - time.monotonic())
            try:
                async with limit:
                    return await once()
            except Exception as error:
                if isinstance(error, TimeoutError) and limit.expired():
                    self.last_error = f"no answer within {self._cfg.deadline_s:g} s"
                    return None
                # Any other timeout is an answer's own (a connection, a replica's call), and there is time left.
                meaning = "again" if isinstance(error, TimeoutError) else self._weigh(error)
                if meaning == "raise":
                    raise
                self.last_error = _say(error)
                if meaning == "give_up" or (meaning == "again" and attempt >= self._cfg.max_attempts):
                    return None
                if meaning == "put_off":
                    # Not an attempt: nothing was accepted. The deadline alone bounds this wait.
                    self.counters.back_pressure += 1
                    asked_to_wait = getattr(error, "after_s", 0.0)
                else:
                    attempt += 1
                    self.counters.retries += 1
            pause = max(backoff, asked_to_wait)
            if time.monotonic() + pause >= deadline:
                return None
            await asyncio.sleep(pause)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)


def batches(wanted: dict[str, list[str]], size: int) -> list[Items]:
    """Group texts into calls of about `size` readings; a text with more of them is split."""
    calls: list[Items] = []
    room = 0
    for text, explanations in wanted.items():
        for start in range(0, len(explanations), size):
            some = explanations[start : start + size]
            if len(some) > room:
                calls.append([])
                room = size
            calls[-1].append((text, some))
            room -= len(some)
    return calls


async def _all(work: Any) -> list[Any]:
    """Gather that leaves nothing running behind: an error is raised once everything has ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
