"""shellcheck, yamllint and hadolint over what they know, where they are installed; each must find a planted fault."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import CLUSTER, ROOT

# Beside the interpreter: a virtual environment need not be on PATH.
BIN = Path(sys.executable).parent
SCRIPTS = [
    *sorted(ROOT.glob("docker/*.sh")),
    *sorted(CLUSTER.rglob("*.sh")),
    *sorted(CLUSTER.rglob("*.sbatch")),
    ROOT / ".ci/run",
]
YAML = [path for folder in ("cluster", "docker", "jobs") for path in sorted((ROOT / folder).rglob("*.yaml"))]


def lint(tool: str, *arguments: str | Path) -> str:
    """What a linter says; nothing if it is content."""
    program = shutil.which(tool) or shutil.which(tool, path=str(BIN))
    if program is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT)
    said = done.stdout + done.stderr
    return said if done.returncode or said.strip() else ""


def test_shellcheck_is_content() -> None:
    assert lint("shellcheck", *SCRIPTS) == ""


def test_shellcheck_finds_an_unquoted_variable(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("#!/bin/sh\nrm -r $1\n")
    assert "SC2086" in lint("shellcheck", tmp_path / "a.sh")


def test_yamllint_is_content() -> None:
    assert lint("yamllint", "--strict", *YAML) == ""


def test_yamllint_finds_a_key_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\na: 2\n")
    assert "duplication" in lint("yamllint", "--strict", "-c", ROOT / ".yamllint.yaml", tmp_path / "a.yaml")


def test_hadolint_is_content() -> None:
    assert lint("hadolint", ROOT / "docker/Dockerfile") == ""


def test_hadolint_finds_a_base_without_a_version(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nUSER 1000:1000\n")
    assert "DL3006" in lint("hadolint", tmp_path / "Dockerfile")


def test_every_file_is_read_by_a_linter() -> None:
    assert {path.name for path in SCRIPTS} >= {
        "drain-node.sh",
        "sae-ray.sbatch",
        "compose-token.sh",
        "prometheusrule.sh",
    }
    assert {path.name for path in YAML} >= {
        "raycluster.yaml",
        "aws.yaml",
        "compose.yaml",
        "rules.yaml",
        "quickstart.yaml",
    }
