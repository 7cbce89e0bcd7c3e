"""What a person and a dashboard see of a run: metrics files, the event log, live progress.

`RunLog` writes `metrics.jsonl` (one object per logged step), TensorBoard scalars and `events.jsonl` (what was
leased again, committed, judged and applied, and when). `Progress` shows the run on a terminal, or prints
plain lines elsewhere, and keeps `status.json` for who looks from elsewhere. Gauges: measures.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sae_ray.errors import RunInterrupted, UserError, printable
from sae_ray.logs import redacted
from sae_ray.status_file import StatusFile

_log = logging.getLogger(__name__)
PLAIN_INTERVAL_S = 10.0
EVALUATION = "evaluation"  # the phase in which nothing is trained, so that only the judging's numbers move


class RunLog:
    """Append-only logs of one run; `resume_at` drops the rows of steps that will be trained again."""

    def __init__(self, run_dir: Path, resume_at: int = 0):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._metrics_path = run_dir / "metrics.jsonl"
        self.is_new = not self._metrics_path.exists()
        self._metrics = self._metrics_path.open("a", encoding="utf-8")
        self._events = _appended(run_dir / "events.jsonl")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_at + 1 if resume_at else None)
        self.rewind(resume_at)

    def rewind(self, step: int) -> None:
        """Drops the metrics of later steps: they will be trained again."""
        self._metrics.close()
        kept = [row for row in read_jsonl(self._metrics_path) if row["step"] <= step]
        # Whoever dies in the middle of this leaves the whole old file or the whole new one.
        cut = self._metrics_path.with_suffix(".cut")
        cut.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        cut.replace(self._metrics_path)
        self._metrics = self._metrics_path.open("a", encoding="utf-8")

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._metrics.write(json.dumps(row) + "\n")
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, row["step"])
        self._metrics.flush()

    def event(self, kind: str, **fields: Any) -> None:
        _log.info(kind, extra={"fields": {"event": fields}})
        self._events.write(redacted(json.dumps({"time": round(time.time(), 3), "event": kind, **fields})) + "\n")
        self._events.flush()

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        self._board.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; lines torn by a crash are left out."""
    rows = []
    # Not by `splitlines`, which takes more characters for ends of lines than JSON escapes.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _appended(path: Path) -> TextIO:
    """A JSONL file to append to; what a crash tore at its end stays a line of its own."""
    file = path.open("a", encoding="utf-8")
    if (held := path.read_bytes()) and not held.endswith(b"\n"):
        file.write("\n")
    return file


class RateMeter:
    """Tokens and steps per second over the last half minute."""

    SPAN_S = 30.0

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int]] = []

    def restart(self) -> None:
        """Forgets the past, after a wait that says nothing about the trainer's speed."""
        self._samples = []

    def add(self, tokens: int, step: int) -> None:
        now = time.monotonic()
        before = self._samples[-1][1] if self._samples else 0
        self._samples.append((now, before + tokens, step))
        while len(self._samples) > 2 and self._samples[1][0] < now - self.SPAN_S:
            self._samples.pop(0)

    def tokens_per_s(self) -> float | None:
        return self._rate(1)

    def steps_per_s(self) -> float | None:
        """None too where no step is new: after a death they are trained again."""
        rate = self._rate(2)
        return rate if rate is not None and rate > 0 else None

    def _rate(self, column: int) -> float | None:
        if len(self._samples) < 3:
            return None
        first, last = self._samples[0], self._samples[-1]
        return float((last[column] - first[column]) / (last[0] - first[0]))


@dataclass
class RunStatus:
    """The numbers on the screen. None means not known yet."""

    phase: str = "starting"
    detail: str = ""
    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    trainer_tokens_per_s: float | None = None
    producer_tokens_per_s: float | None = None
    fvu: float | None = None
    l0: float | None = None
    dead_fraction: float | None = None
    trainer_wait_s: float | None = None
    blocks_held: int = 0
    blocks_leased: int = 0
    judge: str = "not started"
    judge_queue: int = 0
    verdicts: int = 0
    verdicts_per_s: float | None = None
    rewards_applied: int = 0
    seconds_left: float | None = None
    measures: dict[str, float] = field(default_factory=dict)  # see measures.py
    notes: list[str] = field(default_factory=list)


class Progress:
    """Shows a `RunStatus`: a live panel on a terminal, one plain line every few seconds elsewhere."""

    def __init__(
        self,
        name: str,
        status: RunStatus,
        console: Console | None = None,
        log: RunLog | None = None,
        file: StatusFile | None = None,
    ):
        self._name, self._file = name, file
        self._log = log
        self._status = status
        self._console = console or Console()
        self._started = self._phase_started = time.monotonic()
        self._last_line = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(self.panel(), console=self._console, refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._end_phase()
        if self._file is not None:
            stopped = isinstance(error, (RunInterrupted, KeyboardInterrupt))
            self._file.show(self._status, "done" if error is None else "stopped" if stopped else "failed", _why(error))
        if error is not None and not isinstance(error, RunInterrupted):
            _log.error("the run ends: %s", error, exc_info=error)
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def say(self, message: str) -> None:
        """A line that stays."""
        _log.info(message)
        elapsed = clock(time.monotonic() - self._started)
        self._console.print(Text(f"[{elapsed}] {printable(message)}"), soft_wrap=True)

    def phase(self, name: str, detail: str = "") -> None:
        """Enters a phase (or changes the detail of the one it is in); the log says how long each took."""
        if self._status.phase != name:
            self.say(f"{name}{': ' + detail if detail else ''}")
            self._end_phase()
        self._status.phase, self._status.detail = name, detail
        self.refresh(force=False)

    def _end_phase(self) -> None:
        now = time.monotonic()
        if self._log is not None:
            self._log.event("phase", name=self._status.phase, seconds=round(now - self._phase_started, 2))
        self._phase_started = now

    def refresh(self, force: bool = False) -> None:
        if self._file is not None:
            self._file.show(self._status)
        if self._live is not None:
            self._live.update(self.panel())
            return
        now = time.monotonic()
        if force or now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            self.say(self._line())

    def _line(self) -> str:
        s = self._status
        parts = [f"{s.phase}: {s.detail}" if s.phase == EVALUATION else f"{s.phase} | step {s.step}/{s.total_steps}"]
        parts += [f"{label} {value}" for label, value in self._numbers()]
        return " | ".join(parts)

    def _numbers(self) -> list[tuple[str, str]]:
        s = self._status
        if s.phase == EVALUATION:
            return [("queue", str(s.judge_queue)), ("verdicts", f"{s.verdicts} ({_number(s.verdicts_per_s, 1)}/s)")]
        numbers = [
            ("tok/s", _count(s.trainer_tokens_per_s)),
            ("producers tok/s", _count(s.producer_tokens_per_s)),
            ("FVU", _number(s.fvu, 3)),
            ("L0", _number(s.l0, 1)),
            ("dead", "-" if s.dead_fraction is None else f"{s.dead_fraction:.1%}"),
            ("producers", _count(s.measures.get("producers_ready"))),
            (
                "waits trainer/producers",
                _shares(s.measures.get("trainer_wait_share"), s.measures.get("producers_idle_share")),
            ),
            ("blocks held/leased", f"{s.blocks_held}/{s.blocks_leased}"),
            ("judge", s.judge),
            ("queue", str(s.judge_queue)),
            ("verdicts", f"{s.verdicts} ({_number(s.verdicts_per_s, 1)}/s)"),
            ("rewards", str(s.rewards_applied)),
            ("left", "-" if s.seconds_left is None else clock(s.seconds_left)),
        ]
        return [(label, value) for label, value in numbers if value != "-"]

    def panel(self, seconds: float | None = None) -> Group:
        """What a terminal shows. seconds: since the run began; None: since this was made."""
        s = self._status
        elapsed = f"   {clock(time.monotonic() - self._started if seconds is None else seconds)}"
        name, phase, detail = map(printable, (self._name, s.phase, s.detail))
        title = Text.assemble((f"{name} ", "bold"), (phase, "cyan"), f"  {detail}", (elapsed, "dim"))
        grid = Table.grid(padding=(0, 2))
        numbers = self._numbers()
        for start in range(0, len(numbers), 4):
            cells = [
                Text.assemble((f"{label} ", "dim"), (printable(value), "bold"))
                for label, value in numbers[start : start + 4]
            ]
            grid.add_row(*cells)
        bar = ProgressBar(total=max(1, s.total_steps), completed=s.step, width=60)
        steps = Text(f"step {s.step}/{s.total_steps}", style="dim")
        return Group(title, bar, steps, grid)


def clock(seconds: float) -> str:
    """M:SS or H:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def _why(error: BaseException | None) -> str:
    if error is None:
        return ""
    said = " ".join(str(error).split())
    return said if isinstance(error, (UserError, RunInterrupted)) else f"{type(error).__name__}: {said}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _shares(*values: float | None) -> str:
    return "-" if None in values else "/".join(f"{value:.0%}" for value in values)


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
