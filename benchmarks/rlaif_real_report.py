"""What `rlaif_real.py` makes of its scores: differences paired over latents, the tables, the targets, the plot. Pure.

A score is a number per latent, None where it could not be had; a missing score is left out, and said.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from sae_ray.judge.scores import Estimate, mean_estimate

REFERENCE = "continued"
# Score name: (what a reader calls it, whether training saw this judge).
MEASURES = {
    "embedding": "detection by MiniLM",
    "all_texts": "the same, all texts",
    "ceiling": "the same, with labels",
    "simulation": "simulation, correlation",
    "sensitivity": "sensitivity",
    "detection": "detection by the training judge",
}
NULLS = {"rlaif": "shuffled", "own_cuts": "own_shuffled"}  # the same with the verdicts dealt anew
HELD_OUT = ("embedding", "all_texts")  # one question, of a few texts and of all
LEAST_GAIN, FVU_TOLERANCE, L0_TOLERANCE = 0.05, 0.02, 0.02
RESAMPLES = 4000

Scores = Mapping[int, float | None]


@dataclass(frozen=True)
class Difference:
    """mean of `one` minus `other` with its 95% bootstrap interval over latents.

    paired: over the n latents that both have; else each side's latents are drawn by themselves, and n is the smaller
    number. missing: latents that one side has and the other has not (paired), or that have no score (not paired).
    """

    measure: str
    one: str
    other: str
    paired: bool
    mean: float
    low: float
    high: float
    n: int
    missing: int

    @property
    def above_zero(self) -> bool:
        return self.low > 0


def known(scores: Scores) -> dict[int, float]:
    return {latent: value for latent, value in scores.items() if value is not None and np.isfinite(value)}


def paired(measure: str, one: str, other: str, a: Scores, b: Scores) -> Difference | None:
    """Over the latents that both have; None without any."""
    first, second = known(a), known(b)
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    found = mean_estimate([first[latent] - second[latent] for latent in both], resamples=RESAMPLES)
    missing = len(first.keys() ^ second.keys())
    return Difference(measure, one, other, True, found.value, found.low, found.high, len(both), missing)


def unpaired(measure: str, one: str, other: str, a: Scores, b: Scores) -> Difference | None:
    """Of two SAEs whose latents are not the same ones; None if one has no score."""
    sides = [np.array(list(known(scores).values())) for scores in (a, b)]
    if not all(len(side) for side in sides):
        return None
    rng = np.random.default_rng(0)
    means = [side[rng.integers(len(side), size=(RESAMPLES, len(side)))].mean(axis=1) for side in sides]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    mean = float(sides[0].mean() - sides[1].mean())
    missing = len(a) + len(b) - sum(map(len, sides))
    return Difference(measure, one, other, False, mean, float(low), float(high), min(map(len, sides)), missing)


def differences(scores: Mapping[str, Mapping[str, Scores]], others: Sequence[str] = ()) -> list[Difference]:
    """Every SAE against continued training, and what arms have above the same with shuffled verdicts.

    Args:
        scores: measure -> SAE -> latent -> score.
        others: SAEs whose latents are not the reference's.
    """
    out: list[Difference | None] = []
    for measure, by_sae in scores.items():
        if REFERENCE not in by_sae:
            continue
        for name in by_sae:
            if name != REFERENCE:
                kind = unpaired if name in others else paired
                out.append(kind(measure, name, REFERENCE, by_sae[name], by_sae[REFERENCE]))
        for name, null in NULLS.items():
            if name in by_sae and null in by_sae:
                out.append(paired(measure, name, null, by_sae[name], by_sae[null]))
    return [each for each in out if each is not None]


def only(
    scores: Mapping[str, Mapping[str, Scores]], latents: Sequence[int], others: Sequence[str] = ()
) -> dict[str, dict[str, Scores]]:
    """The scores of these latents alone, without the SAEs whose latents are others."""
    return {
        measure: {
            name: {latent: mine[latent] for latent in latents if latent in mine}
            for name, mine in by_sae.items()
            if name not in others
        }
        for measure, by_sae in scores.items()
    }


def mean_of(scores: Scores) -> Estimate | None:
    values = list(known(scores).values())
    return mean_estimate(values, resamples=RESAMPLES) if values else None


def alike(core: Mapping[str, Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    """How far an SAE's (FVU, L0) are from continued training's, as shares of it; None where one was not measured."""
    if name not in core or REFERENCE not in core:
        return None
    fvu, l0 = (core[name][key] / core[REFERENCE][key] - 1 for key in ("fvu", "l0"))
    return fvu, l0


def targets(
    found: Sequence[Difference], core: Mapping[str, Mapping[str, Any]], arms: Sequence[str]
) -> list[dict[str, Any]]:
    """For each of the arms whether it meets the target: see `rlaif_real.py`. `met` is None where a part is missing."""
    rows = []
    for measure, arm in ((measure, arm) for measure in HELD_OUT for arm in arms):
        gain = next((d for d in found if (d.measure, d.one, d.other) == (measure, arm, REFERENCE)), None)
        shares = alike(core, arm)
        met = None
        if gain is not None and shares is not None:
            equal = abs(shares[0]) <= FVU_TOLERANCE and abs(shares[1]) <= L0_TOLERANCE
            met = gain.mean >= LEAST_GAIN and gain.above_zero and equal
        rows.append(
            {
                "measure": measure,
                "sae": arm,
                "gain": None if gain is None else [gain.mean, gain.low, gain.high, gain.n],
                "fvu_share": None if shares is None else shares[0],
                "l0_share": None if shares is None else shares[1],
                "met": met,
            }
        )
    return rows


# ---------------------------------------------------------------------- for readers


def grid(
    scores: Mapping[str, Mapping[str, Scores]], core: Mapping[str, Mapping[str, Any]], found: Sequence[Difference]
) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the main table: an SAE a row; under each measure its mean and, against continued training,
    the difference with its interval."""
    measures = [measure for measure in MEASURES if measure in scores]
    head = ["SAE", "FVU", "L0", "CE recovered", "dead", *(MEASURES[measure] for measure in measures)]
    names = list(dict.fromkeys([*core, *(name for measure in measures for name in scores[measure])]))
    by = {(d.measure, d.one): d for d in found if d.other == REFERENCE}
    rows = []
    for name in names:
        about = core.get(name, {})
        cells = [_number(about.get(key), digits) for key, digits in (("fvu", 4), ("l0", 2), ("ce_recovered", 4))]
        cells.append(_share(about.get("dead_fraction")))
        for measure in measures:
            mean = mean_of(scores[measure].get(name, {}))
            text = "" if mean is None else f"{mean.value:.3f}"
            if (difference := by.get((measure, name))) is not None:
                text += f" ({interval(difference)}, n {difference.n})"
            elif mean is not None:
                text += f" (n {mean.n})"
            cells.append(text)
        rows.append([name, *cells])
    return head, rows


def interval(d: Difference) -> str:
    return f"{d.mean:+.3f}, {d.low:+.3f} to {d.high:+.3f}"


def told(d: Difference) -> str:
    return f"{MEASURES[d.measure]}, {d.one} - {d.other}: {interval(d)}, n {d.n}"


def target_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The target, and for each arm what stands beside it."""
    bounds = f"interval above 0, FVU and L0 within {FVU_TOLERANCE:.0%}"
    lines = [f"target: {MEASURES[HELD_OUT[0]]} up by {LEAST_GAIN:g} or more over continued training, {bounds}"]
    for row in rows:
        which = f"{row['sae']}, {MEASURES[row['measure']]}"
        if row["met"] is None:
            lines.append(f"{which}: not measured yet")
            continue
        mean, low, high, n = row["gain"]
        lines.append(
            f"{which}: {mean:+.3f} ({low:+.3f} to {high:+.3f}, {n} latents), FVU {row['fvu_share']:+.1%}, "
            f"L0 {row['l0_share']:+.1%}: {'met' if row['met'] else 'missed'}"
        )
    return lines


def narrowed(core: Mapping[str, Mapping[str, Any]], taught: Sequence[int], others: Sequence[str] = ()) -> list[str]:
    """On how many of continued training's tokens the taught latents of each SAE are active: medians over latents.

    Args:
        others: SAEs whose latents are not the reference's.
    """
    about = {name: each.get("active_share", {}) for name, each in core.items() if name not in others}
    lines = []
    for name, share in about.items():
        of = {str(latent): at for latent, at in about.get(REFERENCE, {}).items()}
        mine = {str(latent): at for latent, at in share.items()}
        pairs = [(mine[key], of[key]) for key in map(str, taught) if key in mine and of.get(key)]
        if name != REFERENCE and pairs:
            middle = float(np.median([one / other for one, other in pairs]))
            lines.append(f"{name}: active on {middle:.2f} of {REFERENCE}'s tokens, n {len(pairs)}")
    return lines


def rich_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(head):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def svg(found: Sequence[Difference]) -> str:
    """Differences with their intervals as one SVG: a block a measure, a line a pair."""
    step, left, width, right = 22, 250, 420, 160
    shown = [(measure, [d for d in found if d.measure == measure]) for measure in MEASURES]
    shown = [(measure, some) for measure, some in shown if some]
    finite = [edge for _, some in shown for d in some for edge in (d.low, d.high, 0.0) if np.isfinite(edge)]
    low, high = (min(finite), max(finite)) if finite else (-1.0, 1.0)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return left + width * (min(max(value, low), high) - low) / (high - low)

    parts, y = [], 10
    for measure, some in shown:
        y += step
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{html.escape(MEASURES[measure])}</text>')
        for d in some:
            y += step
            told = html.escape(f"{d.one} - {d.other}" + ("" if d.paired else " (not paired)"))
            colour = "#1a7f37" if d.low > 0 else "#b42318" if d.high < 0 else "#57606a"
            place = f'x1="{x(d.low):.1f}" x2="{x(d.high):.1f}" y1="{y - 4}" y2="{y - 4}"'
            parts += [
                f'<text x="20" y="{y}">{told}</text>',
                f'<line {place} stroke="{colour}" stroke-width="2"/>',
                f'<circle cx="{x(d.mean):.1f}" cy="{y - 4}" r="4" fill="{colour}"/>',
                f'<text x="{left + width + 12}" y="{y}">{d.mean:+.3f} (n {d.n})</text>',
            ]
        y += step // 2
    zero = f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="10" y2="{y}" stroke="#8c959f" stroke-dasharray="3 3"/>'
    size = f'width="{left + width + right}" height="{y + 10}"'
    style = 'font-family="sans-serif" font-size="13" fill="#1f2328"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{zero}{"".join(parts)}</svg>\n'


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
