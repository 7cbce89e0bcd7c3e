"""Checkpoint folders without Ray: two shards written by hand, read whole and on other meshes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3_server import BUCKET, S3Server
from safetensors.torch import load_file

from sae_ray.config import RunConfig, SAEConfig, TrainerConfig
from sae_ray.errors import UserError
from sae_ray.sae.inference import TrainedSAE
from sae_ray.tensor_file import buffers_of
from sae_ray.trainer import checkpoint
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.saving import ShardWriter
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


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture
def on_s3(server, monkeypatch, request) -> str:
    for name, value in server.settings.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


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
        reports.append(
            {"files": files, "copies": {"main": trainer.meta()}, "latents": {"main": (low, high)}, "tp_rank": rank}
        )
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


def test_two_shards_read_as_one_and_as_four_are_the_same_sae(tmp_path):
    """tp 2 -> 1 -> 4, weights and optimiser, each mesh reading what the one before wrote."""
    trainer = trained()
    whole = trainer.state()
    folder, step = tmp_path, 5
    path = write(folder, step, trainer, ((0, 30), (30, 60)))
    for bounds in [((0, 60),), ((0, 15), (15, 30), (30, 45), (45, 60))]:
        manifest, step = checkpoint.read_manifest(path), step + 1
        parts = [checkpoint.read_rows(path, manifest, "main", low, high) for low, high in bounds]
        for name, tensor in whole.items():
            joined = torch.cat([part[name] for part in parts]) if checkpoint.is_sharded(name) else parts[0][name]
            assert torch.equal(joined, tensor), name
        again = ShardedTrainer(trainer.sae, trainer.cfg, D_IN, 0, Collectives(Mesh.alone()))
        again.load_state(checkpoint.read_rows(path, manifest, "main", 0, D_SAE), manifest["copies"]["main"])
        path = write(folder, step, again, bounds)


def test_checkpoints_on_s3_commit_prune_and_load_as_in_a_folder(on_s3, server):
    trainer = trained()
    assert checkpoint.latest(on_s3) is None
    for step in (1, 2, 10):
        write(on_s3, step, trainer, pin="reconstruction" if step == 1 else None)
    checkpoint.begin(checkpoint.step_dir(on_s3, 3))
    checkpoint.write_shard(checkpoint.step_dir(on_s3, 3), 0, "main", trainer.state())
    assert checkpoint.steps(on_s3) == {1: True, 2: True, 3: False, 10: True}
    assert checkpoint.latest(on_s3) == f"{on_s3}/step-10"
    assert checkpoint.prune(on_s3, keep=1) == [2, 3]
    assert checkpoint.steps(on_s3) == {1: True, 10: True}
    tensors, _ = checkpoint.load_full(f"{on_s3}/step-10")
    for name, tensor in trainer.state().items():
        assert torch.equal(tensors[name], tensor), name
    key = f"{on_s3.removeprefix(f's3://{BUCKET}/')}/step-10/rank-1.main.safetensors"
    server.client.put_object(Bucket=BUCKET, Key=key, Body=b"torn")
    with pytest.raises(UserError, match=rf"{BUCKET}/.*/step-10/rank-1\.main\.safetensors: is corrupt"):
        checkpoint.load_full(f"{on_s3}/step-10")
    with pytest.raises(UserError, match=r"rank-1\.main\.safetensors: is corrupt"):
        checkpoint.check_whole(f"{on_s3}/step-10", largest=1 << 30)
    checkpoint.remove_all(on_s3)
    assert checkpoint.steps(on_s3) == {}


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_second_run_cannot_commit_over_the_firsts_checkpoint(place, tmp_path, request):
    home = tmp_path / "step-4" if place == "folder" else f"{request.getfixturevalue('on_s3')}/step-4"
    checkpoint.begin(home)
    checkpoint.commit(home, {"step": 4, "config": {"name": "first"}})
    with pytest.raises(UserError, match=r"manifest\.json: somebody else has committed"):
        checkpoint.commit(home, {"step": 4, "config": {"name": "second"}})
    assert checkpoint.read_manifest(home)["config"]["name"] == "first"
    checkpoint.begin(home)
    checkpoint.commit(home, {"step": 4, "config": {"name": "second"}})


def test_what_a_failed_save_left_is_removed_and_commits_stay(tmp_path):
    write(tmp_path, 5, trained())
    half = tmp_path / "step-6"
    half.mkdir()
    (half / ".rank-0.main.safetensors.x1").write_bytes(b"half of a shard")
    checkpoint.discard_uncommitted(tmp_path)
    assert checkpoint.steps(tmp_path) == {5: True}
    assert not half.exists()


def test_a_snapshot_holds_the_state_it_was_taken_of_while_training_goes_on(tmp_path, monkeypatch):
    """The write is held back until the next steps are trained."""
    go_on, write_shard = threading.Event(), checkpoint.write_shard
    monkeypatch.setattr(checkpoint, "write_shard", lambda *args: go_on.wait(30) and write_shard(*args))
    trainer, writer = trained(), ShardWriter()
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    writer.start(str(tmp_path), 0, {"main": trainer.state()})
    for i in range(5, 8):
        trainer.step(batch(i), 32)
    assert not torch.equal(trainer.state()["W_enc"], before["W_enc"])
    assert writer.report(0) is None
    go_on.set()
    report = writer.report(30)
    assert report is not None
    tensors = load_file(tmp_path / "rank-0.main.safetensors")
    assert tensors.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor), name
    assert report["files"]["rank-0.main.safetensors"]["bytes"] == (tmp_path / "rank-0.main.safetensors").stat().st_size


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_asked_for(tmp_path):
    (tmp_path / "file").write_text("")
    writer = ShardWriter()
    writer.start(str(tmp_path / "file" / "step-1"), 0, {"main": {"W_enc": torch.zeros(2, 2)}})
    with pytest.raises(UserError, match=r"step-1/rank-0\.main\.safetensors: cannot be written: Not a directory"):
        writer.report(30)
    # The next save starts afresh.
    writer.start(str(tmp_path / "step-2"), 0, {"main": {"W_enc": torch.zeros(2, 2)}})
    assert writer.report(30)["files"].keys() == {"rank-0.main.safetensors"}


def test_tensors_of_every_kind_are_read_back_by_the_safetensors_library(tmp_path):
    state = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "rng.torch": torch.get_rng_state(),
        "steps": torch.tensor([7, 8]),
        "dead": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "column": torch.randn(4, 3)[:, 1],
    }
    checkpoint.write_shard(tmp_path, 0, "main", state)
    tensors = load_file(tmp_path / "rank-0.main.safetensors")
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_a_tensor_of_one_element_is_written_whatever_its_stride(tmp_path):
    one = torch.tensor(3.5).expand(1)  # stride 0, contiguous all the same
    data = b"".join(bytes(part) for part in buffers_of({"one": one}))
    (tmp_path / "file.safetensors").write_bytes(data)
    assert load_file(tmp_path / "file.safetensors")["one"].tolist() == [3.5]
