"""The doctor says what would fail, and its own failures are findings too."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from s3_faults import S3Faults
from s3_server import BUCKET, S3Server

from sae_ray import doctor, preflight
from sae_ray.config import RunConfig
from sae_ray.doctor import Demand, Finding, demand, examine, print_findings
from sae_ray.errors import UserError


def config(tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({
        "name": "x", "runs_dir": str(tmp_path), "hook": {"layer": 2}, "ray": {"local_cpus": 8}, **sections,
    })  # fmt: skip


@pytest.fixture
def s3() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


def of(found: list[Finding], what: str) -> Finding:
    (one,) = [each for each in found if each.what == what]
    return one


def test_on_the_machine_that_runs_the_tests_nothing_fails(tmp_path: Path) -> None:
    found = examine(config(tmp_path))
    assert not [each for each in found if each.state == "failure"]
    assert "ray" in of(found, "packages").told
    assert of(found, "model, hooks, corpus").state == "ok"


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    runs, checkpoints = tmp_path / "runs", tmp_path / "disk" / "checkpoints"
    found = examine(config(tmp_path, runs_dir=str(runs), trainer={"checkpoint_dir": str(checkpoints)}))
    assert of(found, "run folder").state == of(found, "trainer.checkpoint_dir").state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_each_thing_that_is_wrong_is_found_in_one_go(tmp_path: Path) -> None:
    bad = config(
        tmp_path,
        hook={"layer": 99},
        judge={"model": "./no/such/judge"},
        trainer={"tp": 16, "cpus": 1, "checkpoint_dir": "/proc/nowhere"},
        sae={"d_sae": 4096, "init_from": str(tmp_path / "nothing")},
    )
    found = examine(bad)
    failed = {each.what for each in found if each.state == "failure"}
    assert failed == {
        "model, hooks, corpus", "judges", "trainer.checkpoint_dir", "sae.init_from", "reserved of this machine",
    }  # fmt: skip
    assert "hook.layer" in of(found, "model, hooks, corpus").told
    assert "18 CPUs are reserved and there are 8" in of(found, "reserved of this machine").told


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"ray": "1.0", "boto3": None}.get(name, real(name)))
    found = of(list(doctor._packages()), "packages")
    assert found.state == "failure"
    assert "boto3 is missing" in found.told
    assert "ray 1.0, wanted ==2.60.0" in found.told


def test_a_token_mode_without_a_token_would_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert of(list(doctor._ray()), "Ray's token").state == "failure"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-of-mine")
    told = of(list(doctor._ray()), "Ray's token")
    assert told.state == "ok"
    assert "secret-of-mine" not in told.told


def test_a_bucket_is_written_read_and_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, s3: S3Server, tmp_path: Path
) -> None:
    for key, value in s3.settings.items():
        monkeypatch.setenv(key, value)
    place, key = f"s3://{BUCKET}/run", "trainer.checkpoint_dir"
    assert doctor._check_bucket(place, key) is None
    assert s3.keys() == []
    # An endpoint that does not mind conditions: two runs that write there would not notice each other.
    with S3Faults(s3.settings["AWS_ENDPOINT_URL"], dropped_headers=("If-None-Match",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(UserError, match=r"^trainer\.checkpoint_dir = s3://runs/run: the endpoint ignores If-None-"):
            doctor._check_bucket(place, key)
    assert s3.keys() == []
    # One that knows none and says so: a run looks before it writes, and between the two is a moment.
    with S3Faults(s3.settings["AWS_ENDPOINT_URL"], unknown_headers=("If-None-Match",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        asked = config(tmp_path, trainer={"checkpoint_dir": place})
        monkeypatch.setattr(preflight, "check_sources", lambda _: None)
        monkeypatch.setattr(preflight, "check_judges", lambda _: None)
        told = of(list(doctor._config(asked)), key)
        assert told.state == "warning"
        assert told.told.startswith(f"{place}: the endpoint refuses conditional writes")
    assert s3.keys() == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.settings["AWS_ENDPOINT_URL"])
    with pytest.raises(UserError, match="there is no such bucket"):
        doctor._check_bucket("s3://no-such-bucket/run", key)


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> Any:
        raise RuntimeError("no such driver")

    monkeypatch.setattr(doctor, "_gpus", breaks)
    found = examine()
    assert "RuntimeError: no such driver" in next(each.told for each in found if each.state == "failure")
    assert of(found, "Python").state == "ok"


def test_what_a_run_reserves(tmp_path: Path) -> None:
    asked = config(
        tmp_path,
        activations={"producers": 3, "cpus": 2, "gpus": 1},
        trainer={"dp": 2, "tp": 2, "cpus": 1, "gpus": 0.5},
        judge={"model": "a/b", "cpus": 4, "gpus": 1, "tensor_parallel": 2,
               "autoscaling": {"min_replicas": 0, "initial_replicas": 1, "max_replicas": 3}},
        judges={"explainer": {"max_in_flight": 3}, "heldout": {"endpoint": "http://127.0.0.1:1/v1"}},
    )  # fmt: skip
    assert demand(asked) == Demand(6 + 4 + 4, 3 + 2 + 2, 6 + 4 + 12, 3 + 2 + 6)
    quiet = asked.model_copy(update={
        "rlaif": asked.rlaif.model_copy(update={"enabled": False}),
        "evaluation": asked.evaluation.model_copy(update={"latents": 0}),
    })  # fmt: skip
    assert demand(quiet) == Demand(10, 5, 10, 5)


def test_the_table_says_whether_a_run_would_fail() -> None:
    console = Console(file=io.StringIO(), width=100)
    assert print_findings([Finding("a", "ok", "fine")], console)
    assert not print_findings([Finding("a", "failure", "broken")], console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "all is well" in told
    assert "1 would fail, 0 to look at" in told
