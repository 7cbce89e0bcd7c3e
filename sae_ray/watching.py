"""`sae-ray status RUN`: a run folder, or the prefix of its checkpoints on S3, looked at from anywhere until it ends."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sae_ray.config_file import load_config
from sae_ray.errors import UserError, printable
from sae_ray.logs import FOLDER
from sae_ray.measures import MEASURED
from sae_ray.status_file import MIRRORED_EVERY_S, read_status
from sae_ray.storage import is_s3
from sae_ray.telemetry import Progress, RunStatus, clock
from sae_ray.trainer import checkpoint

EVERY_S = 2.0
# A run that has written nothing for so long is gone, or its machine is.
SILENT_S = 3 * MIRRORED_EVERY_S
_LAST = 5
_TAIL_BYTES = 1 << 16


def is_run(location: str) -> bool:
    """Whether a person who says this means a folder of a run, or a prefix, rather than a submitted run's name."""
    return is_s3(location) or (Path(location) / "config.yaml").is_file()


def watch(location: str, console: Console, once: bool) -> None:
    """Shows it until the run ends or Ctrl-C; with `once`, or where no terminal is, one time.

    Raises:
        UserError: there is no run.
    """
    found, shown = look(location)
    if once or not console.is_terminal:
        console.print(shown)
        return
    with Live(shown, console=console, refresh_per_second=4) as live:
        while found is not None and found["state"] == "running":
            time.sleep(EVERY_S)
            found, shown = look(location)
            live.update(shown)


def look(location: str) -> tuple[dict[str, Any] | None, RenderableType]:
    """(what `status.json` says, what is shown).

    Raises:
        UserError: neither a status nor a checkpoint is there.
    """
    found = read_status(location)
    home: str | Path = location
    if not is_s3(location):
        home = checkpoint.home(load_config(Path(location) / "config.yaml"))
        if not is_s3(home):  # a run folder may have been moved since
            home = Path(location) / "checkpoints" if (Path(location) / "checkpoints").is_dir() else home
    try:
        steps = checkpoint.steps(home)
    except UserError as error:
        if is_s3(location):
            raise
        committed = Text(printable(str(error)), style="yellow")  # of a bucket that is not this machine's to read
    else:
        if found is None and is_s3(location) and not steps:
            raise UserError(f"{location}: holds neither a run's status nor a checkpoint")
        committed = _checkpoints(steps, home)
    parts: list[RenderableType] = [*_said(found), committed]
    if not is_s3(location):
        parts += _recent(Path(location))
    return found, Group(*parts)


def _said(found: dict[str, Any] | None) -> Iterator[RenderableType]:
    if found is None:
        yield Text("no status: the run has not begun, or was made by an earlier version", style="yellow")
        return
    known = {each.name for each in fields(RunStatus)}
    status = RunStatus(**{name: value for name, value in found["status"].items() if name in known})
    ends = time.time() if found["state"] == "running" else found["written"]
    yield Progress(printable(found["run"]), status).panel(ends - found["started"])
    if status.measures:
        table = Table("queue, wait, age or rate", "", "", box=None, title_justify="left", header_style="dim")
        for name, told in MEASURED.items():
            if name in status.measures:
                table.add_row(name, _number(status.measures[name]), Text(told, style="dim"))
        yield table
    silent = time.time() - found["written"]
    where = f"process {found['pid']} on {printable(found['host'])}"
    if found["state"] != "running":
        why = f": {printable(found['why'])}" if found["why"] else ""
        yield Text(
            f"{printable(str(found['state']))} {clock(silent)} ago{why}",
            style="bold red" if found["state"] == "failed" else "bold",
        )
    elif silent > SILENT_S:
        yield Text(f"silent for {clock(silent)}: {where} is gone, or cannot write", style="bold red")
    else:
        yield Text(f"written {silent:.0f} s ago by {where}", style="dim")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"


def _checkpoints(steps: dict[int, bool], home: str | Path) -> Text:
    whole = [step for step, committed in steps.items() if committed]
    if not whole:
        return Text(printable(f"no checkpoint at {home}"), style="dim")
    last = ", ".join(str(step) for step in whole[-_LAST:])
    return Text(printable(f"{len(whole)} checkpoints at {home}, the last at step {last}"))


def _recent(folder: Path) -> Iterator[RenderableType]:
    """The last events, and what was warned of."""
    events = Table("time", "event", "", box=None, header_style="dim")
    for row in _tail(folder / "events.jsonl"):
        more = {key: value for key, value in row.items() if key not in ("time", "event")}
        told = printable(json.dumps(more))
        events.add_row(_at(row.get("time")), Text(printable(str(row.get("event")))), Text(told[:120], style="dim"))
    if events.row_count:
        yield events
    warned = [
        row
        for file in sorted((folder / FOLDER).glob("*.jsonl"))
        for row in _tail(file, 200)
        if row.get("level") in ("WARNING", "ERROR", "CRITICAL")
    ]
    for row in sorted(warned, key=lambda row: str(row.get("time")))[-_LAST:]:
        said = f"{row.get('time')} {row.get('role')} {row.get('logger')}: {row.get('message')}"
        yield Text(printable(said)[:400], style="yellow")


def _at(seconds: Any) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds)) if isinstance(seconds, (int, float)) else "-"


def _tail(path: Path, rows: int = _LAST) -> list[dict[str, Any]]:
    """The last rows of a JSONL file, however long it is; what is torn is left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = deque(file.read().splitlines(), maxlen=rows)
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
