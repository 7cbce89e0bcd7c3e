"""What is said while latents are judged where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sae_ray.judging import progress as module
from sae_ray.judging.progress import PLAIN_INTERVAL_S, JudgingProgress


def test_the_time_left_falls_while_many_latents_are_judged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    progress = JudgingProgress("judge", Console(file=out, width=200))
    progress.start(total=40, done=0)
    for done in (0, 16, 16, 16, 32):
        now += PLAIN_INTERVAL_S
        progress.update(done, "scoring", 0, {})
    said = [line.partition("left ")[2] for line in out.getvalue().splitlines()]
    assert said == ["", "00:30", "00:20", "00:10", "00:12"]
