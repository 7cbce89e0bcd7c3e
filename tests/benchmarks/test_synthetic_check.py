"""Agreement with SAELens where its environment exists."""

from __future__ import annotations

import json
import math
import subprocess

import pytest
from benchmark_scripts import BENCHMARKS, load

from sae_ray.errors import UserError

peer_envs = load("peer_envs")
check = load("synthetic_check")


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
