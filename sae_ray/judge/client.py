"""Asking the judge pool from anywhere: cached, bounded, retried, counted.

A verdict is assembled here from raw readings (`modes.py`), so that priors and distractors are read once and shared.
Serve retries what no replica had accepted; once accepted, a replica's death is ours to handle. Each call keeps its
request id through retries, so a replica that still has the work does not do it twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from sae_ray.config import JudgeConfig
from sae_ray.judge import modes
from sae_ray.judge.prompts import PROMPT_VERSION, Mode

Reading = tuple[float, int]
Key = tuple[str, str, Mode]

# Readings per call: enough to keep vLLM's batch full, few enough to lose little when a replica dies.
_READINGS_PER_CALL = 64
_PROMPTS_PER_CALL = 8
_CACHED_READINGS = 1_000_000
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 10.0


@dataclass
class Counters:
    """What a client has asked for. `submitted == done + failed + running` holds at every moment."""

    submitted: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0
    calls: int = 0
    retries: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed: int = 0
    call_seconds: float = 0.0


class JudgeClient:
    """Verdicts and generations from a judge pool. Use it inside one event loop; make one per actor.

    Args:
        handle: DeploymentHandle of `JudgeApp.handle()`.
        cfg: the run's judge section (deadlines, attempts, calls in flight).
        calibration: what `calibration.calibrate` found; then `score` may be called without a mode.
    """

    def __init__(self, handle: Any, cfg: JudgeConfig, calibration: Any = None) -> None:
        self._handle = handle
        self._cfg = cfg
        self.calibration = calibration
        self.counters = Counters()
        self.last_error: str | None = None
        self._slots = asyncio.Semaphore(cfg.max_in_flight)
        self._readings: OrderedDict[Key, Reading] = OrderedDict()
        self._pending: dict[Key, asyncio.Future[Reading | None]] = {}

    def statistics(self) -> dict[str, float]:
        return {**asdict(self.counters), "prompt_version": float(PROMPT_VERSION)}

    async def score(
        self, pairs: Sequence[tuple[str, str]], mode: Mode | None = None, use_cache: bool = True
    ) -> list[float | None]:
        """Verdicts of (text, explanation) pairs, in order: higher means that the text shows it more.

        The scale is the mode's own (nats); `Calibration.probability` maps it to probabilities. None is missing: the
        deadline passed, attempts ran out, or the text does not fit the judge. It never means "no".
        """
        mode = mode or self._calibrated_mode()
        keys = modes.needed(pairs, mode)
        readings = await self._read(keys, mode, use_cache)
        return [modes.verdict(text, explanation, mode, readings) for text, explanation in pairs]

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
    ) -> list[list[str] | None]:
        """`n` continuations per prompt, in order. None is missing; an empty list means that the prompt was too long."""

        async def batch(start: int) -> list[list[str] | None]:
            some = list(prompts[start : start + _PROMPTS_PER_CALL])
            answer = await self._counted(
                len(some),
                "generate",
                _session(some[0]),
                some, max_tokens, n, temperature, top_p, list(stop),
                None if seed is None else seed + start,
                chat,
            )  # fmt: skip
            return answer["texts"] if answer else [None] * len(some)

        batches = await asyncio.gather(*(batch(i) for i in range(0, len(prompts), _PROMPTS_PER_CALL)))
        return [texts for each in batches for texts in each]

    async def describe(self) -> dict[str, Any]:
        """What one replica says of itself (see `JudgeServer.describe`)."""
        return await self._handle.describe.remote()

    def _calibrated_mode(self) -> Mode:
        if self.calibration is None:
            raise ValueError("score needs a mode: this client has no calibration")
        return self.calibration.mode

    async def _read(
        self, keys: Sequence[tuple[str, str]], mode: Mode, use_cache: bool
    ) -> dict[tuple[str, str], Reading | None]:
        """Raw readings by (text, explanation), from the cache, from a call under way, or from the judge."""
        found: dict[tuple[str, str], Reading | None] = {}
        waiting: dict[tuple[str, str], asyncio.Future[Reading | None]] = {}
        wanted: dict[str, list[str]] = {}
        loop = asyncio.get_running_loop()
        for text, explanation in dict.fromkeys(keys):
            key = (_digest(text), explanation, mode)
            if use_cache and key in self._readings:
                found[text, explanation] = self._readings[key]
                self.counters.cache_hits += 1
            elif use_cache and key in self._pending:
                waiting[text, explanation] = self._pending[key]
                self.counters.cache_hits += 1
            else:
                wanted.setdefault(text, []).append(explanation)
                if use_cache:
                    self._pending[key] = loop.create_future()

        async def ask(items: list[tuple[str, list[str]]]) -> None:
            asked = [(text, each) for text, explanations in items for each in explanations]
            readings: list[Reading | None] = [None] * len(asked)
            try:
                answer = await self._counted(len(asked), "read", _session(items[0][0]), items, mode)
                if answer is not None:
                    readings = [tuple(r) if r else None for row in answer["readings"] for r in row]
            finally:
                for (text, explanation), reading in zip(asked, readings, strict=True):
                    found[text, explanation] = reading
                    self._settle((_digest(text), explanation, mode), reading)

        await asyncio.gather(*(ask(items) for items in batches(wanted, _READINGS_PER_CALL)))
        for pair, future in waiting.items():
            found[pair] = await future
        return found

    def _settle(self, key: Key, reading: Reading | None) -> None:
        if reading is not None:
            self._readings[key] = reading
            while len(self._readings) > _CACHED_READINGS:
                self._readings.popitem(last=False)
        future = self._pending.pop(key, None)
        if future is not None and not future.done():
            future.set_result(reading)

    async def _counted(self, units: int, method: str, session: str, *args: Any) -> dict[str, Any] | None:
        """One call that counts as `units`; None after the deadline or the last attempt."""
        counters = self.counters
        counters.submitted += units
        counters.running += units
        answer = None
        try:
            answer = await self._call(method, session, *args)
        finally:
            counters.running -= units
            if answer is None:
                counters.failed += units
            else:
                counters.done += units
        if answer is not None:
            for name, value in answer["usage"].items():
                if name != "requests":
                    setattr(counters, name, getattr(counters, name) + value)
        return answer

    async def _call(self, method: str, session: str, *args: Any) -> dict[str, Any] | None:
        request_id = uuid.uuid4().hex

        async def once() -> dict[str, Any]:
            handle = self._handle.options(method_name=method, session_id=session)
            return await handle.remote(request_id, *args)

        async with self._slots:
            started = time.monotonic()
            self.counters.calls += 1
            try:
                return await self._with_retries(once, started + self._cfg.deadline_s)
            finally:
                self.counters.call_seconds += time.monotonic() - started

    async def _with_retries(
        self, once: Callable[[], Awaitable[dict[str, Any]]], deadline: float
    ) -> dict[str, Any] | None:
        attempt, backoff = 1, _FIRST_BACKOFF_S
        while True:
            left = deadline - time.monotonic()
            try:
                return await asyncio.wait_for(once(), left)
            except TimeoutError:
                self.last_error = f"no answer within {self._cfg.deadline_s:g} s"
                return None
            except (BackPressureError, DeploymentUnavailableError) as error:
                # Not an attempt: nothing was accepted. The deadline alone bounds this wait.
                self.last_error = _say(error)
            except (RayActorError, RayTaskError, RayServeException, RayError) as error:
                self.last_error = _say(error)
                if attempt >= self._cfg.max_attempts:
                    return None
                attempt += 1
            self.counters.retries += 1
            if time.monotonic() + backoff >= deadline:
                return None
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)


def batches(wanted: dict[str, list[str]], size: int) -> list[list[tuple[str, list[str]]]]:
    """Group texts into calls of about `size` readings; a text with more of them is split."""
    calls: list[list[tuple[str, list[str]]]] = []
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


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _session(text: str) -> str:
    """Routes calls on one text to the replica that holds its KV."""
    return _digest(text)


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
