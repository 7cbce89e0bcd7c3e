"""The synthetic benchmarks: agreement with SAELens where its environment exists, and the bake-off's grids and table."""

from __future__ import annotations

import json
import math
import subprocess

import pytest
from benchmark_scripts import BENCHMARKS, load

from sae_ray.errors import UserError

peer_envs = load("peer_envs")
check = load("synthetic_check")
credit = load("credit")


def test_worlds_and_metrics_agree_with_saelens(tmp_path):
    folder = peer_envs.default_dir()
    try:
        python = peer_envs.python_of("saelens", folder)
    except UserError as error:
        pytest.skip(str(error))
    out = tmp_path / "check.json"
    command = [python, BENCHMARKS / "synthetic_check.py", "--samples", "10000", "--out", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["disagreements"] == []


def test_a_difference_beyond_rounding_or_chance_is_named():
    metrics = {"f1": {"ours": 0.5, "theirs": 0.5001}, "ev": {"ours": 0.5, "theirs": 0.500001}}
    worlds = {"rate": {"ours": 0.1, "theirs": 0.2, "error": 0.01}, "l0": {"ours": 1.0, "theirs": 1.04, "error": 0.01}}
    assert check.disagreements(metrics, worlds) == ["f1", "rate"]
    assert check.disagreements({"f1": {"ours": math.nan, "theirs": 0.5}}, {}) == ["f1"]


def test_a_grid_repeats_no_cell_and_finishes_a_seed_before_the_next():
    cells = credit.grid("full", "research", [0, 1], {})
    assert len({cell.key for cell in cells}) == len(cells)
    seeds = [cell.base.seed for cell in cells]
    assert seeds == sorted(seeds)
    assert {cell.verdicts for cell in cells} >= {32, 128, 256, 1024}
    assert {cell.noise for cell in cells} >= {0.0, 0.1, 0.2}
    assert all(cell.base.seed == 0 for cell in credit.grid("smoke", "research", [0, 1], {}))


def record(method: str, seed: int, f1: float) -> dict:
    cell = credit.Cell(credit.Base(seed=seed), method)
    row = {**dict.fromkeys(credit.COLUMNS, 0.5), "l0": 4.0, "f1": f1, "absorption": math.nan}
    return {"key": cell.key, "cell": credit.asdict(cell), "matched": {"4": row, "8": row}, "deployed": row}


def test_the_table_has_means_intervals_and_differences_paired_by_seed():
    records = [record("continued", s, 0.6 + 0.1 * s) for s in (0, 1)]
    records += [record("teacher_gate", s, 0.65 + 0.1 * s) for s in (0, 1)]
    lines = credit.table(records).splitlines()
    counts = {line.count("|") for line in lines if line.startswith("|")}
    assert counts == {len(credit.COLUMNS) + 5}
    row = next(line for line in lines if "teacher_gate" in line)
    # two seeds: half width 12.71 * sd / sqrt(2) = 12.71 * .0707 / 1.414; the paired difference has none
    assert "0.700 ± 0.635" in row
    assert row.endswith("| +0.050 ± 0.000 |")


def test_missing_values_are_left_out_of_means_and_never_zero():
    assert credit.interval([0.2, math.nan]) == "0.200"
    assert credit.interval([math.nan]) == ""


def test_finished_cells_are_read_and_a_torn_line_is_not(tmp_path, capsys):
    (tmp_path / "cells.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c", "ce')
    assert [line["key"] for line in credit.finished(tmp_path)] == ["a", "b"]
    assert "not whole" in capsys.readouterr().err
    assert credit.finished(tmp_path / "none") == []


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch, capsys):
    cell = credit.Cell(credit.Base(), "continued")
    (tmp_path / "cells.jsonl").write_text(json.dumps({"key": cell.key}) + "\n")
    monkeypatch.setattr(credit, "_work", None)  # cannot be sent to a worker
    credit.run([cell], tmp_path, minutes=1, workers=1)
    assert "left" not in capsys.readouterr().out
