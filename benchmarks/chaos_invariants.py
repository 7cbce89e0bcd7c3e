"""What must be true of a run however often it was disturbed. Knows files only: nothing here imports sae_ray.

`Reference` is what the undisturbed run left and what the activation store's index says: from the tokens of each block
it follows, by arithmetic alone, which blocks a checkpoint at any step has used, each once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# How long it took is no result.
TIMINGS = ("step_seconds", "rank_tokens_per_s")
ROUNDED_S = 0.001  # what an event's time may be too late by


class Shelf(Protocol):
    """Where checkpoints lie."""

    def names(self) -> list[str]:
        """Paths of all files, relative, hidden and half-written ones too."""

    def read(self, name: str) -> bytes: ...


class Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self._root)) for path in self._root.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


class Bucket:
    """A prefix of a bucket, by a boto3 client of its own."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix.rstrip("/") + "/"

    def names(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        return sorted(each["Key"].removeprefix(self._prefix) for page in pages for each in page.get("Contents", ()))

    def read(self, name: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        return body


@dataclass(frozen=True)
class Reference:
    """metrics: every step's numbers without timings. files: sha256 of the last checkpoint's shards. windows: tokens of
    each mix window. rounds: step after which each round of rewards was applied."""

    steps: int
    metrics: dict[int, dict[str, float]]
    files: dict[str, str]
    windows: list[int]
    batch_tokens: int
    rounds: dict[int, int]

    @classmethod
    def of(cls, run: Path, shelf: Shelf, windows: list[int], batch_tokens: int) -> Reference:
        rows = rows_of(run / "metrics.jsonl")
        step = max(row["step"] for row in rows)
        manifest = json.loads(shelf.read(f"step-{step}/manifest.json"))
        files = {shard_of(name): entry["sha256"] for name, entry in manifest["files"].items()}
        return cls(step, numbers(rows), files, windows, batch_tokens, rounds_of(run))

    def used(self, step: int) -> tuple[list[int], int]:
        """(cursor, tokens) of a checkpoint at `step` that has trained every block of the stream once, in order."""
        tokens = 0
        for window, size in enumerate(self.windows):
            batches = max(1, round(size / self.batch_tokens))
            if step < batches:
                even, larger = divmod(size, batches)
                return [window, step], tokens + step * even + min(step, larger)
            step, tokens = step - batches, tokens + size
        return [len(self.windows), 0], tokens


def shard_of(name: str) -> str:
    """Rank and copy in a file's name, without which save wrote it."""
    return ".".join(name.split(".")[:2])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    return {
        row["step"]: {key: value for key, value in row.items() if key.split("/")[-1] not in TIMINGS} for row in rows
    }


def rounds_of(run: Path) -> dict[int, int]:
    """Round -> the step after which it was applied, the last time that it was."""
    return {e["round"]: e["at_step"] for e in rows_of(run / "events.jsonl") if e["event"] == "rewards_applied"}


def broken(run: Path, shelf: Shelf, reference: Reference) -> list[str]:
    """The invariants that a finished run does not hold, each in a line; empty is what is wanted."""
    return [
        *wrong_numbers(rows_of(run / "metrics.jsonl"), reference),
        *wrong_order(rows_of(run / "events.jsonl"), reference.steps),
        *wrong_checkpoints(shelf, reference),
        *(["rewards: applied at other steps"] if rounds_of(run) != reference.rounds else []),
    ]


def wrong_numbers(rows: list[dict[str, Any]], reference: Reference) -> Iterable[str]:
    """Every step once, in order, with the undisturbed run's numbers to the last bit."""
    if [row["step"] for row in rows] != list(range(1, reference.steps + 1)):
        yield f"metrics: {len(rows)} rows are not steps 1 to {reference.steps}, each once"
    for step, found in numbers(rows).items():
        if found != (expected := reference.metrics.get(step)):
            differing = [key for key in found if expected is None or found[key] != expected.get(key)]
            yield f"metrics: step {step} differs in {', '.join(differing) or 'what is there'}"
            return


def wrong_order(events: list[dict[str, Any]], steps: int) -> Iterable[str]:
    """Between two commits each step is trained once, and what was committed is never trained again.

    Training goes on while a snapshot is written, so a commit may be of a step some way back.
    """
    expected, committed = 1, 0
    for event in events:
        kind = event["event"]
        if kind == "commit":
            if not committed < event["step"] < expected:
                yield f"order: step {event['step']} was committed after {committed}, with {expected - 1} trained"
            committed = event["step"]
        elif kind == "resume":
            # A controller that dies right after a manifest has committed without a word.
            if event["step"] < committed or event["step"] >= expected:
                yield f"order: resumed at step {event['step']}, with {committed} committed and {expected - 1} trained"
            expected, committed = event["step"] + 1, event["step"]
        elif kind == "trained":
            if event["first"] == 1 and not committed:
                expected = 1  # there was no commit to resume from
            if event["first"] != expected:
                yield f"order: step {event['first']} was trained where {expected} was to come"
            expected = event["last"] + 1
    if expected - 1 != steps:
        yield f"order: the last step trained is {expected - 1} of {steps}"


def wrong_checkpoints(shelf: Shelf, reference: Reference) -> Iterable[str]:
    """Whole, at the place of the stream that its steps lead to, nothing half-written left, the last one bitwise."""
    names = shelf.names()
    found = {int(match[1]) for name in names if (match := re.match(r"step-(\d+)/manifest\.json$", name))}
    if reference.steps not in found:
        yield f"checkpoints: none of step {reference.steps}"
    listed = {"writer.json"}  # of the last attempt
    for step in sorted(found):
        manifest = json.loads(shelf.read(f"step-{step}/manifest.json"))
        listed |= {f"step-{step}/{name}" for name in ("manifest.json", *manifest["files"])}
        for name, entry in manifest["files"].items():
            path = f"step-{step}/{name}"
            if path not in names or hashlib.sha256(shelf.read(path)).hexdigest() != entry["sha256"]:
                yield f"checkpoints: {path} is missing or is not what its manifest says"
            elif step == reference.steps and entry["sha256"] != reference.files.get(shard_of(name)):
                yield f"weights: {path} differs from the undisturbed run's"
        cursor, tokens = reference.used(step)
        if manifest["cursor"] != cursor:
            yield f"blocks: step {step} stands at {manifest['cursor']}, each block once leads to {cursor}"
        if manifest["extra"]["tokens"] != tokens:
            yield f"blocks: step {step} counts {manifest['extra']['tokens']} tokens, each block once has {tokens}"
    if left := sorted(set(names) - listed):
        yield f"checkpoints: left behind {', '.join(left[:3])}"


def wrong_verdicts(found: Iterable[tuple[Any, ...]], asked: Iterable[tuple[Any, ...]]) -> Iterable[str]:
    """Every verdict that was asked for is in the bank once, with its score."""
    have, want = Counter(found), Counter(asked)
    if lost := want - have:
        yield f"bank: {sum(lost.values())} verdicts are lost"
    if more := have - want:
        yield f"bank: {sum(more.values())} verdicts are there twice, or were never given"


def recovered_after(events: list[dict[str, Any]], struck: float) -> float | None:
    """Seconds from a fault until a step was trained that had not been before; None: that never happened."""
    reached = 0
    for event in events:
        if event["event"] != "trained":
            continue
        if event["time"] > struck + ROUNDED_S and event["last"] > reached:
            return float(event["time"] - struck)
        reached = max(reached, event["last"])
    return None
