"""The controller's loop over actors that are only durations: what it does for a block does not grow with the run."""

from __future__ import annotations

import sys

import pytest
from benchmark_scripts import load

from sae_ray.activations.scheduler import BlockScheduler

controller_load = load("controller_load")


@pytest.fixture
def calls(monkeypatch):
    """How often a lease was asked for, and how many blocks were looked at for one."""
    counted = {"lease": 0, "looked": 0}
    for name, method in (("lease", "lease"), ("looked", "_up")):
        original = getattr(BlockScheduler, method)

        def counting(self, *args, name=name, original=original):
            counted[name] += 1
            return original(self, *args)

        monkeypatch.setattr(BlockScheduler, method, counting)
    return counted


@pytest.mark.parametrize("trainer_bound", [False, True])
def test_work_for_a_block_does_not_grow_with_the_number_of_actors(calls, trainer_bound):
    per_block = []
    for actors in (100, 400):
        calls.update(lease=0, looked=0)
        found, _ = controller_load.drive(actors, 6_400, ranks=16, trainer_bound=trainer_bound, samples=2)
        assert found[-1].blocks == 6_400
        per_block.append((calls["lease"] / 6_400, calls["looked"] / 6_400))
    # A lease, and one that finds no room, for each turn of the loop: blocks and the ranks' answers (16 per 32 blocks).
    assert max(max(pair) for pair in per_block) < 5
    assert per_block[1][0] < per_block[0][0] * 1.5


def test_nothing_is_kept_of_blocks_that_are_trained():
    """Everything that the controller holds on to, counted after a tenth of the run and at its end."""

    def sizes(controller) -> dict[str, int]:
        stream = controller.stream
        owners = {"stream": stream, "scheduler": stream._scheduler, "pipeline": controller.pipeline, "": controller}
        return {
            f"{owner}.{name}": len(value)
            for owner, thing in owners.items()
            for name, value in vars(thing).items()
            if hasattr(value, "__len__") and not isinstance(value, str)
        }

    short = sizes(controller_load.drive(80, 3_200, ranks=16, samples=1)[1])
    found, controller = controller_load.drive(80, 16_000, ranks=16, samples=1)
    long = sizes(controller)
    assert found[0].blocks == 16_000
    assert {name: size for name, size in long.items() if size > short[name] + 300} == {}
    assert "ray" in sys.modules
    assert controller_load.stream_module.ray is sys.modules["ray"]
