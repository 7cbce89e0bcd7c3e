"""Logs are JSON lines that say of which run, generation and step they are, from libraries too, and hold no secrets."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_ray import cli, logs
from sae_ray.errors import UserError
from sae_ray.telemetry import Progress, RunLog, RunStatus


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    logs.stop()


def rows(folder: Path, name: str = "driver") -> list[dict[str, Any]]:
    (path,) = (folder / logs.FOLDER).glob(f"{name}*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_says_of_which_run_generation_and_step_it_is(tmp_path):
    logs.start(tmp_path, "night", "driver")
    for handler in logging.getLogger("ray").handlers:  # as ray.init does
        handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("sae_ray.x").info("first %d", 1)
    logs.bind(generation=2, step=70)
    logging.getLogger("sae_ray.x").warning("second\nline", extra={"fields": {"round": 3}})
    first, second = rows(tmp_path)
    assert (first["run"], first["generation"], first["step"], first["level"]) == ("night", None, None, "INFO")
    assert (second["generation"], second["step"], second["level"], second["round"]) == (2, 70, "WARNING", 3)
    assert (first["message"], second["message"], second["role"]) == ("first 1", "second\nline", "driver")


def test_what_libraries_warn_of_lands_there_once(tmp_path):
    apart, root = logging.getLogger("transformers"), logging.getLogger()
    propagates, level = apart.propagate, root.level
    root.setLevel(logging.DEBUG)  # as a library may
    warnings.simplefilter("always")
    try:
        for apart.propagate in (True, False):
            logs.start(tmp_path, "night", "driver")
            logging.getLogger("transformers.models").warning("of a library")
            logging.getLogger("botocore").warning("of another")
            logging.getLogger("botocore").info("too much")
            warnings.warn("of Python", stacklevel=1)
    finally:
        apart.propagate = propagates
        root.setLevel(level)
    told = [row["message"] for row in rows(tmp_path)]
    assert [sum(word in each for each in told) for word in ("of a library", "of another", "of Python", "too much")] == [
        2, 2, 2, 0,
    ]  # fmt: skip


def test_an_exception_is_one_line(tmp_path):
    logs.start(tmp_path, "night", "driver")
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("sae_ray").exception("failed")
    (row,) = rows(tmp_path)
    assert row["exception"].startswith("Traceback")
    assert row["exception"].endswith("ValueError: why")


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+K7MDENG",
    "RAY_AUTH_TOKEN": "0123456789abcdef",
    "MY_JUDGE": 'hunter2"hunter2',
}


@pytest.mark.parametrize(
    "text",
    [
        *(f"refused: {value}." for value in SECRETS.values()),
        "Authorization: Bearer abc.def-ghi_jkl",
        "https://me:hunter2hunter2@host/v1",
        "s3://AKIA:ab/hunter2/cd@bucket/x is refused",
        "s3://AKIA:12/hunter2@bucket/x is refused",
        "key AKIAIOSFODNN7EXAMPLE is unknown",
        "token hf_" + "a" * 30,
        "https://b.s3/k?X-Amz-Signature=" + "ab" * 32,
    ],
)
def test_no_line_holds_a_secret(tmp_path, monkeypatch, capsys, text):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    logs.start(tmp_path, "night", "driver", ("MY_JUDGE", None))
    logger = logging.getLogger("some.library")
    logger.error(text)
    logger.error("with fields", extra={"fields": {"said": text}})
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("with a traceback")
    written = (tmp_path / logs.FOLDER / "driver.jsonl").read_text()
    assert len(written.splitlines()) == 3
    assert "***" in written
    secrets = [*SECRETS.values(), "hunter2", "abc.def-ghi", "AKIAIOSFODNN7", "a" * 30, "ab" * 32]
    assert not [each for each in secrets if each in written or json.dumps(each)[1:-1] in written]
    # Nor does what the command line says last.
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(UserError(text)))
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "***" in said
    assert not [each for each in secrets if each in said]


def test_ordinary_words_are_left_alone(monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "test")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    said = "a test of falsefalse: s3://bucket/run at step 3, https://host:8265/x@y"
    assert logs.redacted(said) == said


def test_an_actor_writes_to_stderr_and_beside_the_driver_where_the_folder_is(tmp_path, capsys):
    logs.start(tmp_path, "night", "rank")
    assert not list((tmp_path / logs.FOLDER).iterdir())  # nothing to say, no file
    logging.getLogger("sae_ray.trainer").warning("slow")
    assert json.loads(capsys.readouterr().err)["message"] == "slow"
    assert rows(tmp_path, "rank-")[0]["role"] == "rank"
    logs.start(tmp_path / "elsewhere", "night", "rank")
    logging.getLogger("sae_ray.trainer").warning("far away")
    assert json.loads(capsys.readouterr().err)["message"] == "far away"
    assert not (tmp_path / "elsewhere").exists()


def test_lines_of_progress_and_events_are_records_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    logs.start(tmp_path, "night", "driver")
    log = RunLog(tmp_path)
    progress = Progress("night", RunStatus(), log=log)
    progress.say("resuming at step 3")
    log.event("commit", step=3)
    log.event("failed", error="refused: hunter2hunter2")
    with pytest.raises(UserError), progress:
        raise UserError("no room")
    log.close()
    found = {row["message"]: row for row in rows(tmp_path)}
    assert found["commit"]["event"] == {"step": 3}
    assert "hunter2" not in (tmp_path / "events.jsonl").read_text()
    assert {"resuming at step 3", "the run ends: no room"} <= found.keys()


def test_after_the_run_nothing_is_written(tmp_path):
    before = list(logging.getLogger().handlers)
    logs.start(tmp_path, "night", "driver")
    logs.stop()
    logging.getLogger("sae_ray").error("later")
    assert logging.getLogger().handlers == before
    assert not (tmp_path / logs.FOLDER / "driver.jsonl").read_text()
    assert sys.modules["sae_ray.logs"].bound() == {}
