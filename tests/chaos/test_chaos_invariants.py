"""The invariants find what they are there for, in runs made by hand, and hold for one that is as it should be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from chaos_invariants import Folder, Reference, broken, recovered_after, wrong_order, wrong_verdicts

WINDOWS, BATCH = [500, 510, 505], 126  # four batches each
STEPS = 8


def event(kind: str, time: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, **fields}


def write_run(folder: Path) -> None:
    """Eight steps in two windows, a commit after each, and a round of rewards after step 6."""
    for step, cursor, tokens in ((4, [1, 0], 500), (8, [2, 0], 1010)):
        shard = f"weights of step {step}".encode()
        place = folder / "checkpoints" / f"step-{step}"
        place.mkdir(parents=True)
        (place / "rank-0.main.safetensors").write_bytes(shard)
        files = {"rank-0.main.safetensors": {"sha256": hashlib.sha256(shard).hexdigest(), "bytes": len(shard)}}
        manifest = {"step": step, "cursor": cursor, "extra": {"tokens": tokens}, "files": files}
        (place / "manifest.json").write_text(json.dumps(manifest))
    rows = [{"step": step, "loss": 1 / step, "step_seconds": 0.1 * step} for step in range(1, STEPS + 1)]
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(
        folder / "events.jsonl",
        [
            event("trained", first=1, last=4),
            event("commit", step=4),
            event("trained", first=5, last=6),
            event("rewards_applied", round=0, at_step=6),
            event("trained", first=7, last=8),
            event("commit", step=8),
        ],
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path)
    return tmp_path


@pytest.fixture
def reference(run: Path) -> Reference:
    return Reference.of(run, Folder(run / "checkpoints"), WINDOWS, BATCH)


def found(run: Path, reference: Reference) -> list[str]:
    return broken(run, Folder(run / "checkpoints"), reference)


def test_a_run_that_is_as_the_undisturbed_one_breaks_nothing(run, reference):
    assert found(run, reference) == []
    rows = rows_of(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [row | {"step_seconds": 9.0} for row in rows])
    assert found(run, reference) == [], "how long a step took is no result"


def test_a_loss_that_differs_in_the_last_bit_is_found(run, reference):
    rows = rows_of(run / "metrics.jsonl")
    rows[2]["loss"] += 2**-53
    write_rows(run / "metrics.jsonl", rows)
    assert found(run, reference) == ["metrics: step 3 differs in loss"]


@pytest.mark.parametrize("change", ["lost", "twice"])
def test_a_step_that_is_lost_or_there_twice_is_found(run, reference, change):
    rows = rows_of(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", rows[:3] + rows[4:] if change == "lost" else [*rows[:4], *rows[3:]])
    assert "each once" in found(run, reference)[0]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cursor", [2, 1], "each block once leads to [2, 0]"),
        ("extra", {"tokens": 1510}, "counts 1510 tokens, each block once has 1010"),
        ("files", {"rank-0.main.safetensors": {"sha256": "0" * 64}}, "is not what its manifest says"),
    ],
)
def test_a_checkpoint_at_another_place_of_the_stream_or_torn_is_found(run, reference, key, value, said):
    path = run / "checkpoints" / "step-8" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert any(said in line for line in found(run, reference)), found(run, reference)


def test_other_weights_and_what_is_left_half_written_are_found(run, reference):
    place = run / "checkpoints" / "step-8"
    (place / "rank-0.main.safetensors").write_bytes(b"others")
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"]["rank-0.main.safetensors"]["sha256"] = hashlib.sha256(b"others").hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))
    (place / ".rank-0.main.safetensors.x7").write_bytes(b"half")
    assert found(run, reference) == [
        "weights: step-8/rank-0.main.safetensors differs from the undisturbed run's",
        "checkpoints: left behind step-8/.rank-0.main.safetensors.x7",
    ]


def test_rewards_applied_elsewhere_are_found(run, reference):
    events = rows_of(run / "events.jsonl")
    write_rows(run / "events.jsonl", [e | ({"at_step": 7} if "at_step" in e else {}) for e in events])
    assert found(run, reference) == ["rewards: applied at other steps"]


DEATH = [event("trained", first=1, last=4), event("commit", step=4), event("trained", first=5, last=8)]


def test_going_back_to_the_last_commit_is_in_order_and_further_back_is_not():
    again = [event("resume", step=4), event("trained", first=5, last=8), event("commit", step=8)]
    assert list(wrong_order([*DEATH, *again], 8)) == []
    further = [event("resume", step=0), event("trained", first=1, last=8), event("commit", step=8)]
    assert next(iter(wrong_order([*DEATH, *further], 8))).startswith("order: resumed at step 0")


def test_steps_trained_twice_or_left_out_after_a_resume_are_found():
    assert "5 was trained where 9" in next(iter(wrong_order([*DEATH, event("trained", first=5, last=8)], 8)))
    skipped = [event("resume", step=4), event("trained", first=6, last=8)]
    assert "6 was trained where 5" in next(iter(wrong_order([*DEATH, *skipped], 8)))


def test_before_the_first_commit_a_run_begins_anew():
    assert list(wrong_order([event("trained", first=1, last=4), event("trained", first=1, last=4)], 4)) == []


def test_a_controller_that_died_after_its_manifest_has_committed():
    events = [*DEATH, event("resume", step=8), event("trained", first=9, last=12), event("commit", step=12)]
    assert list(wrong_order(events, 12)) == []


def test_lost_and_doubled_verdicts_are_found():
    asked = [("a", 1), ("b", 2), ("c", 3)]
    assert list(wrong_verdicts(asked, asked)) == []
    assert list(wrong_verdicts(asked[:2], asked)) == ["bank: 1 verdicts are lost"]
    assert list(wrong_verdicts([*asked, asked[0]], asked)) == ["bank: 1 verdicts are there twice, or were never given"]


def test_recovery_ends_with_a_step_that_had_not_been_trained():
    events = [
        event("trained", 1.0, first=1, last=4),
        event("trained", 3.0, first=1, last=4),
        event("trained", 5.5, first=5, last=8),
    ]
    assert recovered_after(events, 2.0) == 3.5
    assert recovered_after(events, 6.0) is None


def test_the_place_in_the_stream_follows_from_the_blocks_alone(reference):
    assert reference.used(0) == ([0, 0], 0)
    assert reference.used(2) == ([0, 2], 250)
    assert reference.used(6) == ([1, 2], 500 + 128 + 128)  # 510 in four batches: 128, 128, 127, 127
    assert reference.used(12) == ([3, 0], 1515)
