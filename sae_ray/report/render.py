"""`render_report`: a run folder's files in, one HTML page out that needs nothing else.

The page carries its style, its charts (SVG) and one small script, and a policy that lets it load nothing and
run no other script. Corpus text, explanations and model names are untrusted: every value goes through Jinja's
autoescaping, and only this package's own style and script are marked as safe.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections import Counter
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sae_ray import __version__
from sae_ray.report import formats
from sae_ray.report.curves import Timeline, run_charts, variant_role
from sae_ray.report.features import SHOWN_EXAMPLES, Latent, best_and_worst, ranked_version, read_latents
from sae_ray.report.findings import LEVEL, cards, conclude, in_order, measured, version_label
from sae_ray.report.run_files import RunFiles, applied_rewards, phase_seconds, read_run
from sae_ray.storage import LocalStorage

FILE_NAME = "report.html"
N_FEATURES = 6


def render_report(run_dir: Path, n_features: int = N_FEATURES) -> Path:
    """Write `run_dir/report.html` from the files of the run folder; it can be called at any time of a run.

    Args:
        n_features: how many best and how many worst latents are shown in full.
    Returns:
        The page's path.
    Raises:
        UserError: the folder holds no run.
    """
    run_dir = Path(run_dir)
    page = environment().get_template("page.html.j2").render(_view(read_run(run_dir), n_features))
    # A token may be half a surrogate pair, which UTF-8 cannot carry.
    LocalStorage(run_dir).write(FILE_NAME, page.encode("utf-8", errors="replace"))
    return run_dir / FILE_NAME


def environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sae_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "fixed", "signed", "percent", "count", "duration")
    environment.filters |= {name: getattr(formats, name) for name in names}
    environment.filters["version"] = version_label
    environment.globals |= {"interval": formats.interval, "DASH": formats.DASH}
    return environment


def asset(name: str) -> str:
    return resources.files("sae_ray.report").joinpath(name).read_text(encoding="utf-8")


def _view(run: RunFiles, n_features: int) -> dict[str, Any]:
    """Everything that the template prints, by section."""
    script = asset("page.js")
    rewards = applied_rewards(run.events)
    timeline = _timeline(run, rewards)
    variants = {variant.name: variant_role(index) for index, variant in enumerate(run.config.saes)}
    charts, more_charts = run_charts(run.metrics, timeline, list(variants))
    latents = read_latents(run.evaluation)
    best, worst = best_and_worst(latents, n_features)
    return {
        "style": Markup(asset("page.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "package_version": __version__,
        "run": run,
        "config": run.config,
        "notes": run.notes,
        "level": LEVEL,
        "steps_done": run.metrics[-1]["step"] if run.metrics else None,
        "when": _when(run.events),
        "conclusion": conclude(run),
        "cards": cards(run),
        "variants": variants,
        "charts": charts,
        "more_charts": more_charts,
        "rlaif_shown": timeline.rlaif_from is not None,
        "has_control": any("control/fvu" in row for row in run.metrics),
        "rewards": rewards,
        "calibration": run.calibration,
        "calibration_modes": _calibration_modes(run.calibration),
        "core": _core_table(run.evaluation),
        "detection": _detection_table(run.evaluation),
        "paired": _paired(run.evaluation),
        "axis": _auroc_axis(run, latents),
        "latents": latents,
        "ranked": ranked_version(latents),
        "best": best,
        "worst": worst,
        "shown_examples": SHOWN_EXAMPLES,
        "scatter": _scatter(latents),
        "phases": phase_seconds(run.events),
        "evaluation_seconds": _flat(run.evaluation.get("seconds") or {}),
        "judge_counters": _flat(run.evaluation.get("judge") or {}),
        "event_counts": Counter(str(event.get("event")) for event in run.events).most_common(),
        "folder": shlex.quote(str(run.folder)),
    }


def _timeline(run: RunFiles, rewards: list[dict[str, Any]]) -> Timeline:
    first, last = (run.metrics[0]["step"], run.metrics[-1]["step"]) if run.metrics else (0, 1)
    begins = run.config.trainer.steps
    marks = [(row["at_step"], f"R{row.get('round', '?')}") for row in rewards if isinstance(row.get("at_step"), int)]
    return Timeline(
        first=first,
        last=max(last, first + 1),
        rlaif_from=begins if run.config.rlaif.enabled and first <= begins < last else None,
        rewards=[(step, text) for step, text in marks if first <= step <= last],
    )


def _when(events: list[dict[str, Any]]) -> str | None:
    times = [event["time"] for event in events if isinstance(event.get("time"), (int, float))]
    if not times:
        return None
    begun, ended = (datetime.fromtimestamp(moment, UTC) for moment in (min(times), max(times)))
    return (
        f"{begun:%Y-%m-%d %H:%M} to {ended:%H:%M} UTC"
        if begun.date() == ended.date()
        else (f"{begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC")
    )


def _rows(table: dict[str, Any], columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per version with every column, None where it was not measured."""
    return [{"version": name, **{column: table[name].get(column) for column in columns}} for name in in_order(table)]


def _core_table(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    columns = (
        "hook", "hook_out", "architecture", "d_sae",
        "fvu", "l0", "dead_fraction", "ce_clean", "ce_sae", "ce_mean_ablation", "ce_zero_ablation",
        "ce_recovered_mean", "ce_recovered_zero",
    )  # fmt: skip
    return _rows(measured(evaluation, "core"), columns)


def _detection_table(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    columns = ("auroc", "low", "high", "shuffled", "shuffled_low", "shuffled_high", "n_latents")
    return _rows(measured(evaluation, "detection"), columns)


def _calibration_modes(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    columns = ("auroc", "low", "high", "false_positive_rate", "false_negative_rate", "n")
    return _rows(measured(calibration, "modes"), columns)


def _paired(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Paired differences with their place, in percent, on an axis that is symmetric around 0."""
    pairs = [
        {name: pair.get(name) for name in ("name", "difference", "low", "high", "n")}
        for pair in evaluation.get("paired") or []
    ]
    reach = max(
        (abs(pair[key]) for pair in pairs for key in ("difference", "low", "high") if pair[key] is not None),
        default=0,
    )
    reach = reach * 1.1 or 1.0
    for pair in pairs:
        pair["at"] = {
            key: None if pair[key] is None else 50 + 50 * pair[key] / reach for key in ("difference", "low", "high")
        }
    return pairs


class AurocAxis:
    """One AUROC axis for all interval bars of the page, so that bars compare by eye."""

    def __init__(self, floor: float):
        self.floor = floor
        self.ticks = [round(floor + 0.1 * i, 1) for i in range(round((1 - floor) / 0.1) + 1)]

    def at(self, value: float) -> float:
        """Place of an AUROC in percent from the left."""
        return round(100 * min(1.0, max(0.0, (value - self.floor) / (1 - self.floor))), 2)


def _auroc_axis(run: RunFiles, latents: list[Latent]) -> AurocAxis:
    rows = [*_detection_table(run.evaluation), *_calibration_modes(run.calibration)]
    values = [row.get(key) for row in rows for key in ("auroc", "low", "shuffled", "shuffled_low")]
    values += [
        value for latent in latents for score in latent.scores for value in (score.low, score.auroc, score.shuffled)
    ]
    lowest = min((value for value in values if value is not None), default=0.5)
    return AurocAxis(max(0.0, min(0.4, math.floor(lowest * 10) / 10)))


def _scatter(latents: list[Latent]) -> list[dict[str, Any]]:
    """Latents measured before and after: their place in the before-against-after plot."""
    found = []
    for latent in latents:
        aurocs = {score.version: score.auroc for score in latent.scores if score.auroc is not None}
        if "before" in aurocs and ("rlaif" in aurocs or "control" in aurocs):
            found.append(
                {
                    "latent": latent.latent,
                    **{name: aurocs.get(name) for name in ("before", "rlaif", "control")},
                }
            )
    return found


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested counters as (dotted name, value) pairs."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}{key}.")]
    shown = json.dumps(value) if isinstance(value, list) else value
    return [(prefix.rstrip("."), shown)]
