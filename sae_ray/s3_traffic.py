"""What this process has asked of S3: requests, retries, bytes and seconds, for tests, logs and Ray's metrics.

Botocore retries what never began or was refused (no connection, 5xx, throttling), with jitter and a quota, `ATTEMPTS`
times in all. `again` is for what it hands on: a body that broke off, stalled or does not fit its checksum, and
conflicts. Both are counted as `retries`.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sae_ray.logs import bound

TRIES = 4
_BASE_S, _MOST_S = 0.2, 8.0
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
# requests: answered or not. corrupt: objects that were refused. unconditional: commits where the endpoint knows no
# conditions.
COUNTED = ("requests", "retries", "corrupt", "unconditional", "read_bytes", "written_bytes")


class S3Metrics:
    """`sae_ray_s3_*` on Ray's metrics endpoint, of every process that talks to S3."""

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        self._counters = {
            name: metrics.Counter(f"sae_ray_s3_{name}", description=f"S3: {name}", tag_keys=("run",))
            for name in COUNTED
        }
        self._seconds = metrics.Histogram(
            "sae_ray_s3_seconds",
            description="S3: seconds of an action, retries included",
            boundaries=_SECONDS,
            tag_keys=("run", "action"),
        )
        for metric in (*self._counters.values(), self._seconds):
            metric.set_default_tags({"run": run})

    def add(self, name: str, amount: int) -> None:
        self._counters[name].inc(amount)

    def took(self, action: str, seconds: float) -> None:
        self._seconds.observe(seconds, tags={"action": action})


class Traffic:
    """Counts since the process began; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._metrics: S3Metrics | None = None

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount
            if amount > 0 and (metrics := self._exporting()) is not None:
                metrics.add(name, amount)

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {name: self._counts[name] for name in COUNTED}

    @contextmanager
    def timed(self, action: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                if (metrics := self._exporting()) is not None:
                    metrics.took(action, time.monotonic() - began)

    def on_attempt(self, attempts: int, **_: Any) -> None:
        """Botocore's `needs-retry` event: after every attempt, of which the first is number 1."""
        self.add("requests")
        if attempts > 1:
            self.add("retries")

    def _exporting(self) -> S3Metrics | None:
        """None in a process without Ray, or before it is connected; nothing here imports it."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return None
        if self._metrics is None:
            self._metrics = S3Metrics(str(bound().get("run", "")))
        return self._metrics


TRAFFIC = Traffic()


def pause_before(retry: int) -> None:
    """Sleeps a random part of a time that doubles with each retry (0: the first), so that who failed together parts."""
    TRAFFIC.add("retries")
    time.sleep(random.uniform(0, min(_MOST_S, _BASE_S * 2**retry)))
