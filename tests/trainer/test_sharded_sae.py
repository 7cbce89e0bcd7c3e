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
        torch.testing.assert_close(
            state[key], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=key: f"{name} {n}: {m}"
        )
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
        alone, sharded = sharded_run_float32(Mesh.alone()), sharded_run_float32(mesh)
        rows = slice(sharded.first_latent, sharded.last_latent)
        torch.testing.assert_close(sharded.W_enc_mD, alone.W_enc_mD[rows], rtol=0, atol=1e-5)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("world", "meshes"), [(2, [(1, 2), (2, 1)]), (4, [(2, 2), (1, 4)])])
def test_every_mesh_equals_the_float64_reference_to_1e_10_over_20_steps(world, meshes, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(rank_process, (world, meshes, free_port()), nprocs=world)


def test_float32_agrees_with_float64_to_rounding():
    alone = sharded_run_float32(Mesh.alone())
    assert alone.W_enc_mD.dtype == torch.float32
    reference = sharded_run(Mesh.alone(), "batchtopk", steps=6)
    torch.testing.assert_close(alone.W_enc_mD.double(), reference.W_enc_mD, rtol=0, atol=1e-4)


def sharded_run_float32(mesh: Mesh) -> ShardedTrainer:
    sae, cfg = configs("batchtopk")
    trainer = ShardedTrainer(sae, cfg.model_copy(update={"dtype": "float32"}), D_IN, SEED, Collectives(mesh))
    trainer.initialise(batches(1)[0])
    for raw in batches(6):
        low, high = mesh.rows(len(raw))
        trainer.step(raw[low:high].float(), len(raw))
    return trainer


def bytes_process(rank: int, world: int, port: int, counts) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    mesh = Mesh.connect(2, 2)
    for architecture in ("topk", "batchtopk", "matryoshka", "jumprelu"):
        sent = []
        for d_sae in (64, 512):
            sae = SAEConfig(architecture=architecture, d_sae=d_sae, k=4, aux_k=0)
            trainer = ShardedTrainer(sae, TrainerConfig(tp=2, dp=2, log_every=100), D_IN, SEED, Collectives(mesh))
            raw = batches(1)[0]
            low, high = mesh.rows(len(raw))
            trainer.initialise(raw)
            trainer.collectives.bytes.clear()
            trainer.step(raw[low:high].float(), len(raw))
            pairs = (trainer.collectives.bytes.pop("gather_dp", 0), trainer.collectives.bytes.pop("gather_mesh", 0))
            sent.append((dict(trainer.collectives.bytes), sum(pairs)))
        counts[architecture, rank] = sent
    dist.destroy_process_group()


def test_the_bytes_of_a_step_do_not_grow_with_d_sae(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with mp.Manager() as manager:
        counts = manager.dict()
        mp.spawn(bytes_process, (4, free_port(), counts), nprocs=4)
        found = dict(counts)
    for (architecture, _), ((small, small_pairs), (large, large_pairs)) in found.items():
        assert small == large, architecture
        assert small["sum_tp"] > 0
        # The pairs of a shard are about k per token whatever d_sae is, but not to the byte.
        assert large_pairs < 1.5 * small_pairs, architecture


def test_one_process_sends_nothing():
    trainer = ShardedTrainer(*configs("batchtopk"), D_IN, SEED, Collectives(Mesh.alone()))
    trainer.initialise(batches(1)[0])
    trainer.step(batches(1)[0], BATCH)
    assert not trainer.collectives.bytes  # nothing is sent where there is nobody to send to


def test_decoder_rows_stay_unit_vectors():
    norms = sharded_run(Mesh.alone(), "topk", credit=True).W_dec_mD.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-12)


def test_a_fork_trains_like_its_origin_and_apart_from_it():
    for name in ("batchtopk", "jumprelu", "gated", "transcoder-topk"):
        trainer = sharded_run(Mesh.alone(), name, steps=12)
        twin = trainer.fork()
        before = trainer.W_enc_mD.clone()
        target = target_of(batches()[0]) if CASES[name][2] else None
        twin.step(batches()[0], BATCH, target_bO=target)
        assert torch.equal(trainer.W_enc_mD, before)
        trainer.step(batches()[0], BATCH, target_bO=target)
        for key, tensor in trainer.state().items():
            assert torch.equal(tensor, twin.state()[key]), (name, key)


def test_inference_does_not_depend_on_the_other_tokens():
    for name in ("batchtopk", "topk", "jumprelu", "gated", "relu-l1", "topk-margin"):
        trainer = sharded_run(Mesh.alone(), name, steps=12)
        tokens = batches()[5]
        together, first = trainer.encode(tokens).dense(), trainer.encode(tokens[:7]).dense()
        torch.testing.assert_close(together[:7], first)
        assert together.count_nonzero() > 0


def test_shares_are_near_equal_and_cover_everything():
    for total in range(9):
        bounds = [share(total, 4, i) for i in range(4)]
        assert [low for low, _ in bounds] == [0] + [high for _, high in bounds[:-1]]
        assert bounds[-1][1] == total
        sizes = [high - low for low, high in bounds]
        assert max(sizes) - min(sizes) <= 1


def test_starting_twice_gives_the_same_weights():
    for name in ("jumprelu", "transcoder-gated"):
        first, second = start(Mesh.alone(), name), start(Mesh.alone(), name)
        for key, tensor in first.state().items():
            assert torch.equal(tensor, second.state()[key]), (name, key)


def resampled(mesh: Mesh, name: str) -> ShardedTrainer:
    """Six steps with five latents killed at the start, which the fourth step restarts."""
    sae, cfg = configs(name)
    sae = sae.model_copy(update={"resample_every": 4, "dead_after_tokens": 3 * BATCH})
    trainer = ShardedTrainer(sae, cfg, D_IN, SEED, Collectives(mesh), 9 if CASES[name][2] else None)
    data = batches(6)
    trainer.initialise(data[0], target_of(data[0]) if CASES[name][2] else None)
    for latent in (1, 20, 25, 30, 47):
        if trainer.first_latent <= latent < trainer.last_latent:
            trainer.b_enc_m[latent - trainer.first_latent] = -100
    for raw in data:
        low, high = mesh.rows(len(raw))
        trainer.step(raw[low:high], len(raw), None, target_of(raw[low:high]) if CASES[name][2] else None)
    return trainer


def resampling_process(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for name in ("batchtopk", "gated", "transcoder-topk"):
        alone, sharded = resampled(Mesh.alone(), name), resampled(Mesh.connect(2, 2), name)
        rows = slice(sharded.first_latent, sharded.last_latent)
        assert float(alone.b_enc_m.min()) > -50
        for key in ("W_enc", "W_dec", "b_enc", "silent"):
            torch.testing.assert_close(sharded.state()[key], alone.state()[key][rows], rtol=1e-9, atol=1e-10)
    dist.destroy_process_group()


def test_resampling_draws_the_same_tokens_on_every_mesh(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(resampling_process, (4, free_port()), nprocs=4)
