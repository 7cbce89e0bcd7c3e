"""The metrics that sae_ray registers, found out by making what registers them, and how Prometheus sees each."""

from __future__ import annotations

import pytest
from ray.util import metrics

from sae_ray.judge.metrics import PoolMetrics
from sae_ray.measures import Gauges
from sae_ray.s3_traffic import S3Metrics

# How Ray's agent names what an application calls NAME: a prefix, and what Prometheus adds to the kinds.
PREFIX = "ray_"
SUFFIXES = {"Gauge": ("",), "Counter": ("_total",), "Histogram": ("_bucket", "_sum", "_count")}


class Recorded:
    """Stands in for a metric of Ray's: notes that it was made."""

    made: dict[str, tuple[str, tuple[str, ...]]]

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = (), **kwargs: object) -> None:
        assert description
        self.made[name] = (type(self).__name__, tag_keys)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags


def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind (Gauge, Counter, Histogram) and tags of every metric, by the name that the code gives it."""
    made: dict[str, tuple[str, tuple[str, ...]]] = {}
    for kind in SUFFIXES:
        monkeypatch.setattr(metrics, kind, type(kind, (Recorded,), {"made": made}))
    Gauges("run")
    PoolMetrics("run", "scorer")
    S3Metrics("run")
    return made


def series(made: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Labels of every series that a query may name."""
    found = {}
    for name, (kind, tags) in made.items():
        for suffix in SUFFIXES[kind]:
            found[f"{PREFIX}{name}{suffix}"] = (*tags, "le") if suffix == "_bucket" else tags
    return found
