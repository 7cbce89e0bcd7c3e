"""What the bake-off is to show, each beside what was measured: met, missed or not run.

A target is judged by the mean over seeds. Beside it stand the same numbers with shuffled verdicts, which no judge may
take credit for, and with true labels, the most that any judge could know: what they miss as well, verdicts cannot mend.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import NamedTuple

from credit_grid import BATCHTOPK, BOTH, DEFAULT, FAMILIES, KEPT, MATRYOSHKA, ROLLOUTS
from credit_rows import Results, Row, differences, interval, label, mean, start_name, start_of, values

from sae_ray.evaluation.proving_ground_frontier import undominated

SHUFFLED, TRUTH, BROAD = (
    f"{DEFAULT}, shuffled verdicts",
    "true_labels",
    f"{DEFAULT}, explained against random negatives",
)
_LONGER = asdict(BATCHTOPK.cell(0, BOTH, **KEPT, **ROLLOUTS))
COMBINED = (start_of(_LONGER), label(_LONGER))
COMBINED_2048 = (
    COMBINED[0],
    label({**_LONGER, "verdicts": 2048, "rollout_gamma": 0.2, "rollout_share": 0.25}),
)
EV_SLACK = 0.01  # what the issue calls equal EV
NO_GAIN = 0.005  # of F1: less than two seeds of continued training differ by
COLLAPSE_SLACK = 0.01  # of the latents
L0_SLACK = 0.005  # a share: what has fewer positive pre-activations than the L0 is not compared at it


class Finding(NamedTuple):
    target: str
    measured: str
    shuffled: str
    truth: str
    met: bool | None  # None: not run


def targets(results: Results) -> list[Finding]:
    return [
        _at_least(results, start_name(BATCHTOPK), DEFAULT, 0.80, 0.70),
        _at_least(results, *COMBINED, 0.80, 0.70),
        _at_least(results, start_name(BATCHTOPK), f"{DEFAULT}, 2048 verdicts", 0.83, 0.70),
        _at_least(results, *COMBINED_2048, 0.83, None),
        _over_matryoshka(results),
        _moonshot(results),
        _absorption(results, start_name(FAMILIES), "base", FAMILIES.k),
        _absorption(results, f"{start_name(FAMILIES)} tuned at k 8", "continued", 8),
        *(_no_gain(results, start_name(start), start.k) for start in (BATCHTOPK, MATRYOSHKA, FAMILIES)),
        _collapse(results),
    ]


def verdict(finding: Finding) -> str:
    return "not run" if finding.met is None else "met" if finding.met else "**missed**"


def _at_least(results: Results, start: str, name: str, least: float, level: float | None) -> Finding:
    """F1 and MCC at an EV; None: at the EV that the cells of their largest gamma have."""
    l0 = BATCHTOPK.k

    def found(of: str) -> dict[int, Row]:
        if level is not None:
            return results.at(start, of, l0, level)
        return results.rows(start, of, max(results.gammas(start, of), default=0.0), l0)

    def said(of: str) -> str:
        rows = found(of)
        if not rows:
            return ""
        at = "" if level is not None else f" at EV {interval(values(rows, 'ev'))}"
        at += "" if _full(rows, l0) else f" and only L0 {interval(values(rows, 'l0'))}"
        return f"F1 {interval(values(rows, 'f1'))}, MCC {interval(values(rows, 'mcc'))}{at}{_seeds(rows)}"

    rows = found(name)
    lowest = min(mean(values(rows, "f1")), mean(values(rows, "mcc"))) if rows else math.nan
    where = f" at EV {level:.2f}" if level is not None else ""
    what = f"{start}, {name}: F1 and MCC at least {least:.2f}{where}, L0 {l0}"
    met = _met(lowest, lowest >= least and _full(rows, l0))
    own = results.shuffled(start, name) if name in results.cells.get(start, {}) else ""
    return Finding(what, said(name), said(own), said(TRUTH), met)


def _full(rows: dict[int, Row], l0: float) -> bool:
    """Whether there were as many positive pre-activations as the L0 asks for."""
    return not rows or mean(values(rows, "l0")) >= (1 - L0_SLACK) * l0


def _over_matryoshka(results: Results) -> Finding:
    start, l0 = start_name(MATRYOSHKA), MATRYOSHKA.k
    continued = results.rows(start, "continued", 0.0, l0)
    level = results.below_continued(start, l0, EV_SLACK)

    def gains(of: str) -> tuple[list[float], list[float]]:
        rows = results.at(start, of, l0, level)
        return differences(rows, continued, "f1"), differences(rows, continued, "mcc")

    def said(of: str) -> str:
        f1, mcc = gains(of)
        return f"F1 {interval(f1, True)}, MCC {interval(mcc, True)} ({len(f1)} seeds)" if f1 else ""

    f1, mcc = (mean(found) for found in gains(DEFAULT))
    what = f"{start}: F1 +.03, MCC no lower than continued training's, EV within {EV_SLACK}"
    return Finding(what, said(DEFAULT), said(SHUFFLED), said(TRUTH), _met(f1, f1 >= 0.03 and mcc >= 0))


def _moonshot(results: Results) -> Finding:
    """Over L0s: is some cell with credit nowhere worse in EV, F1 and MCC, and somewhere better?"""
    control = _frontiers(results, start_name(MATRYOSHKA), "continued")
    left, of = [], []
    for name in (DEFAULT, SHUFFLED, TRUTH):
        credited = [_frontiers(results, start_name(start), name) for start in (BATCHTOPK, MATRYOSHKA)]
        counts = []
        for seed, points in control.items():
            others = [row for rows in credited for row in rows.get(seed, [])]
            if others:
                counts.append(float(len(undominated(points, others))))
                of.append(len(points))
        left.append(counts)
    said = [f"{mean(counts):.1f} of {max(of)} points left ({len(counts)} seeds)" if counts else "" for counts in left]
    found = mean(left[0])
    what = f"no point of {start_name(MATRYOSHKA)}'s frontier over L0 is undominated (L0, EV, F1, MCC)"
    return Finding(what, *said, _met(found, found == 0))


def _frontiers(results: Results, start: str, name: str) -> dict[int, list[Row]]:
    """Over L0, of all gammas, by seed."""
    out: dict[int, list[Row]] = {}
    for of_gamma in results.cells.get(start, {}).get(name, {}).values():
        for seed, record in of_gamma.items():
            mcc = record["deployed"]["mcc"]  # of the decoder: the same at every L0
            out.setdefault(seed, []).extend({**row, "mcc": mcc} for row in record["frontier"])
    return out


def _absorption(results: Results, start: str, of_what: str, l0: int) -> Finding:
    base = results.rows(start, of_what, 0.0, l0)
    level = {seed: row["ev"] - EV_SLACK for seed, row in base.items()}

    def ratios(of: str) -> list[float]:
        rows = results.at(start, of, l0, level)
        return [row["absorption"] / base[seed]["absorption"] for seed, row in rows.items() if base[seed]["absorption"]]

    def said(of: str) -> str:
        return f"{interval(ratios(of))} of {interval(values(base, 'absorption'))}" if ratios(of) else ""

    found = mean(ratios(DEFAULT))
    whose = "the base's" if of_what == "base" else f"{of_what} training's"
    what = f"{start}: absorption at most half of {whose} at its EV less {EV_SLACK}, L0 {l0}"
    return Finding(what, said(DEFAULT), said(SHUFFLED), said(TRUTH), _met(found, found <= 0.5))


def _no_gain(results: Results, start: str, l0: int) -> Finding:
    continued = results.rows(start, "continued", 0.0, l0)
    level = results.below_continued(start, l0, EV_SLACK)

    def gains(of: str) -> list[float]:
        return differences(results.at(start, of, l0, level), continued, "f1")

    said = [f"F1 {interval(gains(of), True)}" if gains(of) else "" for of in (SHUFFLED, DEFAULT, TRUTH)]
    found = mean(gains(SHUFFLED))
    what = f"{start}: shuffled verdicts gain at most {NO_GAIN} of F1 on continued training, at its EV less {EV_SLACK}"
    # What is measured here is the shuffled verdicts themselves; beside them the teacher's own gain.
    return Finding(f"{what}; the teacher's: {said[1]}", said[0], said[0], said[2], _met(found, found <= NO_GAIN))


def _collapse(results: Results) -> Finding:
    """Wherever the default and continued training were run; the largest share over gammas counts."""
    starts = [start for start, of in results.cells.items() if DEFAULT in of and "continued" in of]

    def shares(start: str, of: str) -> list[float]:
        rows = [results.rows(start, of, gamma, 4) for gamma in results.gammas(start, of)]  # one number for all L0s
        return [mean(values(found, "collapsed")) for found in rows if found]

    parts, excess = [], []
    for start in starts:
        own, none = shares(start, DEFAULT), shares(start, "continued")
        if own and none:
            excess.append(max(own) - max(none))
            broad = shares(start, BROAD)
            parts.append(
                f"{start}: {max(own):.1%}, continued {max(none):.1%}"
                + (f", against random negatives {max(broad):.1%}" if broad else "")
            )
    worst = max(excess, default=math.nan)
    what = "the default makes no more children's latents their parents' than continued training does"
    return Finding(what, "; ".join(parts), "", "", _met(worst, worst <= COLLAPSE_SLACK))


def _met(measured: float, met: bool) -> bool | None:
    return None if math.isnan(measured) else met


def _seeds(rows: dict[int, Row]) -> str:
    return f" ({len(rows)} seeds)"
