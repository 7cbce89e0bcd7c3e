"""Whole runs on a Ray of their own: processes killed, a lease that runs out, nodes taken away, RPCs that fail."""

from __future__ import annotations

import pytest
from chaos_faults import Fault

pytestmark = pytest.mark.timeout(3000)


def test_producers_ranks_and_the_controller_may_be_killed_and_a_lease_may_run_out(chaos) -> None:
    plan = [
        Fault("starting", "producer killed", "while it starts", 0),
        Fault("producer", "producer killed", "after a block", 9),
        Fault("lease", "lease runs out", "inside a block", 14),
        Fault("rank", "rank killed", "inside a window", 21, rank=1),
        Fault("save", "rank killed", "between shard and manifest", 30, rank=0),
        Fault("driver", "controller killed", "between shard and manifest", 50),
    ]
    faults, broken = chaos.on_ray(chaos.world.config("every-process"), plan)
    assert broken == []
    assert {fault["id"] for fault in faults} == {fault.id for fault in plan}


def test_ranks_that_die_before_the_first_commit_begin_anew(chaos) -> None:
    faults, broken = chaos.on_ray(
        chaos.world.config("no-commit-yet"), [Fault("early", "rank killed", "before a window", 4)]
    )
    assert broken == [], "tokens of what is trained again must not be counted twice"
    assert len(faults) == 1


def test_a_node_with_the_trainer_and_one_without_may_go(chaos) -> None:
    plan = [
        Fault("gone", "node gone", "at a gate", 8, rank=1),
        Fault("drained", "node drained, then gone", "at a gate", 22, rank=0, amount=2.0),
    ]
    config = chaos.world.config("nodes-gone", activations={"lease_timeout_s": 300})
    faults, broken = chaos.on_ray(config, plan, nodes=2)
    assert broken == []
    assert {fault["id"] for fault in faults} == {"gone", "drained"}


def test_calls_between_ray_s_processes_may_fail_and_be_late(chaos) -> None:
    from chaos_ray_levels import rpc_faults

    plan, environment = rpc_faults(0, "CoreWorkerService.grpc_client.PushTask", 50)
    faults, broken = chaos.on_ray(chaos.world.config("rpc-faults"), plan, environment)
    assert broken == []
    assert len(faults) == 2
