"""What makes the faults: fuses strike once, plans follow from their seed, the proxy does to S3 what it says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos_faults import RANK_PHASES, Fault, Fuses, draw
from chaos_proxy import KINDS, FaultyProxy, StorageFault, draw_storage
from chaos_report import page, table
from s3_server import BUCKET, S3Server

from sae_ray.errors import UserError
from sae_ray.storage import open_storage

EVERY = {"producer killed": 1.0, "lease runs out": 1.0, "rank killed": 1.0, "controller killed": 1.0}


def test_a_fuse_strikes_once_at_its_place_or_after_it(tmp_path: Path) -> None:
    before = time.time()
    fuses = Fuses.lay(tmp_path, [Fault("a", "rank killed", "after a window", 8, rank=1)])
    assert fuses.take("rank killed", "after a window", 7, 1) is None, "too soon"
    assert fuses.take("rank killed", "after a window", 9, 0) is None, "another rank"
    assert fuses.take("rank killed", "before a window", 9, 1) is None, "another phase"
    assert fuses.struck() == {}
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: Fuses(tmp_path).take("rank killed", "after a window", 9, 1), range(32)))
    assert sum(fault is not None for fault in taken) == 1
    assert before <= Fuses(tmp_path).struck()["a"] <= time.time()


def test_plans_follow_from_their_seed_and_have_every_phase() -> None:
    assert draw(3, 50, 72, 36, 2, EVERY) == draw(3, 50, 72, 36, 2, EVERY)
    assert draw(3, 50, 72, 36, 2, EVERY) != draw(4, 50, 72, 36, 2, EVERY)
    plan = draw(3, 400, 72, 36, 2, EVERY)
    assert {fault.phase for fault in plan if fault.kind == "rank killed"} == set(RANK_PHASES)
    assert {fault.kind for fault in plan} == set(EVERY)
    assert {fault.rank for fault in plan} == {0, 1}
    assert max(fault.at for fault in plan if fault.kind == "producer killed") < 36
    assert draw_storage(3, 50, 26) == draw_storage(3, 50, 26)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The environment leads to the proxy."""
    running = FaultyProxy(server.settings["AWS_ENDPOINT_URL"])
    for key, value in {**server.settings, "AWS_ENDPOINT_URL": running.url}.items():
        monkeypatch.setenv(key, value)
    yield running
    running.close()


def test_without_faults_the_proxy_changes_nothing(proxy: FaultyProxy) -> None:
    storage = open_storage(f"s3://{BUCKET}/plain")
    digest = storage.write("a/file", bytes(range(256)) * 400)
    assert storage.read("a/file", digest) == bytes(range(256)) * 400
    assert storage.exists("a/file")
    assert not storage.exists("a/other")
    assert storage.list() == ["a/file"]
    storage.delete("a")
    assert storage.list() == []


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"download torn"}))
def test_what_a_client_may_try_again_is_survived(proxy: FaultyProxy, server: S3Server, kind: str) -> None:
    fault = StorageFault("f", kind, KINDS[kind], at=0, seconds=0.3)
    storage, data = open_storage(f"s3://{BUCKET}/once-{kind.replace(' ', '-')}"), bytes(range(256)) * 4000
    storage.write("before", data)
    proxy.set([fault])
    digest = storage.write("file", data)
    assert storage.read("file", digest) == data
    assert len(fault.struck) == 1
    assert len(server.keys(f"once-{kind.replace(' ', '-')}/")) == 2


def test_half_a_file_is_never_taken_for_the_whole(proxy: FaultyProxy) -> None:
    storage, data = open_storage(f"s3://{BUCKET}/torn"), bytes(range(256)) * 4000
    digest, fault = storage.write("file", data), StorageFault("f", "download torn", "GET", at=0)
    proxy.set([fault])
    with contextlib.suppress(UserError):  # told, if not read again
        assert storage.read("file") == data
    assert len(fault.struck) == 1
    assert storage.read("file", digest) == data


@pytest.mark.parametrize("kind", ["refused", "upload torn"])
def test_what_lasts_longer_is_told_and_leaves_nothing_half_written(
    proxy: FaultyProxy, server: S3Server, kind: str
) -> None:
    prefix = f"long-{kind.replace(' ', '-')}"
    storage = open_storage(f"s3://{BUCKET}/{prefix}")
    digest = storage.write("file", b"old")
    proxy.set([StorageFault("f", kind, "PUT", at=0, times=100)])
    with pytest.raises(UserError, match=f"s3://{BUCKET}/{prefix}/file: cannot be written"):
        storage.write("file", b"new" * 100_000)
    proxy.set([])
    assert storage.read("file", digest) == b"old"
    assert storage.list() == ["file"]


def test_the_table_counts_what_struck_and_what_held() -> None:
    def fault(kind: str, seconds: float | None) -> dict:
        return {"id": "x", "kind": kind, "phase": "here", "recovery_s": seconds}

    rows = [
        {"level": "rank", "seed": 0, "name": "rank-0", "broken": [], "faults": [fault("killed", 1.0)] * 3},
        {"level": "rank", "seed": 1, "name": "rank-1", "broken": ["lost a step"], "faults": [fault("killed", 4.0)]},
        {"level": "bank", "seed": 1, "name": "bank-1", "broken": [], "faults": [fault("gone", None)], "failed": "hung"},
    ]
    assert table(rows)[2:] == [
        "| rank | killed | 4 | 4 | 3 | 1.0 | 4.0 |",
        "| bank | gone | 1 | 0 | 1 | - | - |",
        "| all | | 5 | 4 | 4 | | |",
    ]
    told = page(rows, "chaos.py", "2 cores")
    assert "- rank-1: lost a step" in told
    assert "- bank-1: hung" in told
