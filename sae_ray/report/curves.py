"""Curves of a run as geometry: where lines, ticks and marks go. The template draws it.

Lines live in a 1000 x 1000 box that the page stretches to the width it has; tick labels are HTML placed in
percent, so that text keeps its size on a phone. No charting library: the page stays small and follows the
reader's light or dark theme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_ray.report.formats import count, number, percent

BOX = 1000.0
MAX_POINTS = 500
Point = tuple[float, float]
Label = Callable[[float], str]


@dataclass(frozen=True)
class Tick:
    at: float  # percent of the axis, from the left or the bottom
    label: str


@dataclass(frozen=True)
class Series:
    name: str
    role: str  # a version of the SAE, which decides the colour
    points: list[Point]


@dataclass(frozen=True)
class Line:
    name: str
    role: str
    path: str  # SVG path in the box


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    zero: float | None  # percent from the bottom where y = 0 deserves a line
    rlaif_from: float | None  # percent from the left where the RLAIF phase begins
    marks: list[Tick]  # rewards applied
    hover: str  # JSON for the pointer read-out
    wide: bool = False


@dataclass(frozen=True)
class Timeline:
    """What all curves of one run share: the steps they span and what happened when."""

    first: int
    last: int
    rlaif_from: int | None
    rewards: list[tuple[int, str]] = field(default_factory=list)  # (step, label)

    def x(self, step: float) -> float:
        """Position of `step`, 0 to 1."""
        return (step - self.first) / max(1, self.last - self.first)


def column(rows: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has a number under `key`."""
    return [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]


def difference(left: list[Point], right: list[Point]) -> list[Point]:
    """left - right at the steps that both have."""
    other = dict(right)
    return [(x, y - other[x]) for x, y in left if x in other]


def thin(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points; neighbours are averaged, never skipped."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / limit)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def chart(
    title: str,
    note: str,
    series: list[Series],
    timeline: Timeline,
    *,
    log: bool = False,
    floor: float | None = None,
    clip: bool = False,
    show_zero: bool = False,
    label: Label | None = None,
    wide: bool = False,
) -> Chart | None:
    """Lays out one chart over the run's steps; None when no series has a point.

    Args:
        floor: the axis reaches down to here at least.
        clip: end the axis above the bulk, where single outliers would flatten everything else.
    """
    if log:
        series = [Series(one.name, one.role, [p for p in one.points if p[1] > 0]) for one in series]
    series = [Series(one.name, one.role, thin(one.points)) for one in series if one.points]
    if not series:
        return None
    values = sorted(y for one in series for _, y in one.points)
    low, high = values[0], values[-1]
    read_out = label or (lambda value: number(value, _decimals(value, 4)))
    if floor is not None:
        low = min(low, floor)
    if show_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    bulk = values[int(0.97 * (len(values) - 1))]
    if clip and bulk > 0 and high > 2.5 * bulk:
        high = 1.5 * bulk
        above = sum(value > high for value in values)
        note += f" {above} above the axis, up to {(label or number)(values[-1])}."
    scale = _log_scale(low, high) if log else _linear_scale(low, high, padded_below=low != floor)
    y = _mapper(*scale, log=log)
    ticks = _log_ticks(*scale) if log else nice_ticks(*scale)
    # As many decimals as the distance of two ticks needs, so that no two read alike.
    digits = _decimals(ticks[1] - ticks[0], 1) if len(ticks) > 1 and not log else None
    tick_label = label or (lambda value: number(value, digits))
    return Chart(
        title=title,
        note=note.strip(),
        lines=[Line(one.name, one.role, _path(one.points, timeline, y)) for one in series],
        x_ticks=[
            Tick(100 * timeline.x(v), count(v))
            for v in nice_ticks(timeline.first, timeline.last, 6 if wide else 3)
            if v == int(v)
        ],
        y_ticks=[Tick(100 * y(v), tick_label(v)) for v in ticks],
        zero=100 * y(0.0) if show_zero else None,
        rlaif_from=None if timeline.rlaif_from is None else 100 * timeline.x(timeline.rlaif_from),
        marks=[Tick(100 * timeline.x(step), text) for step, text in timeline.rewards],
        hover=json.dumps(
            {
                "x": [timeline.first, timeline.last],
                "series": [
                    {
                        "name": one.name,
                        "role": one.role,
                        "points": [[round(a, 2), read_out(b)] for a, b in one.points],
                    }
                    for one in series
                ],
            },
            separators=(",", ":"),
        ),
        wide=wide,
    )


def variant_role(index: int) -> str:
    """The style of a run's other SAEs; six colours, then again."""
    return f"sae-{index % 6}"


def run_charts(
    rows: list[dict[str, Any]], timeline: Timeline, variants: Sequence[str] = ()
) -> tuple[list[Chart], list[Chart]]:
    """The curves that a reader wants first, and the rest.

    Args:
        variants: names of the run's SAEs beside main.
    """

    def both(key: str) -> list[Series]:
        main, control = column(rows, key), column(rows, f"control/{key}")
        return [Series("control", "control", control), Series("SAE", "rlaif", main)]

    def one(key: str) -> list[Series]:
        return [Series("SAE", "rlaif", column(rows, key))]

    def every(key: str) -> list[Series]:
        found = [Series(v, variant_role(i), column(rows, f"{v}/{key}")) for i, v in enumerate(variants)]
        return [*found, Series("main", "rlaif", column(rows, key))] if variants else []

    # The trainer logs exactly 0 while it has no rewards: that is no credit, not a credit of 0.
    credit = [point for point in column(rows, "credit_loss") if point[1] != 0.0]
    speed = column(rows, "tokens_per_s") or column(rows, "rank_tokens_per_s")
    cost = difference(column(rows, "fvu"), column(rows, "control/fvu"))
    first = [
        chart("FVU", "Training batches, log scale.", both("fvu"), timeline, log=True, wide=True),
        chart(
            "FVU, SAE minus control",
            "Same batches, so batch noise cancels: what the rewards cost in reconstruction.",
            [Series("SAE - control", "rlaif", cost)],
            timeline,
            show_zero=True,
        ),
        chart(
            "FVU of every SAE",
            "The same batches, each at its own hook point.",
            every("fvu"),
            timeline,
            log=True,
            wide=True,
        ),
        chart("L0", "Active latents per token.", both("l0"), timeline),
        chart("L0 of every SAE", "Active latents per token.", every("l0"), timeline, log=True),
        chart("Dead latents", "Share of all latents.", both("dead_fraction"), timeline, floor=0.0, label=percent),
        chart("Credit loss", "As it is added to the loss, gamma included.", [Series("SAE", "rlaif", credit)], timeline),
        chart("Step time", "Seconds per step.", one("step_seconds"), timeline, floor=0.0, clip=True, wide=True),
        chart("Gradient norm", "Before clipping.", both("grad_norm"), timeline, floor=0.0, clip=True),
    ]
    rest = [
        chart("AuxK loss", "", both("aux"), timeline, floor=0.0),
        chart("Activation threshold", "", both("threshold"), timeline),
        chart(
            "Learning rate",
            "",
            one("lr"),
            timeline,
            floor=0.0,
            label=lambda value: f"{value:.1e}" if value else "0",
        ),
        chart(
            "Training speed", "Tokens per second.", [Series("SAE", "rlaif", speed)], timeline, floor=0.0, label=count
        ),
    ]
    return [one for one in first if one], [one for one in rest if one]


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values within [low, high], about `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _decimals(value: float, significant: int) -> int:
    """Decimals that show `significant` digits of a value."""
    return max(0, significant - 1 - math.floor(math.log10(abs(value)) + 1e-9)) if value else 0


def _linear_scale(low: float, high: float, padded_below: bool) -> tuple[float, float]:
    # A flat line would otherwise be stretched to look like noise, or divide by zero.
    span = max(high - low, 0.02 * abs(high), 1e-9)
    if high == low:
        low, high = (low, low + span) if not padded_below else (low - span / 2, high + span / 2)
    return (low - 0.06 * span if padded_below else low), high + 0.08 * span


def _log_scale(low: float, high: float) -> tuple[float, float]:
    ratio = max(high / low, 1.2)
    return low / ratio**0.06, high * ratio**0.08


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**power for power in powers for m in multiples if low <= m * 10.0**power <= high]
        if len(ticks) >= 4:
            return ticks
    return ticks if len(ticks) > 1 else nice_ticks(low, high)


def _mapper(low: float, high: float, log: bool) -> Callable[[float], float]:
    if log:
        return lambda value: (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return lambda value: (value - low) / (high - low)


def _path(points: list[Point], timeline: Timeline, y: Callable[[float], float]) -> str:
    spots = [f"{BOX * timeline.x(a):.1f} {BOX * (1 - y(b)):.1f}" for a, b in points]
    # A lone point still shows: a zero-length line with round caps is a dot.
    return "M" + "L".join(spots if len(spots) > 1 else spots * 2)
