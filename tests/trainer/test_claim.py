"""Two attempts at one place: the later one writes, the earlier one stops at its next save and touches nothing."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from s3_server import BUCKET, S3Server

from sae_ray.config import RunConfig
from sae_ray.controller import Controller
from sae_ray.errors import UserError
from sae_ray.storage import open_storage
from sae_ray.trainer import checkpoint, saving
from sae_ray.trainer.claim import WRITER, Claim
from sae_ray.trainer.group import TrainerGroup
from sae_ray.trainer.mixing import Cursor

CURSOR = Cursor(1, 0)
TAKEN = rf"the run 'later' \(process {os.getpid()} on {socket.gethostname()}\) began after this one"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture(params=["folder", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(tmp_path / "checkpoints")
    for name, value in request.getfixturevalue("server").settings.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{abs(hash(request.node.name))}"


class Group(TrainerGroup):
    """One rank, without Ray. `lies_elsewhere`: it writes on a disk of its own."""

    def __init__(self, run: str, lies_elsewhere: Path | None = None):
        super().__init__(
            RunConfig.model_validate({"name": run, "hook": {"layer": 2}}), {"blocks.2.hook_resid_post": 2}, 0
        )
        self.elsewhere = lies_elsewhere

    def _all(self, what: str, method: str, *args: Any, **_: Any) -> list[Any]:
        assert method == "save"
        folder, save = args
        files = checkpoint.write_shard(self.elsewhere or folder, 0, "main", {"W_enc": torch.ones(2, 2)}, save)
        about = {"copies": {"main": {"d_sae": 2}}, "latents": {"main": (0, 2)}, "tp_rank": 0}
        return [{**about, "files": files, "snapshot_seconds": 0.0, "write_seconds": 0.0}]


def claimed(home: str, run: str) -> Claim:
    claim = Claim(home, run)
    claim.hold()
    return claim


def begun(group: Group, claim: Claim, step: int) -> saving.Saving:
    """A save whose rank has written everything."""
    found = group.begin_save(claim, step, CURSOR)
    found._written = {0: found.reports[0]}
    return found


def content(home: str) -> dict[str, bytes]:
    storage = open_storage(home)
    return {key: storage.read(key) for key in storage.list()}


def test_the_earlier_of_two_runs_stops_at_its_next_save_and_the_laters_commit_stays(home):
    earlier = claimed(home, "earlier")
    assert begun(Group("earlier"), earlier, 4).pump(idle=True) is not None
    later = claimed(home, "later")
    assert begun(Group("later"), later, 8).pump(idle=True) is not None
    begun(Group("later"), later, 12)
    before = content(home)
    for step in (8, 12):
        with pytest.raises(UserError, match=TAKEN) as stopped:
            Group("earlier").begin_save(earlier, step, CURSOR)
        assert str(stopped.value).startswith(f"{home}: ")
        assert "touched nothing of the other's" in str(stopped.value)
    assert content(home) == before
    later.check()


def test_a_save_that_was_under_way_at_the_takeover_is_not_committed(home):
    earlier = claimed(home, "earlier")
    late = begun(Group("earlier"), earlier, 8)
    later = claimed(home, "later")
    with pytest.raises(UserError, match=TAKEN):
        late.pump(idle=True)
    assert checkpoint.steps(home) == {8: False}
    # Also where the later run's save has removed its files, which is nobody's fault but the takeover's.
    assert begun(Group("later"), later, 8).pump(idle=True) is not None
    before = content(home)
    with pytest.raises(UserError, match=TAKEN):
        late.pump(idle=True)
    assert content(home) == before


def test_a_shard_that_arrives_late_replaces_none_that_is_committed(home):
    first = Group("run").begin_save(claimed(home, "run"), 8, CURSOR)
    second = begun(Group("run"), claimed(home, "run"), 8)
    assert second.pump(idle=True) is not None
    (name,) = first.reports[0]["files"]
    open_storage(first.path).write(name, b"what a rank of the first was still writing")
    checkpoint.check_whole(first.path, largest=1 << 20)
    assert checkpoint.load_full(first.path)[0]["W_enc"].shape == (2, 2)


def test_a_run_that_was_taken_over_leaves_the_others_unfinished_save_alone(home):
    earlier = claimed(home, "earlier")
    failed = begun(Group("earlier"), earlier, 4)
    begun(Group("later"), claimed(home, "later"), 8)
    before, part = content(home), SimpleNamespace(stop=lambda: None, shutdown=lambda: None)
    run = SimpleNamespace(desk=part, judge=part, stream=part, _stop_group=lambda: None, saving=failed, claim=earlier)
    Controller.close(run)  # type: ignore[arg-type]
    assert content(home) == before
    run.claim = claimed(home, "earlier")
    Controller.close(run)  # type: ignore[arg-type]
    assert open_storage(home).list() == [WRITER]


def test_a_commit_of_a_run_that_was_taken_over_in_between_prunes_nothing(home, monkeypatch):
    earlier = claimed(home, "earlier")
    done, group = begun(Group("earlier"), earlier, 4), Group("earlier")
    commit = checkpoint.commit

    def committed(*args: Any) -> None:
        commit(*args)
        begun(Group("later"), claimed(home, "later"), 8)

    monkeypatch.setattr(checkpoint, "commit", committed)
    monkeypatch.setattr(group, "begin_save", lambda *_: done)
    with pytest.raises(UserError, match=TAKEN):
        group.save_checkpoint(earlier, 4, CURSOR)
    assert checkpoint.steps(home) == {4: True, 8: False}
    said = SimpleNamespace(event=lambda *_, **__: None, committed=lambda: None)
    run = SimpleNamespace(
        saving=done, pipeline=[], log=said, measures=said, claim=earlier, config=group.config, saved_rounds=0
    )
    done.pump = lambda idle: {}  # type: ignore[method-assign]
    with pytest.raises(UserError, match=TAKEN):
        Controller._pump_save(run)  # type: ignore[arg-type]
    assert checkpoint.steps(home) == {4: True, 8: False}


def test_a_new_generation_keeps_its_runs_claim_and_cannot_take_it_back(home):
    claim = claimed(home, "earlier")
    before = content(home)
    claim.hold()
    assert content(home) == before
    assert {**json.loads(before[WRITER]), "token": "", "began": 0} == {
        "token": "", "run": "earlier", "host": socket.gethostname(), "pid": os.getpid(), "began": 0
    }  # fmt: skip
    later = claimed(home, "later")
    with pytest.raises(UserError, match=TAKEN):
        claim.hold()
    later.hold()


@pytest.mark.parametrize("left", [None, b"", b"[]", b'{"token": 1}'])
def test_a_place_that_somebody_has_emptied_is_not_written_any_more(tmp_path, left):
    claim = claimed(str(tmp_path), "run")
    checkpoint.remove_all(tmp_path)
    assert list(tmp_path.iterdir()) == []
    if left is not None:
        (tmp_path / WRITER).write_bytes(left)
    with pytest.raises(UserError, match="this run stops"):
        Group("run").begin_save(claim, 4, CURSOR)


def test_a_folder_that_the_ranks_do_not_share_is_not_committed(tmp_path, monkeypatch):
    home = str(tmp_path / "checkpoints")
    claim = claimed(home, "run")
    alone = begun(Group("run", lies_elsewhere=tmp_path / "disk-of-another-node"), claim, 4)
    assert alone.pump(idle=True) is None, "NFS may not show it yet"
    monkeypatch.setattr(saving, "UNSEEN_S", 0.0)
    (name,) = alone.reports[0]["files"]
    with pytest.raises(UserError, match=rf"step-4/{name}: .* not a folder that all nodes share"):
        alone.pump(idle=True)
    assert checkpoint.steps(home) == {}
    # Torn: there, but not all of it.
    torn = begun(Group("run"), claim, 8)
    (name,) = torn.reports[0]["files"]
    os.truncate(Path(torn.path) / name, 10)
    with pytest.raises(UserError, match=name):
        torn.pump(idle=True)
    assert checkpoint.steps(home) == {8: False}


def test_what_is_seen_later_is_committed_then(tmp_path):
    claim, elsewhere = claimed(str(tmp_path / "home"), "run"), tmp_path / "server"
    late = begun(Group("run", lies_elsewhere=elsewhere), claim, 4)
    assert late.pump(idle=False) is None
    os.rename(elsewhere, tmp_path / "home" / "step-4")
    assert late.pump(idle=False) is not None
    assert checkpoint.steps(tmp_path / "home") == {4: True}
