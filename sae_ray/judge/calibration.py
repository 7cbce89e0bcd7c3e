"""A judge is measured before it is believed: AUROC, noise rates and a map to probabilities, per mode.

Planted items (`planting.py`) have known answers. Half of the concepts choose the threshold and fit the Platt map, the
other half are what is reported. The mode with the higher held-out AUROC judges the run; a judge at chance stops it.
Each mode is measured on all items and on each kind apart: lexical, topical, and topical where the text holds no word
of the label.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from sae_ray.config import JudgeConfig
from sae_ray.errors import UserError
from sae_ray.judge.planting import KINDS, PlantedItem
from sae_ray.judge.prompts import MODES, PROMPT_VERSION, Mode
from sae_ray.judge.scores import Estimate, auroc, balanced_accuracy, best_threshold, platt

# Fewer answered items of a class than this say nothing about a mode.
_LEAST_ITEMS = 4
# Gold items, half positives, that a drift check asks again.
_ANCHORS = 32
# Beside the kinds of `planting.KINDS`: topical positives without a word of the label, against topical negatives.
UNNAMED = "unnamed"


class JudgeAtChance(UserError):
    """The judge does not tell planted positives from planted negatives; training on it would add noise."""


class Scorer(Protocol):
    """What calibration needs of `client.JudgeClient`."""

    async def score(self, pairs: Sequence[tuple[str, str]], mode: Mode) -> list[float | None]: ...

    async def modes(self) -> tuple[Mode, ...]:
        """Those that the judge can answer in."""
        ...


@dataclass(frozen=True)
class ModeCalibration:
    """One mode on planted items; rates and AUROC are of held-out items, threshold and Platt map of the others.

    `false_positive` and `false_negative` are at `threshold`; `platt_a`, `platt_b` map a verdict to
    P(shows it) = sigmoid(a v + b) where both answers are equally common; `missing` counts unanswered items.
    `even_false_positive` and `even_false_negative` are of verdicts that are yes from P = 1/2 on, which is not at
    `threshold`; None in files of versions that did not measure them.
    `background` is the mean verdict of negatives: where a verdict stands when a text has nothing to do with it.
    `kinds`: the same on items of one kind ("lexical", "topical", "unnamed"), where there are enough of them.
    """

    mode: Mode
    auroc: Estimate
    threshold: float
    false_positive: float
    false_negative: float
    platt_a: float
    platt_b: float
    background: float
    items: int
    missing: int
    seconds: float
    kinds: Mapping[str, ModeCalibration] = field(default_factory=dict)
    even_false_positive: float | None = None
    even_false_negative: float | None = None

    @property
    def rates_at_half(self) -> tuple[float, float]:
        """(false positive, false negative) of verdicts taken at probability 1/2; at `threshold` if that is all there
        is."""
        if self.even_false_positive is None or self.even_false_negative is None:
            return self.false_positive, self.false_negative
        return self.even_false_positive, self.even_false_negative

    @property
    def balanced_accuracy(self) -> float:
        return 1 - (self.false_positive + self.false_negative) / 2

    def probability(self, verdict: float) -> float:
        """P(the text shows it | verdict), both answers equally common beforehand."""
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.platt_a * verdict + self.platt_b))))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModeCalibration:
        kinds = {kind: cls.from_dict(each) for kind, each in raw.get("kinds", {}).items()}
        return cls(**{**raw, "auroc": Estimate(**raw["auroc"]), "kinds": kinds})


@dataclass(frozen=True)
class Anchor:
    """A gold item and the verdict it had at calibration, in nats: what `drift.DriftCheck` compares with."""

    text: str
    explanation: str
    verdict: float


@dataclass(frozen=True)
class Calibration:
    """What was measured, the mode that it picks, and that mode's anchors."""

    mode: Mode
    modes: Mapping[Mode, ModeCalibration]
    prompt_version: str = PROMPT_VERSION
    anchors: tuple[Anchor, ...] = ()

    @property
    def chosen(self) -> ModeCalibration:
        return self.modes[self.mode]

    def probability(self, verdict: float) -> float:
        return self.chosen.probability(verdict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Calibration:
        modes = {name: ModeCalibration.from_dict(each) for name, each in raw["modes"].items()}
        anchors = tuple(Anchor(**each) for each in raw.get("anchors", ()))
        return cls(raw["mode"], modes, raw["prompt_version"], anchors)


async def calibrate(client: Scorer, items: Sequence[PlantedItem], cfg: JudgeConfig) -> Calibration:
    """Ask the judge about planted items in each mode that `cfg.mode` allows, and pick one.

    Raises:
        JudgeAtChance: no allowed mode's AUROC is above chance with its interval and at least
            `judge.calibration.min_auroc`.
    """
    offered = await client.modes()
    wanted: Sequence[Mode] = [mode for mode in MODES if mode in offered] if cfg.mode == "auto" else (cfg.mode,)
    measured: dict[Mode, ModeCalibration] = {}
    answers: dict[Mode, list[float | None]] = {}
    for mode in wanted:
        started = time.monotonic()
        verdicts = await client.score([(item.text, item.explanation) for item in items], mode)
        found = measure(mode, items, verdicts, time.monotonic() - started)
        if found is not None:
            measured[mode], answers[mode] = found, verdicts
    chosen = choose(measured, cfg)
    return replace(chosen, anchors=anchors_of(items, answers[chosen.mode]))


def anchors_of(
    items: Sequence[PlantedItem], verdicts: Sequence[float | None], wanted: int = _ANCHORS
) -> tuple[Anchor, ...]:
    """Up to `wanted` answered items spread evenly over all, half of them positives."""
    anchors: list[Anchor] = []
    for positive in (True, False):
        pairs = [(i, v) for i, v in zip(items, verdicts, strict=True) if i.positive == positive and v is not None]
        places = np.linspace(0, len(pairs) - 1, min(wanted // 2, len(pairs))).astype(int)
        anchors += [Anchor(pairs[at][0].text, pairs[at][0].explanation, pairs[at][1]) for at in places]
    return tuple(anchors)


def measure(
    mode: Mode, items: Sequence[PlantedItem], verdicts: Sequence[float | None], seconds: float
) -> ModeCalibration | None:
    """One mode's calibration from its verdicts, overall and by kind; None when too few were answered."""
    overall = _measure(mode, items, verdicts, seconds)
    if overall is None:
        return None
    share = seconds / max(1, len(items))
    kinds: dict[str, ModeCalibration] = {}
    for kind in (*KINDS, UNNAMED):
        pairs = [pair for pair in zip(items, verdicts, strict=True) if _is_of(pair[0], kind)]
        found = _measure(mode, [item for item, _ in pairs], [verdict for _, verdict in pairs], share * len(pairs))
        if found is not None:
            kinds[kind] = found
    return replace(overall, kinds=kinds)


def _is_of(item: PlantedItem, kind: str) -> bool:
    if kind == UNNAMED:
        return item.kind == "topical" and not item.named
    return item.kind == kind


def _measure(
    mode: Mode, items: Sequence[PlantedItem], verdicts: Sequence[float | None], seconds: float
) -> ModeCalibration | None:
    split: dict[tuple[bool, bool], list[float]] = {(h, p): [] for h in (False, True) for p in (False, True)}
    for item, verdict in zip(items, verdicts, strict=True):
        if verdict is not None:
            split[item.held_out, item.positive].append(verdict)
    if min(len(values) for values in split.values()) < _LEAST_ITEMS:
        return None
    fit_pos, fit_neg, held_pos, held_neg = (
        split[key] for key in ((False, True), (False, False), (True, True), (True, False))
    )
    threshold = best_threshold(fit_pos, fit_neg)
    _, false_positive, false_negative = balanced_accuracy(held_pos, held_neg, threshold)
    a, b = platt(fit_pos, fit_neg)
    # The map itself is asked, not its -b/a: it may lie flat, or fall.
    yes_pos, yes_neg = ([a * verdict + b >= 0 for verdict in side] for side in (held_pos, held_neg))
    return ModeCalibration(
        mode,
        auroc(held_pos, held_neg),
        threshold,
        false_positive,
        false_negative,
        a,
        b,
        background=sum(fit_neg) / len(fit_neg),
        items=len(held_pos) + len(held_neg),
        missing=sum(v is None for v in verdicts),
        seconds=seconds,
        even_false_positive=yes_neg.count(True) / len(yes_neg),
        even_false_negative=yes_pos.count(False) / len(yes_pos),
    )


def choose(measured: Mapping[Mode, ModeCalibration], cfg: JudgeConfig) -> Calibration:
    """The mode of the highest AUROC, if that is above chance."""
    if not measured:
        raise JudgeAtChance(
            f"judge.model {cfg.model}: answered too few of the planted items to be calibrated; see the judge's log"
        )
    best = max(measured.values(), key=lambda each: each.auroc.value)
    least = cfg.calibration.min_auroc
    if best.auroc.low <= 0.5 or best.auroc.value < least:
        told = "; ".join(
            f"{each.mode} AUROC {each.auroc.value:.2f} [{each.auroc.low:.2f}, {each.auroc.high:.2f}]"
            for each in measured.values()
        )
        raise JudgeAtChance(
            f"judge.model {cfg.model} is at chance on {best.items} planted items: {told}; above 0.50 with its interval "
            f"and at least judge.calibration.min_auroc {least:.2f} is needed: use a stronger judge"
        )
    return Calibration(best.mode, dict(measured))
