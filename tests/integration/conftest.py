"""One local Ray and one judge for the whole integration session: starting either costs more than most tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sae_ray.config import JudgeConfig
from sae_ray.judge.deploy import JudgeApp

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's workers are nice by default: on a busy machine a judge then starts in minutes, and tests time out.
os.environ.setdefault("RAY_worker_niceness", "0")
# Of the S3 servers that tests start: a cluster's nodes have their own credentials, and this Ray's are ours.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of our own with 8 logical CPUs, on however few real ones there are."""
    ray.init(
        address="local",  # not another Ray that this machine has, or had
        num_cpus=8,
        object_store_memory=400 << 20,
        include_dashboard=False,
        configure_logging=True,
        logging_level=logging.WARNING,
        log_to_driver=False,
        # Workers import sae_ray from this checkout, installed or not.
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def judge_config() -> JudgeConfig:
    return JudgeConfig()


@pytest.fixture(scope="session")
def judge_app(ray_session: None, judge_config: JudgeConfig) -> Iterator[JudgeApp]:
    """The embedded judge on real Ray Serve LLM and vLLM, serving."""
    app = JudgeApp(judge_config, "integration")
    try:
        app.start()
        assert app.ready(judge_config.start_timeout_s), app.status()
        yield app
    finally:
        app.shutdown()
