"""Numbers as the page prints them. Missing is a dash, never 0."""

from __future__ import annotations

DASH = "–"
MINUS = "−"


def number(value: float | None, digits: int | None = None) -> str:
    """A number with `digits` decimals, or with as many as its size asks for."""
    if value is None:
        return DASH
    if digits is None:
        size = abs(value)
        if size and (size < 1e-3 or size >= 1e5):
            return _minus(f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e"))
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
        text = f"{value:.{digits}f}"
        return _minus(text.rstrip("0").rstrip(".") if "." in text else text)
    return _minus(f"{value:.{digits}f}")


def fixed(value: float | None, digits: int = 3) -> str:
    return number(value, digits)


def signed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return DASH
    return ("+" if value > 0 else "") + number(value, digits)


def percent(value: float | None) -> str:
    """A fraction as a percentage."""
    if value is None:
        return DASH
    scaled = 100 * value
    if scaled and abs(scaled) < 0.01:
        return "<0.01%"
    text = f"{scaled:.1f}" if abs(scaled) >= 1 else f"{scaled:.2f}"
    return _minus(text.rstrip("0").rstrip(".") + "%")


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    if low is None or high is None:
        return DASH
    return f"{number(low, digits)} to {number(high, digits)}"


def count(value: float | None) -> str:
    if value is None:
        return DASH
    if abs(value) >= 10_000_000:
        return f"{value / 1e6:,.0f}M"
    if abs(value) >= 1_000_000:
        return f"{value / 1e6:.1f}M"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _minus(text: str) -> str:
    return text.replace("-", MINUS)
