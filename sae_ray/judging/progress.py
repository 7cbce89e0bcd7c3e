"""What a person sees while latents are judged: a bar with the time left, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sae_ray.errors import printable

PLAIN_INTERVAL_S = 10.0


class JudgingProgress:
    """A bar over latents. `say` is where things stand, `line` stays."""

    def __init__(self, name: str, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]{task.fields[name]}[/]"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, name=name)
        self._name = name
        self._began = self._said = time.monotonic()
        self._first: tuple[float, int] | None = None  # when it started, and with how many done; and the newest ones
        self._newest = (0.0, 0)

    def __enter__(self) -> JudgingProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def line(self, text: str) -> None:
        self._console.print(Text(f"[{_clock(time.monotonic() - self._began)}] {printable(text)}"), soft_wrap=True)

    def say(self, text: str) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, description=Text(text).plain)
        elif time.monotonic() - self._said >= PLAIN_INTERVAL_S:
            self._said = time.monotonic()
            self.line(text)

    def start(self, total: int, done: int) -> None:
        self._first = self._newest = time.monotonic(), done
        self._bar.reset(self._task, total=total, completed=done, name=self._name)

    def update(self, done: int, state: str, tokens: float, counters: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=done)
        assert self._first is not None, "start() comes first"
        if done > self._newest[1]:
            self._newest = time.monotonic(), done
        total = self._bar.tasks[0].total
        parts = [state, f"{counters.get('done', 0):,.0f} answers", f"{tokens:,.0f} tokens computed"]
        parts += [f"{counters[name]:,.0f} {name}" for name in ("failed", "retries") if counters.get(name)]
        if not self._console.is_terminal and total is not None:
            left = self._left_s(total - done)
            parts = [f"{done} of {total:.0f} latents", *parts, *([f"left {_clock(left)}"] if left is not None else [])]
        self.say(" | ".join(parts))

    def _left_s(self, left: float) -> float | None:
        """At the pace until the newest ones, less the time since: it falls while many are judged at once."""
        assert self._first is not None
        (began, before), (then, done) = self._first, self._newest
        if done <= before:
            return None
        return max(0.0, (then - began) / (done - before) * left - (time.monotonic() - then))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
