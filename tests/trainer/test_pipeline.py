"""Windows come back in the order of the stream, however late the controller looks."""

from __future__ import annotations

from typing import Any, cast

from sae_ray.config import HookConfig, RunConfig
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
