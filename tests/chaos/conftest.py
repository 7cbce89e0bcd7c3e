"""Disturbed runs are made by benchmarks/chaos_*.py; here are single ones with chosen faults."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory):
    """One store of activations and one undisturbed run of each mesh for the whole session."""
    from chaos_ray_levels import ChaosOnRay  # torch: not for the tests that need none of it

    return ChaosOnRay(tmp_path_factory.mktemp("chaos"))
