"""Checkpoint folders without Ray: two shards written by hand, read whole and on other meshes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sae_ray.config import RunConfig, SAEConfig, TrainerConfig
from sae_ray.errors import UserError
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer import checkpoint
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

D_IN, D_SAE = 6, 60


def trained() -> ShardedTrainer:
    cfg = TrainerConfig(tp=1, log_every=2, warmup_steps=0)
    sae = SAEConfig(d_sae=D_SAE, k=1, aux_k=4, dead_after_tokens=33)
    trainer = ShardedTrainer(sae, cfg, D_IN, 0, Collectives(Mesh.alone()))
    trainer.initialise(batch(0))
    for i in range(5):
        trainer.step(batch(i), 32)
    return trainer


def batch(i: int) -> torch.Tensor:
    return torch.randn(32, D_IN, generator=torch.Generator().manual_seed(i)) + 1


def write(folder: Path, step: int, trainer: ShardedTrainer, bounds=((0, 24), (24, 60)), pin=None) -> Path:
    """Commits a checkpoint as `len(bounds)` ranks would."""
    path = checkpoint.step_dir(folder, step)
    checkpoint.begin(path)
    config = RunConfig.model_validate({"name": "run", "hook": {"layer": 2}, "sae": trainer.sae.model_dump()})
    reports = []
    for rank, (low, high) in enumerate(bounds):
        state = {
            name: tensor[low:high] if checkpoint.is_sharded(name) else tensor
            for name, tensor in trainer.state().items()
        }
        state["credit.latents"] = torch.tensor([low])
        files = checkpoint.write_shard(path, rank, "main", state)
        reports.append({"files": files, "copies": {"main": trainer.meta()}, "latents": (low, high), "tp_rank": rank})
    # A dp replica of a shard writes nothing.
    reports.append({**reports[0], "files": {}})
    about = {"step": step, "cursor": [2, 1], "pin": pin, "extra": {"rounds_done": 1}}
    checkpoint.commit(path, checkpoint.manifest_of(config, D_IN, reports, about))
    return path


def test_all_shards_join_to_the_whole_sae_without_ray(tmp_path):
    trainer = trained()
    tensors, manifest = checkpoint.load_full(write(tmp_path, 5, trainer))
    assert tensors.keys() == trainer.state().keys()
    for name, tensor in trainer.state().items():
        assert torch.equal(tensors[name], tensor), name
    assert (manifest["steps_done"], manifest["cursor"], manifest["hook"]) == (
        5,
        [2, 1],
        "blocks.2.hook_resid_post",
    )
    sae = TrainedSAE.from_checkpoint(tensors, manifest)
    assert torch.equal(sae.encode(batch(9)), trainer.encode(batch(9)).dense())


def test_a_restored_trainer_takes_the_same_steps_bit_for_bit(tmp_path):
    trainer = trained()
    path = write(tmp_path, 5, trainer)
    manifest = checkpoint.read_manifest(path)
    again = ShardedTrainer(trainer.sae, trainer.cfg, D_IN, 0, Collectives(Mesh.alone()))
    again.load_state(checkpoint.read_rows(path, manifest, "main", 0, D_SAE), manifest["copies"]["main"])
    assert again.n_dead == trainer.n_dead > 0
    for i in range(5, 12):
        trainer.step(batch(i), 32)
        again.step(batch(i), 32)
    for name, tensor in trainer.state().items():
        assert torch.equal(again.state()[name], tensor), name


@pytest.mark.parametrize("bounds", [((0, 60),), ((0, 15), (15, 30), (30, 45), (45, 60)), ((0, 30), (30, 60))])
def test_shards_can_be_read_on_any_other_mesh(bounds, tmp_path):
    trainer = trained()
    path = write(tmp_path, 5, trainer)
    manifest = checkpoint.read_manifest(path)
    for low, high in bounds:
        rows = checkpoint.read_rows(path, manifest, "main", low, high)
        assert torch.equal(rows["adam.exp_avg_sq.W_dec"], trainer.state()["adam.exp_avg_sq.W_dec"][low:high])
        assert torch.equal(rows["b_dec"], trainer.b_dec_D)
    credit = checkpoint.read_credit(path, manifest)
    assert [state["latents"].tolist() for state in credit] == [[0], [24]]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_named(damage, tmp_path):
    path = write(tmp_path, 5, trained())
    shard = path / "rank-1.main.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    shard.unlink()
    if damage != "delete":
        shard.write_bytes(data[:-1] if damage == "truncate" else data)
    with pytest.raises(UserError, match=r"rank-1\.main\.safetensors"):
        checkpoint.load_full(path)


def test_a_folder_without_a_manifest_does_not_count(tmp_path):
    trainer = trained()
    assert checkpoint.latest(tmp_path) is None
    older, newer = write(tmp_path, 5, trainer), write(tmp_path, 40, trainer)
    assert checkpoint.latest(tmp_path) == newer
    checkpoint.begin(newer)  # a second attempt at the same step that never commits
    assert checkpoint.latest(tmp_path) == older
    with pytest.raises(UserError, match="not a committed checkpoint"):
        checkpoint.load_full(newer)


def test_pruning_keeps_the_newest_and_the_pinned(tmp_path):
    trainer = trained()
    for step in (1, 2, 3, 10):
        write(tmp_path, step, trainer, pin="reconstruction" if step == 2 else None)
    checkpoint.prune(tmp_path, keep=1)
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [2, 10]
    assert not (tmp_path / "step-1").exists()


def test_missing_copies_and_foreign_formats_are_refused(tmp_path):
    path = write(tmp_path, 5, trained())
    with pytest.raises(UserError, match="no 'control' copy, only main"):
        checkpoint.load_full(path, which="control")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load_full(path)
