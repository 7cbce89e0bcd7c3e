from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sae_ray.telemetry import Progress, RateMeter, RunLog, RunStatus, read_jsonl


def test_steps_that_will_be_trained_again_leave_the_metrics(tmp_path):
    log = RunLog(tmp_path)
    log.metrics([{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)])
    log.rewind(2)
    log.metrics([{"step": 3, "loss": 9.0}])
    log.close()
    assert [(row["step"], row["loss"]) for row in read_jsonl(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]


def test_a_line_torn_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    RunLog(tmp_path, resume_at=1).close()
    assert path.read_text() == '{"step": 1}\n'


def test_events_after_a_torn_one_are_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "commit", "step": 8}\n{"event": "comm', encoding="utf-8")
    for step in (16, 24):
        log = RunLog(tmp_path)
        log.event("commit", step=step, said="a\u2028b")
        log.close()
    assert [row["step"] for row in read_jsonl(path)] == [8, 16, 24]
    assert path.read_text(encoding="utf-8").count("\n") == 4


def test_a_crash_while_steps_are_cut_loses_none_of_the_others(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    log.metrics([{"step": step} for step in (1, 2, 3)])
    before = (tmp_path / "metrics.jsonl").read_text()

    def die(path: Path, target: Path) -> None:
        raise OSError("died before the last moment")

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(OSError, match="last moment"):
        log.rewind(2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.fixture
def plain():
    buffer = io.StringIO()
    return buffer, Console(file=buffer, width=200, force_terminal=False)


def test_without_a_terminal_progress_is_plain_lines(plain, tmp_path):
    buffer, console = plain
    status = RunStatus(total_steps=100)
    log = RunLog(tmp_path)
    with Progress("run", status, console, log) as progress:
        progress.phase("reconstruction", "100 steps")
        status.step, status.fvu, status.l0 = 40, 0.25, 31.9
        status.judge_queue, status.verdicts, status.verdicts_per_s, status.seconds_left = 7, 12, 3.5, 61
        progress.refresh(force=True)
    log.close()
    out = buffer.getvalue()
    assert "\x1b" not in out
    assert "reconstruction: 100 steps" in out
    for part in ("step 40/100", "FVU 0.250", "L0 31.9", "queue 7", "verdicts 12 (3.5/s)", "left 01:01"):
        assert part in out
    phases = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["name"] for event in phases if event["event"] == "phase"] == ["starting", "reconstruction"]


def test_on_a_terminal_progress_is_a_live_panel():
    buffer = io.StringIO()
    status = RunStatus(phase="RLAIF", step=3, total_steps=4, fvu=0.5)
    with Progress("run", status, Console(file=buffer, force_terminal=True, width=100)) as progress:
        progress.say("a line that stays")
        progress.refresh()
    out = buffer.getvalue()
    assert "a line that stays" in out
    assert "step 3/4" in out
    assert "0.500" in out


def test_a_rate_of_steps_is_none_while_old_steps_are_trained_again(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("sae_ray.telemetry.time.monotonic", lambda: next(clock))
    rates = RateMeter()
    for step in (8, 16, 24):
        rates.add(100, step)
    assert (rates.steps_per_s(), rates.tokens_per_s()) == (8, 100)
    for step in (8, 16):  # a rank died at 24
        rates.add(100, step)
    assert rates.steps_per_s() == 2
    rates.add(100, 8)
    assert rates.steps_per_s() is None
    assert rates.tokens_per_s() == 100
