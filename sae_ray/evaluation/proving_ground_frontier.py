"""Methods at equal explained variance: a method's cells over gamma are a path, and a path has a point at an EV.

A gate that is aligned to a concept and one that is best for reconstruction are not the same gate, so a larger gamma
buys F1 with EV. Two cells can only be compared where they paid the same: `at_ev` goes along a method's cells from
gamma 0, which is continued training whatever the method, to where EV has come down to the level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

Row = Mapping[str, float]
# A frontier's point may have this much more L0 than the one that it is held against: thresholds hit L0 to a sample.
L0_SLACK = 0.005


def at_ev(path: Sequence[Row], ev: float) -> dict[str, float]:
    """Metrics where a path first comes down to `ev`, linear between its points; "ev" is among them.

    A path that starts below `ev` was never there: all is NaN. One that stays above it gives its last point: more EV
    than was asked for, and nothing beyond the largest gamma that was tried is guessed.

    Args:
        path: metrics of one seed, in order of gamma, all with the same names; "ev" must be one.
    """
    if not path:
        raise ValueError("a path needs at least one point")
    if not path[0]["ev"] >= ev:
        return dict.fromkeys(path[0], math.nan)
    for above, below in pairwise(path):
        if below["ev"] <= ev:
            gap = above["ev"] - below["ev"]
            share = (above["ev"] - ev) / gap if gap > 0 else 0.0
            return {name: value + share * (below[name] - value) for name, value in above.items()}
    return dict(path[-1])


def undominated(points: Sequence[Row], others: Sequence[Row], by: Sequence[str] = ("ev", "f1", "mcc")) -> list[Row]:
    """The points that no other beats: with no more L0, nowhere worse and somewhere better, larger being better."""
    return [point for point in points if not any(_beats(other, point, by) for other in others)]


def _beats(other: Row, point: Row, by: Sequence[str]) -> bool:
    if other["l0"] > point["l0"] * (1 + L0_SLACK):
        return False
    return all(other[name] >= point[name] for name in by) and any(other[name] > point[name] for name in by)
