"""Windows come back in the order of the stream, however late the controller looks."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import pytest

from sae_ray.config import HookConfig, RunConfig
from sae_ray.trainer import pipeline as pipeline_module
from sae_ray.trainer.group import RankDied
from sae_ray.trainer.mixing import Cursor
from sae_ray.trainer.pipeline import WindowPipeline
from sae_ray.trainer.rank import WindowResult


class Group:
    """Two ranks that answer at once; a reference is the pair (window, rank)."""

    def train_window(self, window: int, start: int, blocks: list[Any], steps: int) -> list[Any]:
        return [(window, rank) for rank in range(2)]

    def take(self, what: str, ref: Any) -> WindowResult:
        return WindowResult(**dict.fromkeys(WindowResult.__dataclass_fields__, 0))


def test_two_windows_that_are_both_trained_are_reported_in_order():
    config = RunConfig(name="x", hook=HookConfig(layer=2))
    pipeline = WindowPipeline(config, cast(Any, Group()), Cursor(0, 0), 0)
    for _ in range(2):
        pipeline.submit([], 4 * config.trainer.batch_tokens, 100)
    reported = []
    while pending := pipeline.pending_refs():
        # The last of what is offered first: `ray.wait` promises no order.
        if (trained := pipeline.on_ready(pending[-1])) is not None:
            reported.append(trained.window)
    assert reported == [0, 1]
    assert len(pipeline) == 0


@pytest.mark.parametrize(("answered", "dies"), [({0, 1}, False), ({0}, True), (set(), True)])
def test_a_rank_hangs_if_it_has_not_answered_and_not_if_nobody_has_looked(monkeypatch, answered, dies):
    def wait(refs: list[Any], num_returns: int, **_: Any) -> tuple[list[Any], list[Any]]:
        done = [ref for ref in refs if ref[1] in answered][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    config = RunConfig(name="x", hook=HookConfig(layer=2))
    pipeline = WindowPipeline(config, cast(Any, Group()), Cursor(0, 0), 0)
    pipeline.submit([], 4 * config.trainer.batch_tokens, 100)
    monkeypatch.setattr(pipeline_module.ray, "wait", wait)
    pipeline.check_deadlines()
    pipeline._flights[0].deadline = 0.0  # the controller was held up
    silent = f"{2 - len(answered)} ranks did not answer"
    with pytest.raises(RankDied, match=silent) if dies else contextlib.nullcontext():
        pipeline.check_deadlines()
