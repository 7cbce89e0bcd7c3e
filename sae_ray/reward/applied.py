"""Rounds as they were applied: each one's `RewardBatch`, the step it was installed at, and what later rounds remember.

`rewards/round-<n>.safetensors` of a run's folder, written atomically when a round has been applied. A round that is
judged again after a crash replaces its file. From these a run resumes with the same baselines and alarms, and another
run is trained with the same rewards (`rlaif.replay_rewards`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sae_ray.errors import UserError
from sae_ray.reward.credit import RewardBatch, Rollouts
from sae_ray.storage import Storage

FOLDER = "rewards"
_ROLLOUTS = "rollouts."  # what a batch's rollouts are kept under, beside its own columns


@dataclass(frozen=True)
class AppliedRound:
    """at_step: after which training step it was installed. summary: for the log. memory: what the next round needs of
    this one: baselines of the rewards' parts, references of the alarms."""

    batch: RewardBatch
    at_step: int
    summary: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)


class AppliedRounds:
    """Those of one run's folder."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def numbers(self) -> list[int]:
        found = (re.fullmatch(rf"{FOLDER}/round-(\d+)\.safetensors", key) for key in self._storage.list(FOLDER))
        return sorted(int(match[1]) for match in found if match)

    def write(self, applied: AppliedRound) -> None:
        """Raises:
        UserError: it cannot be written.
        """
        batch = applied.batch
        if batch.whole is not None:
            raise ValueError("only whole batches are kept")
        values = {each.name: getattr(batch, each.name) for each in fields(RewardBatch)}
        if batch.rollouts is not None:
            values |= {_ROLLOUTS + each.name: getattr(batch.rollouts, each.name) for each in fields(Rollouts)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        about = {
            "batch": {name: value for name, value in values.items() if isinstance(value, int | float)},
            "at_step": applied.at_step,
            "summary": applied.summary,
            "memory": applied.memory,
        }
        self._storage.write(_key(batch.round), save(arrays, metadata={"round": json.dumps(about)}))

    def read(self, number: int) -> AppliedRound:
        """Raises:
        UserError: it is not there, or is not what was written.
        """
        data = self._storage.read(_key(number))
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["round"])
            columns: dict[str, Any] = {**load(data), **about["batch"]}
            own = {name: columns.pop(name) for name in list(columns) if name.startswith(_ROLLOUTS)}
            if own:
                known = {name.removeprefix(_ROLLOUTS): value for name, value in own.items()}
                columns["rollouts"] = Rollouts(**{"perturbation": None, **known})
            return AppliedRound(RewardBatch(**columns), about["at_step"], about["summary"], about["memory"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._storage.url(_key(number))}: is not a round's rewards: {error}") from error

    def memory_before(self, number: int) -> dict[str, Any]:
        """What round `number` needs of the one before; empty where that was never applied."""
        return self.read(number - 1).memory if number - 1 in self.numbers() else {}


def _key(number: int) -> str:
    return f"{FOLDER}/round-{number:04d}.safetensors"
