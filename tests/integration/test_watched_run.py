"""A run that is looked at from outside while it trains: its status here and on S3, its series, its logs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs import finish, start, wait_for, write_config
from s3_server import BUCKET, S3Server

from sae_ray.measures import MEASURED
from sae_ray.status_file import read_status
from sae_ray.watching import look

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    running = S3Server()
    for key, value in running.settings.items():
        monkeypatch.setenv(key, value)
    yield running
    running.stop()


def scraped(pid: int) -> str:
    """What the metrics agent of a run's own Ray tells Prometheus; "" until it does."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for connection in child.net_connections("inet"):
                if connection.status != psutil.CONN_LISTEN:
                    continue
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                    url = f"http://127.0.0.1:{connection.laddr.port}/metrics"
                    text = urllib.request.urlopen(url, timeout=3).read().decode()
                    if "ray_sae_ray_step{" in text:
                        return str(text)
    return ""


def test_a_run_can_be_watched_while_it_trains(tmp_path: Path, s3: S3Server) -> None:
    place = f"s3://{BUCKET}/tiny"
    trainer = {"tp": 1, "steps": 4000, "checkpoint_every": 8, "checkpoint_dir": place}
    config = write_config(tmp_path, trainer=trainer, activations={"producers": 1})
    folder = tmp_path / "runs" / "tiny"
    process = start(config)
    try:
        wait_for(lambda: (read_status(place) or {"status": {"step": 0}})["status"]["step"] >= 8, process, 900)
        wait_for(lambda: "ray_sae_ray_s3_requests_total{" in scraped(process.pid), process, 300)
        series = scraped(process.pid)
        found, _ = look(str(folder))
        assert found is not None
        assert found["state"] == "running"
        of_run = found["status"]["measures"]
        assert {"trainer_wait_share", "producers_idle_share", "commit_age_s", "oldest_lease_s"} <= of_run.keys()
        assert 0 <= of_run["trainer_wait_share"] <= 1
        assert of_run["producers_ready"] == 1
        # All that has a value is told to Prometheus, under the name that the dashboard asks for.
        exported = set(re.findall(r'^ray_sae_ray_(\w+?)\{.*run="tiny".*', series, re.MULTILINE))
        assert exported >= {name for name in MEASURED if name in of_run}
        assert {"s3_requests_total", "s3_written_bytes_total", "s3_seconds_bucket"} <= exported
    finally:
        os.killpg(process.pid, 2)
        code, out, err = finish(process, 500)
    assert code == 130, out + err
    for location in (folder, place):
        last = read_status(location)
        assert last is not None
        assert last["state"] == "stopped"
        assert "the same command resumes" in last["why"]
    rows = [json.loads(line) for line in (folder / "logs" / "driver.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {"tiny"}
    assert max(row["step"] or 0 for row in rows) >= 8
    assert {row["generation"] for row in rows} == {None, 0}
    assert time.time() - last["written"] < 600
