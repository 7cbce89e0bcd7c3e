"""Producers come and go in the controller's real loop, over actors that are only durations (controller_load)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmark_scripts import load

from sae_ray.config import RunConfig

controller_load = load("controller_load")
BLOCK_S = 2.0
MIX = 4


class Loop:
    """A controller whose trainer takes what `need` producers make, and what happened in it."""

    def __init__(self, need: float, least: int, most: int, window_blocks: int = 40) -> None:
        tree = controller_load.config_of(most, 2, None).model_dump()
        tree["activations"] |= {
            "producers": {"min": least, "max": most}, "mix_blocks": MIX, "window_blocks": window_blocks,
        }  # fmt: skip
        self.ray = controller_load.FakeRay(BLOCK_S)
        self.controller = controller_load.DrivenController(
            RunConfig.model_validate(tree), self.ray, 2, MIX * BLOCK_S / need
        )
        self.events: list[dict[str, Any]] = []
        self.made: Counter[int] = Counter()
        self.controller.log = self

    def event(self, _kind: str, **fields: Any) -> None:
        self.events.append(fields)

    def metrics(self, *_: Any) -> None: ...

    def needs(self, producers: float) -> None:
        """From now on the trainer takes what so many producers make."""
        self.controller.group._window_s = MIX * BLOCK_S / producers

    def train(self, blocks: int) -> None:
        self.controller._train_until(blocks // 4)

    @property
    def numbers(self) -> list[int]:
        return [event["to"] for event in self.events if event["what"] in ("more_producers", "fewer_producers")]

    @property
    def serving(self) -> int:
        return self.controller.stream.counters()["ready"]


def count_blocks(monkeypatch: Any, loop: Loop) -> None:
    original = controller_load._Producer._produce

    def counting(self: Any, split: str, block_id: int) -> Any:
        loop.made[block_id] += 1
        return original(self, split, block_id)

    monkeypatch.setattr(controller_load._Producer, "_produce", counting)


def test_producers_are_added_while_the_trainer_waits_and_leave_when_they_idle(monkeypatch: Any) -> None:
    loop = Loop(need=3.5, least=1, most=8)
    count_blocks(monkeypatch, loop)
    with controller_load.stand_in(loop.ray):
        loop.controller.stream.start()
        loop.train(100)
        early = loop.controller.stream.waits.trainer_wait_share
        loop.train(4_000)
        late, grown, changes = loop.controller.stream.waits.trainer_wait_share, loop.serving, len(loop.numbers)
        # Blocks take longer or shorter, and are trained in order: a little more than 3.5 producers are needed.
        assert 4 <= grown <= 6
        assert late < early / 2, "the trainer waits far less"
        loop.train(6_000)
        assert (loop.serving, len(loop.numbers)) == (grown, changes), "it settled"
        loop.needs(1.2)
        loop.train(10_000)
    assert 2 <= loop.serving <= 3
    gone = [event for event in loop.events if event["what"] == "producer_left"]
    assert len(gone) >= grown - loop.serving
    # Nobody left in the middle of a block: each block was made once, in order and none twice.
    assert set(loop.made.values()) == {1}
    assert sorted(loop.made) == list(range(len(loop.made)))
    counters = loop.controller.stream.counters()
    assert (counters["reissued"], counters["duplicates"], counters["restarts"]) == (0, 0, 0)


def test_a_fixed_number_stays_and_says_who_waits() -> None:
    loop = Loop(need=4, least=2, most=2)
    with controller_load.stand_in(loop.ray):
        loop.controller.stream.start()
        loop.train(2_000)
    assert (loop.serving, loop.numbers) == (2, [])
    # Two of the four that it takes: it waits half its time, and they never do.
    waits = loop.controller.stream.waits
    assert abs(waits.trainer_wait_share - 0.5) < 0.05
    assert waits.producers_idle_share < 0.02
    assert "more activations.producers would help" in waits.told()
