"""The judges of one run: its scorer, its explainer and a held-out judge, each a pool of replicas or a server elsewhere.

Judges whose deployed settings are equal share one application, and with it its replicas and their prefix caches.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any

import ray

from sae_ray.config import JudgeConfig, RunConfig
from sae_ray.judge.client import Judge, JudgeClient
from sae_ray.judge.deploy import JudgeApp, serve_is_up
from sae_ray.judge.endpoint import EndpointClient
from sae_ray.judge.metrics import PoolMetrics
from sae_ray.judge.roles import Role, deployed, judges_of
from sae_ray.judge.verdict_cache import VerdictCache

_log = logging.getLogger(__name__)


class JudgePool:
    """Starts, watches, asks and ends every judge of a run.

    Args:
        config: the run; `judge` is the scorer, `judges` names those that differ.
        keep_serve: leave Serve itself running after the applications are deleted; for a Ray that ends with the run.
    """

    def __init__(self, config: RunConfig, keep_serve: bool = False) -> None:
        self._run = config.name
        self._judges = judges_of(config)
        self._apps: dict[Role, JudgeApp] = {}
        by_settings: dict[str, JudgeApp] = {}
        for role, cfg in self._judges.items():
            if cfg.endpoint is None:
                settings = json.dumps(deployed(cfg), sort_keys=True)
                new = JudgeApp(cfg, config.name, keep_serve, role)
                self._apps[role] = by_settings.setdefault(settings, new)
        self._metrics: dict[Role, PoolMetrics] = {}

    @property
    def roles(self) -> dict[Role, JudgeConfig]:
        return dict(self._judges)

    @property
    def apps(self) -> dict[Role, JudgeApp]:
        """The application of each role that has one; the same object for roles that share it."""
        return dict(self._apps)

    @property
    def names(self) -> str:
        """Every judge once, as the config names it."""
        return " and ".join(
            dict.fromkeys(judge.endpoint or judge.app or judge.model for judge in self._judges.values())
        )

    @property
    def start_limit_s(self) -> float:
        """Seconds within which all judges must serve."""
        return max(judge.start_timeout_s for judge in self._judges.values())

    def start(self) -> None:
        """Ask for all deployments and return at once. Idempotent."""
        if not self._apps:
            return
        owns = not serve_is_up()
        before = None
        for app in self._distinct():
            if app.deploying is None:
                app.start(after=before, owns_serve=owns)
            before = app.deploying or before

    def ready(self, timeout: float) -> bool:
        """Wait until every judge serves (or may scale from zero).

        Returns:
            Whether all serve within `timeout` seconds; ask again to go on waiting.
        Raises:
            UserError: a deployment failed, with the reason that Serve gives.
        """
        deadline = time.monotonic() + timeout
        # No short cut: one that failed is reported although another is merely slow.
        serving = [app.ready(max(0.0, deadline - time.monotonic())) for app in self._distinct()]
        return all(serving)

    def clients(self, cache: VerdictCache | None = None) -> dict[Role, Judge]:
        """A client per role, each with its own counters; for use in one event loop. `cache` is shared by them."""
        made: dict[Role, Judge] = {}
        for role, cfg in self._judges.items():
            labels = (self._run, role)
            if cfg.endpoint is not None:
                made[role] = EndpointClient(cfg, cache=cache, labels=labels)
            else:
                made[role] = JudgeClient(self._apps[role].handle(), cfg, cache=cache, labels=labels)
        return made

    def status(self) -> dict[Role, dict[str, Any]]:
        """Per role `state`, `running` and `starting` replicas, `message`, and `application` or `endpoint`."""
        states = {id(app): app.status() for app in self._distinct()}
        told: dict[Role, dict[str, Any]] = {}
        for role, cfg in self._judges.items():
            if cfg.endpoint is not None:
                told[role] = {
                    "state": "ELSEWHERE",
                    "running": 0,
                    "starting": 0,
                    "message": "",
                    "endpoint": cfg.endpoint,
                }
                continue
            app = self._apps[role]
            told[role] = {**states[id(app)], "application": app.name}
            if ray.is_initialized():
                if role not in self._metrics:
                    self._metrics[role] = PoolMetrics(self._run, role)
                self._metrics[role].replicas(told[role]["running"])
        return told

    def shutdown(self, timeout: float = 60) -> None:
        """Delete every application, and Serve with the last where this run started it. Safe to call twice."""
        apps = self._distinct()
        for number, app in enumerate(apps):
            try:
                app.shutdown(timeout)
            except Exception:
                # The others must go all the same; the first error is what the caller sees.
                for other in apps[number + 1 :]:
                    other.shutdown(timeout)
                raise

    def _distinct(self) -> list[JudgeApp]:
        return list({id(app): app for app in self._apps.values()}.values())


class PoolWatch:
    """Exports how many replicas each judge has, for as long as somebody goes on calling `look`.

    Serve is asked by a thread: its controller may be slow or gone, and whoever looks has other things to do.
    """

    EVERY_S = 15.0

    def __init__(self, config: RunConfig):
        self._config = config
        self._pool: JudgePool | None = None
        self._asked = -self.EVERY_S
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Returns at once."""
        now = time.monotonic()
        busy = self._thread is not None and self._thread.is_alive()
        if busy or now - self._asked < self.EVERY_S or not ray.is_initialized():
            return
        self._asked = now
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self._pool = self._pool or JudgePool(self._config)
            self._pool.status()
        except Exception as error:  # Serve's own; a gauge that stands still is no reason to end a run
            _log.warning("Serve does not say how many replicas judges have: %s", error)


def endpoint_keys(config: RunConfig) -> dict[str, str]:
    """The keys of judges elsewhere as the driver's environment has them, by the name of their variable.

    For an actor's constructor: a runtime environment would show them on Ray's dashboard.
    """
    names = {judge.api_key_env for judge in judges_of(config).values() if judge.endpoint is not None}
    return {name: os.environ[name] for name in names if name is not None and name in os.environ}
