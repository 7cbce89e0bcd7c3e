"""Runs whose blocks come from an activation store and whose checkpoints lie on a real S3 server."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from runs import finish, losses, wait_for, write_config
from s3_server import BUCKET, S3Server

from sae_ray.activations.store import ActivationStore, chunk_key, write_chunk
from sae_ray.activations.storing import StoreWriter
from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.controller import Controller
from sae_ray.errors import RunInterrupted
from sae_ray.evaluation.evaluator import find_saes
from sae_ray.session import Interrupt
from sae_ray.storage import LocalStorage
from sae_ray.telemetry import Progress, RunLog, RunStatus, read_jsonl
from sae_ray.trainer import checkpoint

pytestmark = pytest.mark.timeout(600)
STEPS = 24


def config(folder: Path, **sections: Any) -> Path:
    """The tiny run with 24 steps, two for each block, a commit at every eighth."""
    trainer = {"steps": STEPS, "batch_tokens": 126, "checkpoint_every": 8, **sections.pop("trainer", {})}
    evaluation = {"blocks": 1, "ce_sequences": 1}
    return write_config(folder, trainer=trainer, evaluation=evaluation, **sections)


class StopWhen(Interrupt):
    """A Ctrl-C at the first moment that `condition` holds."""

    def __init__(self, condition: Callable[[], bool]):
        self.condition = condition

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self.condition()


def run_here(cfg: RunConfig, stop_after_commit: bool = False) -> str:
    """The run's loop on the session's Ray, without evaluation; a stopped run ends as by Ctrl-C. What it printed."""
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    status, log, printed = RunStatus(total_steps=cfg.total_steps), RunLog(cfg.run_dir), io.StringIO()
    progress = Progress(cfg.name, status, Console(file=printed, width=400), log)
    interrupt = StopWhen(lambda: stop_after_commit and controller.committed_step > 0)
    controller = Controller(cfg, status, progress, log, interrupt)
    try:
        controller.run()
    except RunInterrupted:
        assert stop_after_commit
    finally:
        controller.close()
        log.close()
    return printed.getvalue()


def start(path: Path, *options: str, command: str = "train", env: dict[str, str] | None = None) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "sae_ray.cli", command, str(path), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**(env or os.environ), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def refused(process: Any) -> str:
    """The one line with which a command ends, with exit code 2."""
    code, out, err = finish(process)
    lines = [line for line in err.strip().splitlines() if line.startswith("sae-ray: ")]
    assert (code, len(lines)) == (2, 1), f"exit code {code}\n{out[-3000:]}\n{err[-3000:]}"
    assert "Traceback" not in err
    return lines[0]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "runs" / "tiny" / "events.jsonl"
    return [row for row in (read_jsonl(path) if path.exists() else []) if row["event"] == kind]


@pytest.fixture
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def live(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run with live producers, nothing stored, nothing interrupted."""
    folder = tmp_path_factory.mktemp("live")
    run_here(load_config(config(folder)))
    found = losses(folder)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


@pytest.fixture(scope="module")
def stored(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's blocks on disk, in two goes: three blocks, one of which a crash tears, then the command."""
    folder = tmp_path_factory.mktemp("stored")
    path, uri = config(folder), folder / "store"
    StoreWriter(load_config(path), str(uri), Console(file=io.StringIO()), Interrupt()).write(["train"], 3)
    first = {key: (uri / key).stat().st_mtime_ns for key in ActivationStore.open(str(uri)).chunks}
    torn = uri / chunk_key("train", 1)
    torn.write_bytes(torn.read_bytes()[:-1])
    code, printed, err = finish(start(path, "--to", str(uri), command="store"))
    assert code == 0, printed + err
    store = ActivationStore.open(str(uri))
    assert f"{store.train_blocks - 2} written, 2 kept" in printed
    assert f"{sum(c['bytes'] for c in store.chunks.values()) / 1e6:,.1f} MB" in printed
    again = {key: (uri / key).stat().st_mtime_ns for key in first}
    assert [again[key] == first[key] for key in sorted(first)] == [True, False, True]
    return uri


def test_a_run_from_the_store_has_the_losses_of_the_live_run(live, stored, tmp_path):
    run_here(load_config(config(tmp_path, activations={"store": str(stored)})))
    assert losses(tmp_path) == live
    ready = [e for e in events(tmp_path, "stream") if e["what"] == "producer_ready"]
    assert [e["stored_train_blocks"] for e in ready] == [ActivationStore.open(str(stored)).train_blocks] * 2


def test_a_nan_in_a_stored_chunk_stops_the_run_and_leaves_the_last_commit(stored, tmp_path):
    """Blocks 0 to 7 are sound and bring the run past its first commit; block 8 is not."""
    uri = tmp_path / "store"
    shutil.copytree(stored, uri)
    store = ActivationStore.open(str(uri))
    block = store.read("train", 8, list(store.columns))
    block |= {name: value.copy() for name, value in block.items() if isinstance(value, np.ndarray)}
    block["acts"][5, 7] = np.nan
    store.chunks[chunk_key("train", 8)] |= write_chunk(LocalStorage(uri), "train", block)
    store.write_index()
    said = refused(start(config(tmp_path, activations={"store": str(uri)})))
    assert "block 8: 1 of" in said
    assert "blocks.2.hook_resid_post" in said
    last, path = checkpoint.committed(tmp_path / "runs" / "tiny" / "checkpoints")[-1]
    assert 8 <= last <= 16
    for name, tensor in checkpoint.load_full(path)[0].items():
        assert np.isfinite(tensor.numpy()).all(), name


def test_checkpoints_on_s3_survive_the_loss_of_the_run_folder(live, server, tmp_path, monkeypatch):
    for name, value in server.settings.items():
        monkeypatch.setenv(name, value)
    home = f"s3://{BUCKET}/survive"
    path = config(tmp_path, trainer={"checkpoint_dir": home})
    run_here(load_config(path), stop_after_commit=True)
    before = losses(tmp_path)
    assert 8 <= len(before) < STEPS
    commit = events(tmp_path, "commit")[0]
    assert commit["bytes"] > 0
    assert commit["snapshot_seconds"] < commit["write_seconds"]

    shutil.rmtree(tmp_path / "runs")
    printed = run_here(load_config(path))
    assert f"resuming at step {len(before)} of {STEPS}, from {home}/step-{len(before)}" in printed
    assert "runs/tiny is new: metrics and verdicts of the steps before" in printed
    assert before | losses(tmp_path) == live
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()
    assert f"survive/step-{STEPS}/manifest.json" in server.keys("survive/")
    assert find_saes(load_config(path)), "the evaluation and the export find them there"


def test_a_server_that_goes_away_stops_the_run_with_one_line(server, tmp_path):
    env = server.environment()
    path = config(tmp_path, trainer={"checkpoint_dir": f"s3://{BUCKET}/run", "steps": 4000})
    process = start(path, env=env)
    wait_for(lambda: events(tmp_path, "commit"), process)
    server.stop()
    said = refused(process)
    assert said.startswith(f"sae-ray: s3://{BUCKET}/run")
    assert "check AWS_ENDPOINT_URL" in said


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_last_commit(tmp_path):
    """A small file system that somebody else fills while the run trains."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        process = start(config(tmp_path, trainer={"checkpoint_dir": str(disk / "run"), "steps": 4000}))
        wait_for(lambda: events(tmp_path, "commit"), process)
        fill(disk)
        said = refused(process)
        assert f"sae-ray: {disk}/run/step-" in said
        assert "cannot be written: No space left on device; free some space" in said
        found = checkpoint.steps(disk / "run")
        assert found
        assert all(found.values()), "what was not committed is removed"
        for step in found:
            checkpoint.load_full(checkpoint.step_dir(disk / "run", step))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Takes what room is left, and goes on taking what pruning frees."""
    with (disk / "taken").open("wb", buffering=0) as file:
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.01)
