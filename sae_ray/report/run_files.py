"""What a run folder says, read without trusting that every file is there or whole.

Only `config.yaml` must exist. A file that is missing or torn becomes an empty value and a note, so that the
page of a run that is still going, or that crashed, shows what there is.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.errors import UserError


@dataclass(frozen=True)
class RunFiles:
    """The parsed files of a run folder; numbers that are not finite are None."""

    folder: Path
    config: RunConfig
    config_text: str
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    """File name -> why it has nothing to show."""


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        UserError: the folder has no `config.yaml`, or it is not a run config.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: holds no run (no config.yaml)")
    notes: dict[str, str] = {}
    metrics = [row for row in _rows(folder / "metrics.jsonl", notes) if isinstance(row.get("step"), int)]
    return RunFiles(
        folder=folder,
        config=load_config(path),
        config_text=path.read_text(encoding="utf-8"),
        metrics=_last_of_each_step(metrics),
        events=_rows(folder / "events.jsonl", notes),
        calibration=_mapping(folder / "calibration.json", notes),
        evaluation=_mapping(folder / "evaluation.json", notes),
        notes=notes,
    )


def _last_of_each_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step that was trained again after a crash counts as it was trained last."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def applied_rewards(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds whose rewards are part of the final weights, in order.

    A resume or a rebuilt trainer group goes back to a checkpoint; what was applied after it was undone.
    """
    applied: dict[Any, dict[str, Any]] = {}
    for event in events:
        if event.get("event") == "resume" and isinstance(event.get("step"), int):
            applied = {key: row for key, row in applied.items() if (row.get("at_step") or 0) <= event["step"]}
        elif event.get("event") == "rewards_applied":
            applied[event.get("round")] = event
    return sorted(applied.values(), key=lambda row: row.get("at_step") or 0)


def phase_seconds(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(phase, seconds) in the order in which the phases began, summed over a run's resumptions."""
    total: dict[str, float] = {}
    for event in events:
        if event.get("event") == "phase" and isinstance(event.get("seconds"), (int, float)):
            name = str(event.get("name"))
            total[name] = total.get(name, 0.0) + event["seconds"]
    return list(total.items())


def _rows(path: Path, notes: dict[str, str]) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        notes[path.name] = f"{path.name} has not been written."
        return []
    except (OSError, UnicodeDecodeError) as error:
        notes[path.name] = f"{path.name} cannot be read: {error}"
        return []
    rows = []
    for line in text.splitlines():
        # A crash tears its last line, and a resumed run writes on behind it: skip it, do not stop there.
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(_finite(row))
    if not rows:
        notes[path.name] = f"{path.name} has no complete row."
    return rows


def _mapping(path: Path, notes: dict[str, str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes[path.name] = f"{path.name} has not been written."
        return {}
    except (OSError, ValueError) as error:
        notes[path.name] = f"{path.name} cannot be read: {error}"
        return {}
    if not isinstance(value, dict):
        notes[path.name] = f"{path.name} holds a {type(value).__name__} where an object belongs."
        return {}
    return _finite(value)


def _finite(value: Any) -> Any:
    """NaN and infinities, which Python writes into JSON, as missing."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
