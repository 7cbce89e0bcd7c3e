"""The bake-off's frontiers as a picture: what each kind of credit buys, and at what EV, as gamma grows."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no screen
import matplotlib.pyplot as plt
from credit_grid import BATCHTOPK, DEFAULT, MATRYOSHKA
from credit_rows import Results, Row, mean, start_name, values
from credit_targets import SHUFFLED, TRUTH

# (start, L0) of a row of panels, and what its panels show against EV.
ROWS = ((start_name(BATCHTOPK), 8), (start_name(MATRYOSHKA), 8), ("parent_child, batchtopk k 4 tuned at k 8", 8))
PANELS = ("f1", "mcc", "absorption")
LINES = {DEFAULT: "C0", SHUFFLED: "C7", TRUTH: "C2"}
NAMES = {"f1": "F1", "mcc": "MCC"}


def plot(results: Results, path: Path) -> None:
    """Writes an image (its kind is the path's ending). Points are means over seeds, bars the range of the seeds; each
    line begins at continued training, which is gamma 0."""
    rows = [(start, l0) for start, l0 in ROWS if results.rows(start, "continued", 0.0, l0)]
    if not rows:
        raise SystemExit(f"{path}: no start has continued training and something to hold against it yet")
    figure, axes = plt.subplots(len(rows), len(PANELS), figsize=(12, 3.4 * len(rows)), squeeze=False)
    for (start, l0), line in zip(rows, axes, strict=True):
        continued = results.rows(start, "continued", 0.0, l0)
        for metric, panel in zip(PANELS, line, strict=True):
            for name, colour in LINES.items():
                of_gamma = {gamma: results.rows(start, name, gamma, l0) for gamma in results.gammas(start, name)}
                _line(panel, {0.0: continued, **of_gamma}, metric, name, colour)
            panel.plot(mean(values(continued, "ev")), mean(values(continued, metric)), "k*", markersize=11, zorder=3,
                       label="continued training")  # fmt: skip
            panel.set(xlabel="EV", ylabel=NAMES.get(metric, metric))
            panel.grid(alpha=0.3)
        line[1].set_title(f"{start}, L0 {l0}")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)  # the same picture, the same file
    plt.close(figure)


def _line(panel: plt.Axes, of_gamma: dict[float, dict[int, Row]], metric: str, name: str, colour: str) -> None:
    points = [(gamma, rows) for gamma, rows in of_gamma.items() if rows]
    if len(points) < 2:
        return
    evs = [mean(values(rows, "ev")) for _, rows in points]
    means = [mean(values(rows, metric)) for _, rows in points]
    below = [at - min(values(rows, metric)) for at, (_, rows) in zip(means, points, strict=True)]
    above = [max(values(rows, metric)) - at for at, (_, rows) in zip(means, points, strict=True)]
    panel.errorbar(evs, means, yerr=[below, above], color=colour, marker="o", markersize=4, capsize=2, label=name)
    for ev, at, (gamma, _) in zip(evs, means, points, strict=True):
        if gamma:
            panel.annotate(f"{gamma:g}", (ev, at), textcoords="offset points", xytext=(4, 4), fontsize=7, color=colour)
