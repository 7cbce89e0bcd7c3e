"""Whole runs through the command line: what a user does, and what must not change the numbers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from statistics import median

import psutil
import pytest
from runs import finish, losses, start, train, wait_for, write_config

from sae_ray.telemetry import read_jsonl

pytestmark = pytest.mark.timeout(600)


def events(folder: Path, name: str = "tiny") -> list[dict]:
    path = folder / "runs" / name / "events.jsonl"
    return read_jsonl(path) if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    """Losses of the tiny run with two producers and no interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(write_config(folder))
    found = losses(folder)
    assert sorted(found) == list(range(1, 49))
    # Of the packages' docstrings some batches are odd ones, whichever packages are installed: medians.
    first, last = (median(found[step] for step in steps) for steps in (range(1, 13), range(37, 49)))
    assert last < 0.8 * first
    return found


def test_one_producer_gives_the_same_losses_as_two(undisturbed, tmp_path):
    train(write_config(tmp_path, activations={"producers": 1}))
    assert losses(tmp_path) == undisturbed


def test_killing_a_producer_changes_no_loss(undisturbed, tmp_path):
    process = start(write_config(tmp_path))
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)
    victim = next(e["pid"] for e in events(tmp_path) if e.get("what") == "producer_ready")
    os.kill(victim, signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert any(e.get("what") == "producer_died" for e in events(tmp_path))
    assert losses(tmp_path) == undisturbed


def test_ctrl_c_commits_and_the_same_command_continues_the_same_losses(undisturbed, tmp_path):
    config = write_config(tmp_path)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    process = start(config)
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    code, out, err = finish(process)
    assert code == 130, out + err
    assert "the checkpoint is committed" in err
    _, left = psutil.wait_procs(family, timeout=5)
    assert not left, f"left behind: {left}"
    trained = len(losses(tmp_path))
    assert trained < 48
    resumed = train(config)
    assert f"resuming at step {trained} of 48" in resumed
    assert losses(tmp_path) == undisturbed


def test_a_trainer_rank_that_dies_is_rebuilt_from_the_last_commit(undisturbed, tmp_path):
    config = write_config(tmp_path, trainer={"checkpoint_every": 4})
    process = start(config)
    wait_for(lambda: any(e["event"] == "commit" for e in events(tmp_path)), process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "TrainerRank" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    ranks[0].kill()
    code, out, err = finish(process)
    assert code == 0, out + err
    assert any(e["event"] == "rank_died" for e in events(tmp_path))
    assert losses(tmp_path) == undisturbed
