"""Readings on disk: what is found again, what is told apart, and what a crash leaves."""

from __future__ import annotations

import ast
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_ray.config import JudgeConfig
from sae_ray.errors import UserError
from sae_ray.judge import verdict_cache
from sae_ray.judge.verdict_cache import FILE, VerdictCache, judge_identity

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)


def test_a_reading_is_found_again_by_another_process_to_the_last_bit(tmp_path: Path) -> None:
    value = -12.345678901234567
    with VerdictCache(tmp_path) as cache:
        cache.put_many("judge", "likelihood", {("text", "files"): (value, 3)})
    code = (
        "import sys; from sae_ray.judge.verdict_cache import VerdictCache\n"
        "c = VerdictCache(sys.argv[1], writable=False)\n"
        "print(repr(c.get_many('judge', 'likelihood', [('text', 'files'), ('text', 'dates')])))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ast.literal_eval(said.stdout) == {("text", "files"): (value, 3)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.tuples(*[ANY_TEXT] * 4), st.tuples(st.floats(-1e6, 0), st.integers(1, 99)), max_size=8))
def test_judge_mode_text_and_explanation_never_run_into_each_other(
    tmp_path_factory: pytest.TempPathFactory, readings: dict[tuple[str, str, str, str], tuple[float, int]]
) -> None:
    with VerdictCache(tmp_path_factory.mktemp("cache")) as cache:
        for (judge, mode, text, explanation), reading in readings.items():
            cache.put_many(judge, mode, {(text, explanation): reading})
        assert len(cache) == len(readings)
        for (judge, mode, text, explanation), reading in readings.items():
            assert cache.get_many(judge, mode, [(text, explanation)]) == {(text, explanation): reading}


def test_many_keys_are_found_in_one_question(tmp_path: Path) -> None:
    readings = {(f"text {i}", "e"): (-float(i), 1) for i in range(1, 1700)}
    with VerdictCache(tmp_path) as cache:
        cache.put_many("j", "yes_no", readings)
        assert cache.get_many("j", "yes_no", [*readings, ("absent", "e")]) == readings


def test_a_new_prompt_version_finds_nothing_of_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VerdictCache(tmp_path) as cache:
        cache.put_many("j", "likelihood", {("t", "e"): (-1.0, 1)})
        monkeypatch.setattr(verdict_cache, "PROMPT_VERSION", "next")
        assert cache.get_many("j", "likelihood", [("t", "e")]) == {}


def test_the_first_reading_of_a_pair_stays(tmp_path: Path) -> None:
    with VerdictCache(tmp_path) as cache:
        cache.put_many("j", "likelihood", {("t", "e"): (-1.0, 1)})
        cache.put_many("j", "likelihood", {("t", "e"): (-2.0, 1)})
        assert cache.get_many("j", "likelihood", [("t", "e")]) == {("t", "e"): (-1.0, 1)}


def test_only_one_process_writes_and_others_may_read(tmp_path: Path) -> None:
    with VerdictCache(tmp_path) as cache:
        code = (
            "import sys; from sae_ray.judge.verdict_cache import VerdictCache\n"
            "VerdictCache(sys.argv[1], writable=False).close()\n"
            "VerdictCache(sys.argv[1])"
        )
        ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "another process writes to this verdict cache" in ran.stderr
        cache.put_many("j", "likelihood", {("t", "e"): (-1.0, 1)})
    VerdictCache(tmp_path).close()


def test_a_process_killed_while_writing_leaves_whole_calls_only(tmp_path: Path) -> None:
    code = (
        "import os, sys; from sae_ray.judge.verdict_cache import VerdictCache\n"
        "c = VerdictCache(sys.argv[1])\n"
        "c.put_many('j', 'likelihood', {(f'a{i}', 'e'): (-1.0, 1) for i in range(50)})\n"
        "c._db.execute('BEGIN')\n"
        "c._db.executemany('INSERT INTO readings VALUES (?, -1, 1)', [(os.urandom(16),) for _ in range(20000)])\n"
        "print('killed', flush=True); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.returncode) == ("killed", -9)
    with VerdictCache(tmp_path) as cache:
        assert len(cache) == 50


def test_a_file_of_another_kind_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("this is no database, and it is long enough to have a header of one hundred bytes" * 4)
    with pytest.raises(UserError, match=r"verdicts\.sqlite: is no verdict cache"):
        VerdictCache(tmp_path)
    assert (tmp_path / FILE).read_text().startswith("this is no database")
    with pytest.raises(UserError, match="there is no verdict cache"):
        VerdictCache(tmp_path / "elsewhere", writable=False)


def test_the_file_stays_readable_by_plain_sqlite(tmp_path: Path) -> None:
    with VerdictCache(tmp_path) as cache:
        cache.put_many("j", "likelihood", {("t", "e"): (-1.5, 2)})
    rows = sqlite3.connect(tmp_path / FILE).execute("SELECT value, tokens FROM readings").fetchall()
    assert rows == [(-1.5, 2)]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other/model"},
        {"dtype": "float32"},
        {"quantization": "fp8"},
        {"lora": {"a": "x/y"}, "adapter": "a"},
        {"endpoint": "http://h/v1"},
        {"endpoint": "http://h/v1", "endpoint_model": "m"},
        {"engine_kwargs": {"kv_cache_dtype": "fp8"}},
        {"gpus": 1},
        {"s3_mirror": "s3://b/m"},
    ],
)
def test_what_changes_a_judges_numbers_makes_it_another_judge(changes: dict[str, Any]) -> None:
    assert judge_identity(JudgeConfig(**changes)) != judge_identity(JudgeConfig())


@pytest.mark.parametrize("changes", [{"deadline_s": 1}, {"max_in_flight": 2}, {"cpus": 3}, {"threads": 1}])
def test_where_a_judge_runs_and_how_long_one_waits_does_not(changes: dict[str, Any]) -> None:
    assert judge_identity(JudgeConfig(**changes)) == judge_identity(JudgeConfig())


def test_new_weights_in_the_same_folder_are_another_judge(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = judge_identity(JudgeConfig(model=str(tmp_path)))
    assert judge_identity(JudgeConfig(model=str(tmp_path))) == before
    weights.write_bytes(b"22")
    assert judge_identity(JudgeConfig(model=str(tmp_path))) != before
