"""`sae-ray status` of a run folder and of a prefix on S3: what is shown, and of a run that is gone."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from s3_server import BUCKET, S3Server

from sae_ray import cli, logs
from sae_ray.config_file import parse_config
from sae_ray.errors import RunInterrupted, UserError
from sae_ray.status_file import FILE, StatusFile, read_status
from sae_ray.storage import open_storage
from sae_ray.telemetry import Progress, RunLog, RunStatus
from sae_ray.watching import SILENT_S, is_run, look, watch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with nothing but its config and one commit."""
    home = tmp_path / "night"
    home.mkdir()
    config = parse_config({"name": "night", "runs_dir": str(tmp_path), "hook": {"layer": 2}}, "x")
    (home / "config.yaml").write_text(config.to_yaml())
    for step in (4, 8):
        open_storage(home / "checkpoints").write(f"step-{step}/manifest.json", b"{}")
    return home


def shown(location: str | Path) -> str:
    console = Console(file=io.StringIO(), width=160)
    watch(str(location), console, once=True)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_running_run_is_shown_with_what_it_waits_for(folder):
    status = RunStatus(phase="RLAIF", step=8, total_steps=20, fvu=0.25, judge_queue=7)
    status.measures = {"trainer_wait_share": 0.125, "reward_age_steps": 1234.0}
    log = RunLog(folder)
    log.event("commit", step=8)
    log.close()
    logs.start(folder, "night", "driver")
    logs.logging.getLogger("botocore").warning("\x1b[2J slow down")
    logs.stop()
    StatusFile(folder, "night").show(status)
    out = shown(folder)
    for part in ("RLAIF", "step 8/20", "FVU 0.250", "queue 7", "trainer_wait_share", "0.125", "1,234", "2 checkpoints"):
        assert part in out, part
    assert "the last at step 4, 8" in out
    assert "commit" in out
    assert "\\x1b[2J slow down" in out
    assert "\x1b" not in out
    assert re.search(r"written \d+ s ago by process \d+ on", out)


def test_a_run_that_has_fallen_silent_is_said_to_be_gone(folder, monkeypatch):
    StatusFile(folder, "night").show(RunStatus())
    later = time.time() + SILENT_S + 60
    monkeypatch.setattr(time, "time", lambda: later)
    assert re.search(r"silent for 02:\d\d: process \d+ on .* is gone, or cannot write", shown(folder))


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (None, "done", ""),
        (RunInterrupted("at step 3"), "stopped", "at step 3"),
        (UserError("no room"), "failed", "no room"),
    ],
)
def test_the_last_words_are_kept(folder, error, state, why):
    with suppress(UserError, RunInterrupted), Progress("night", RunStatus(), file=StatusFile(folder, "night")):
        if error is not None:
            raise error
    found, _ = look(str(folder))
    assert found is not None
    assert (found["state"], found["why"]) == (state, why)
    assert state in shown(folder)


def test_the_file_is_written_at_most_every_two_seconds_and_whole(folder):
    file, status = StatusFile(folder, "night"), RunStatus()
    file.show(status)
    status.step = 5
    file.show(status)
    assert read_status(folder)["status"]["step"] == 0  # type: ignore[index]
    file.show(status, "done")
    assert read_status(folder)["status"]["step"] == 5  # type: ignore[index]
    assert [path.name for path in folder.iterdir() if "status" in path.name] == [FILE]


def test_a_status_that_a_newer_version_wrote_is_read(folder):
    StatusFile(folder, "night").show(RunStatus(step=3, total_steps=9))
    found = json.loads((folder / FILE).read_text())
    found["status"]["of_tomorrow"] = 1
    (folder / FILE).write_text(json.dumps(found))
    assert "step 3/9" in shown(folder)


def test_checkpoints_that_cannot_be_listed_hide_nothing_else(folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "test")
    tree = {"name": "night", "runs_dir": str(folder.parent), "hook": {"layer": 2}}
    config = parse_config({**tree, "trainer": {"checkpoint_dir": "s3://b/x"}}, "x")
    (folder / "config.yaml").write_text(config.to_yaml())
    StatusFile(folder, "night").show(RunStatus(step=3, total_steps=9))
    out = shown(folder)
    assert "step 3/9" in out
    assert "s3://b/x: cannot be listed" in out


def test_a_folder_is_told_from_a_submitted_runs_name(folder, monkeypatch, capsys):
    assert is_run(str(folder))
    assert is_run("s3://bucket/run")
    assert not is_run("night")
    monkeypatch.setattr(sys, "argv", ["sae-ray", "status", str(folder), "--once"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "no status: the run has not begun" in capsys.readouterr().out


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    running = S3Server()
    for key, value in running.settings.items():
        monkeypatch.setenv(key, value)
    yield running
    running.stop()


def test_a_folder_without_a_run_is_not_asked_of_a_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sae-ray", "status", f"{tmp_path}/nothing"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert f"{tmp_path}/nothing: is no run folder" in capsys.readouterr().err


def test_beside_checkpoints_on_s3_lies_a_copy_that_others_can_watch(folder, s3):
    place = f"s3://{BUCKET}/night"
    with pytest.raises(UserError, match="holds neither a run's status nor a checkpoint"):
        look(place)
    file = StatusFile(folder, "night", place)
    file.show(RunStatus(step=3, total_steps=9), "done")  # waits until it is there
    open_storage(place).write("step-3/manifest.json", b"{}")
    out = shown(place)
    assert "step 3/9" in out
    assert "1 checkpoints at s3://runs/night" in out
    # A bucket that is gone costs a run nothing but the copy.
    StatusFile(folder, "night", "s3://no-such-bucket/x").show(RunStatus(step=4), "done")
    assert read_status(folder)["status"]["step"] == 4  # type: ignore[index]
