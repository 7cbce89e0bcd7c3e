"""The sharded trainer against the float64 reference, on one process and on real gloo groups."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import BATCH, CASES, D_IN, SEED, batches, configs, reference_run, sharded_run, start, target_of

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh, share
from sae_ray.trainer.sharded_sae import ShardedTrainer

RUNS = [(name, False) for name in CASES] + [("batchtopk", True), ("topk", True)]


def assert_equals_reference(trainer: ShardedTrainer, name: str, credit: bool) -> None:
    reference = reference_run(name, credit)
    rows = slice(trainer.first_latent, trainer.last_latent)
    state = trainer.state()
    for key, expected in reference.state().items():
        expected = expected if key.endswith("b_dec") else expected[rows]
        torch.testing.assert_close(state[key], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=key: f"{name} {n}: {m}")
    for found, row in zip(trainer.read_metrics(), reference.metrics, strict=True):
        for key, value in row.items():
            # The running threshold is float32.
            assert found[key] == pytest.approx(value, rel=1e-6 if key == "threshold" else 1e-9, abs=1e-12), (name, key)
    if trainer.sae.aux_k and name in ("batchtopk", "topk", "matryoshka", "jumprelu"):
        assert any(row["aux"] > 0 for row in reference.metrics), f"{name} must exercise AuxK"


@pytest.mark.parametrize(("name", "credit"), RUNS)
def test_one_process_equals_the_float64_reference(name, credit):
    assert_equals_reference(sharded_run(Mesh.alone(), name, credit), name, credit)


def rank_process(rank: int, world: int, meshes: list[tuple[int, int]], port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for dp, tp in meshes:
        mesh = Mesh.connect(dp, tp)
        for name, credit in RUNS:
            # Over dp a credit is the mean of the ranks' losses, equal to the reference for equal shares only.
            if not (credit and dp > 1):
                assert_equals_reference(sharded_run(mesh, name, credit), name, credit)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("world", "meshes"), [(2, [(1, 2), (2, 1)]), (4, [(2, 2), (1, 4)])])
def test_every_mesh_equals_the_float64_reference_to_1e_10_over_20_steps(world, meshes, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(rank_process, (world, meshes, free_port()), nprocs=world)
