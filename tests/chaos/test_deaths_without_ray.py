"""Rank processes, storage and bank under kill -9 and storage faults: cheap, because nothing here starts Ray."""

from __future__ import annotations

import subprocess

import pytest
from chaos_faults import RANK_PHASES, Fault

pytestmark = pytest.mark.timeout(1500)


def test_a_rank_may_die_in_every_phase_of_a_step_and_of_a_save(chaos) -> None:
    places = [3, 10, 17, 24, 31, 38, 52, 5]  # rewards come at step 52
    plan = [
        Fault(f"p{number}", "rank killed", phase, at)
        for number, (phase, at) in enumerate(zip(RANK_PHASES, places, strict=True))
    ]
    faults, broken = chaos.ranks("every-rank-phase", plan)
    assert broken == []
    assert {fault["phase"] for fault in faults} == set(RANK_PHASES)
    assert all(fault["recovery_s"] is not None for fault in faults)


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(chaos) -> None:
    plan = [
        Fault("full", "disk full", "before an upload", 10, amount=0),
        Fault("half", "disk full", "before an upload", 40, amount=2 << 20),
    ]
    try:
        faults, broken = chaos.disk("disk-full", plan)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    assert broken == []
    assert {fault["id"] for fault in faults} == {"full", "half"}


def test_a_bank_whose_writer_is_killed_holds_every_verdict_once(chaos) -> None:
    faults, broken = chaos.banks("bank-kills", seed=2, kills=5)
    assert broken == []
    assert len(faults) == 5
