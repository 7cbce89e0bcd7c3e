"""What the numbers of a run say, in words that they support and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_ray.report.formats import fixed, interval, number, percent, signed
from sae_ray.report.run_files import RunFiles

LABELS = {
    "before": "before RLAIF",
    "rlaif": "RLAIF",
    "control": "control",
    "random_directions": "random directions",
}
CARD_LABELS = {"before": "before"}  # a card has little room
ORDER = list(LABELS)
LEVEL = "95% interval"


@dataclass(frozen=True)
class Conclusion:
    """Did feedback beat more training? `status` is better, worse, undecided or unknown."""

    status: str
    word: str
    sentence: str
    support: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Card:
    """One headline number, and beside it the same number of the other versions."""

    label: str
    value: str
    hint: str
    rows: list[tuple[str, str]] = field(default_factory=list)  # (version, value)
    wide: bool = False


def version_label(version: str) -> str:
    return LABELS.get(version, version)


def in_order(versions: Mapping[str, Any]) -> list[str]:
    """Version names, the known ones first and in the order of a run."""
    return sorted(versions, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def measured(evaluation: dict[str, Any], table: str) -> dict[str, dict[str, Any]]:
    """The versions of one of the evaluation's tables that hold anything."""
    return {name: row for name, row in (evaluation.get(table) or {}).items() if row}


def latest_version(versions: Mapping[str, Any]) -> str | None:
    """The version that the run is about: RLAIF's where there is one."""
    return next((name for name in ("rlaif", "before", "control") if name in versions), None)


def conclude(run: RunFiles) -> Conclusion:
    """The run's answer to its own question, from the paired difference and its interval."""
    support = [*_against_nulls(run.evaluation), *_reconstruction_cost(run.evaluation)]
    pairs = {pair.get("name"): pair for pair in run.evaluation.get("paired") or []}
    pair = pairs.get("rlaif - control")
    if pair is not None and None not in (pair.get("difference"), pair.get("low"), pair.get("high")):
        return _from_pair(pair, support)
    if not run.evaluation:
        sentence = "This run has not been evaluated, so nothing can be said yet about what the feedback did."
        return Conclusion("unknown", "Not evaluated", sentence)
    if not run.config.rlaif.enabled:
        return Conclusion("unknown", "No RLAIF", "This run trained for reconstruction only.", support)
    sentence = (
        "Whether RLAIF beat continued training is unknown: there is no measured difference to a control that "
        "trained on the same batches without rewards."
    )
    before = pairs.get("rlaif - before")
    if before is not None and before.get("difference") is not None:
        change = f"{signed(before['difference'])} ({LEVEL} {interval(before.get('low'), before.get('high'))})"
        support.insert(
            0,
            f"Since the start of the RLAIF phase, held-out detection AUROC moved by {change}, which mixes the "
            "rewards with the extra steps.",
        )
    return Conclusion("unknown", "Unknown", sentence, support)


def _from_pair(pair: dict[str, Any], support: list[str]) -> Conclusion:
    result = (
        f"held-out detection AUROC {signed(pair['difference'])} against the control "
        f"({LEVEL} {interval(pair['low'], pair['high'])}, {pair.get('n', '?')} latents, paired)"
    )
    if pair["low"] > 0:
        sentence = f"RLAIF beat continued training on the same batches: {result}."
        return Conclusion("better", "Better", sentence, support)
    if pair["high"] < 0:
        sentence = f"RLAIF did worse than continued training on the same batches: {result}."
        return Conclusion("worse", "Worse", sentence, support)
    sentence = (
        "This run does not show that RLAIF beats continued training on the same batches: "
        f"{result}; the interval includes 0."
    )
    return Conclusion("undecided", "Not shown", sentence, support)


def _against_nulls(evaluation: dict[str, Any]) -> list[str]:
    detection = measured(evaluation, "detection")
    version = latest_version(detection)
    if version is None or detection[version].get("auroc") is None:
        return []
    row = detection[version]
    subject = f"Explanations of the {version_label(version)} SAE" if version != "before" else "Explanations"
    text = f"{subject} find their latents' held-out texts at AUROC {fixed(row['auroc'])}"
    if row.get("shuffled") is not None:
        text += f", other latents' explanations at {fixed(row['shuffled'])}"
    random = detection.get("random_directions") or {}
    if random.get("auroc") is not None:
        text += f", explanations of random directions at {fixed(random['auroc'])}"
    low, high = row.get("low"), row.get("shuffled_high")
    if low is not None and high is not None:
        clear = low > high
        text += "; the intervals of the first two " + (
            "do not overlap" if clear else "overlap, so this is not clear of chance"
        )
    return [text + "."]


def _reconstruction_cost(evaluation: dict[str, Any]) -> list[str]:
    core = measured(evaluation, "core")
    ours, theirs = (core.get(name) or {} for name in ("rlaif", "control"))
    if not ours.get("fvu") or not theirs.get("fvu"):
        return []
    change = ours["fvu"] / theirs["fvu"] - 1
    text = f"Held-out FVU is {fixed(ours['fvu'])} with rewards and {fixed(theirs['fvu'])} without"
    size = f"{abs(100 * change):.1f}%"
    return [f"{text}: {size} {'worse' if change > 0 else 'better'}." if abs(change) >= 5e-4 else f"{text}: no cost."]


def cards(run: RunFiles) -> list[Card]:
    """The numbers that a reader looks for first; training batches stand in where nothing was evaluated."""
    variants = {variant.name for variant in run.config.saes}
    core = {name: row for name, row in measured(run.evaluation, "core").items() if name not in variants}
    detection = measured(run.evaluation, "detection")
    found: list[Card] = []
    for label, key, show, hint in (
        ("FVU", "fvu", fixed, "share of variance not explained, held-out tokens; lower is better"),
        ("L0", "l0", lambda value: number(value, 1), "active latents per token, held-out"),
        ("Dead latents", "dead_fraction", percent, "share of latents that never fire on the held-out tokens"),
        (
            "CE recovered",
            "ce_recovered_mean",
            percent,
            "of the loss that mean ablation adds; 100% is lossless",
        ),
    ):
        rows = {name: values.get(key) for name, values in core.items() if values.get(key) is not None}
        version = latest_version(rows)
        if version is not None:
            others = [(CARD_LABELS.get(name, name), show(rows[name])) for name in in_order(rows) if name != version]
            found.append(Card(label, show(rows[version]), hint, others))
        elif run.metrics and (last := _last(run.metrics, key)) is not None:
            found.append(Card(label, show(last), "last logged training batch; not held-out"))
    version = latest_version(detection)
    if version is not None:
        others = [
            (CARD_LABELS.get(name, name), f"{fixed(detection[name].get('auroc'))} ({_span(detection[name])})")
            for name in in_order(detection)
            if name != version and name != "random_directions"
        ]
        hint = f"AUROC of explanations on held-out texts; {LEVEL} {_span(detection[version])}"
        found.append(Card("Detection", fixed(detection[version].get("auroc")), hint, others, wide=True))
    mode = run.calibration.get("mode")
    judged = (run.calibration.get("modes") or {}).get(mode)
    if judged:
        hint = f"on planted items, mode {mode}; {LEVEL} {_span(judged)}"
        found.append(Card("Judge AUROC", fixed(judged.get("auroc")), hint))
    return found


def _span(row: dict[str, Any]) -> str:
    return interval(row.get("low"), row.get("high"), 2)


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)
