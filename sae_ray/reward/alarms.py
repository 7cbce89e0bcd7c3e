"""Hack alarms: signs that a rising reward is the judge's weakness and not the features' merit.

    held_out_gap     training judge's score minus the held-out judge's, grown since the reference rounds
    firing_entropy   latents fire on fewer different tokens (median fall of the entropy, nats)
    duplicates       share of latents with a near twin has grown
    rarity           latents have become rare (median of ln(density then / density now))

Each has a cool limit and a stop limit on its severity. Between them gamma is multiplied by a factor that falls from 1
to 0; at the stop limit it is 0, and stays so until a person resets the alarms. After cooling, the factor rises again
by at most `recovery` per round, so that gamma does not swing.

The gap is noisy, so it is tested sequentially. With z = (gap - (reference + 1.645 of its errors) - tolerance) / error
of round t,

    severity_t = max(0, severity_{t-1}) + z - 1/2

is the logarithm of a CUSUM e-detector for Gaussian noise (bet 1): while the gap has not grown, the expected number of
rounds until it first exceeds ln(R) is at least R, at any time and without fixing the number of rounds beforehand.
Reference: Shin, Ramdas & Rinaldo, "E-detectors", 2203.03532; Page 1954.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

State = Literal["ok", "cool", "stop"]
HELD_OUT_GAP, FIRING_ENTROPY, DUPLICATES, RARITY = "held_out_gap", "firing_entropy", "duplicates", "rarity"


@dataclass(frozen=True)
class Limits:
    """On a severity: from `cool` on gamma falls, at `stop` it is 0."""

    cool: float
    stop: float

    def __post_init__(self) -> None:
        if not 0 < self.cool < self.stop:
            raise ValueError(f"limits must be 0 < cool < stop, not {self.cool} and {self.stop}")

    def state(self, severity: float) -> State:
        return "stop" if severity >= self.stop else "cool" if severity >= self.cool else "ok"

    def factor(self, severity: float) -> float:
        return float(np.clip((self.stop - severity) / (self.stop - self.cool), 0, 1))


DEFAULT_LIMITS: dict[str, Limits] = {
    HELD_OUT_GAP: Limits(math.log(20), math.log(1000)),  # one false alarm in at least 20, or 1000, rounds
    FIRING_ENTROPY: Limits(0.3, 1.0),
    DUPLICATES: Limits(0.02, 0.1),
    RARITY: Limits(math.log(1.5), math.log(3)),
}


@dataclass(frozen=True)
class Measured:
    """What a round knows; None, or NaN for all latents, is missing and leaves that alarm as it was.

    train_score, held_out_score: mean scores of the same latents' explanations by either judge, or any measure that is
    the same in all rounds. gap_error: standard error of their difference, paired over latents. entropy_M: of each
    latent's firings over token ids, nats, NaN where it did not fire; density_M: share of tokens; of the same latents
    in the same order in every round. duplicate_share: of latents whose decoder row has a near twin.
    """

    train_score: float | None = None
    held_out_score: float | None = None
    gap_error: float | None = None
    entropy_M: np.ndarray | None = None
    density_M: np.ndarray | None = None
    duplicate_share: float | None = None


@dataclass(frozen=True)
class Alarm:
    """severity: in the units of its limits; NaN before it was first measured. missing: not measured this round."""

    name: str
    state: State
    severity: float
    limits: Limits
    factor: float
    missing: bool


@dataclass(frozen=True)
class AlarmReport:
    """state: the worst. factor: what gamma is to be multiplied by."""

    alarms: tuple[Alarm, ...]
    state: State
    factor: float

    def log(self) -> dict[str, float]:
        out = {f"alarm/{alarm.name}": alarm.severity for alarm in self.alarms}
        return out | {"alarm/gamma_factor": self.factor}


class HackAlarms:
    """All alarms of a run. The first `reference_rounds` rounds are the reference and raise none.

    Args:
        limits: replaces the default limits of the alarms that it names.
        gap_tolerance: growth of the gap, in units of the score, that is not yet suspicious.
        recovery: most that the factor may rise per round.
    """

    def __init__(
        self,
        limits: Mapping[str, Limits] | None = None,
        reference_rounds: int = 2,
        gap_tolerance: float = 0.01,
        recovery: float = 0.25,
    ) -> None:
        if unknown := set(limits or {}) - set(DEFAULT_LIMITS):
            raise ValueError(f"no such alarm: {', '.join(sorted(unknown))}; known: {', '.join(DEFAULT_LIMITS)}")
        if reference_rounds < 1:
            raise ValueError(f"reference_rounds {reference_rounds}: at least one round must be the reference")
        self.limits = {**DEFAULT_LIMITS, **(limits or {})}
        self._reference_rounds, self._tolerance, self._recovery = reference_rounds, gap_tolerance, recovery
        self.reset()

    def reset(self) -> None:
        """Forget the references and any stop: the next rounds are the new reference."""
        self._references: dict[str, list[Any]] = {name: [] for name in DEFAULT_LIMITS}
        self._severity: dict[str, float] = {}
        self._stopped = False
        self._factor = 1.0

    def update(self, measured: Measured) -> AlarmReport:
        """Takes in one round and says how gamma is to be cooled."""
        values: dict[str, Any] = {
            HELD_OUT_GAP: self._gap_of(measured),
            FIRING_ENTROPY: measured.entropy_M,
            DUPLICATES: _known(measured.duplicate_share),
            RARITY: measured.density_M,
        }
        alarms = []
        for name, value in values.items():
            missing = value is None or not self._take_in(name, value)
            severity = self._severity.get(name, math.nan)
            limits = self.limits[name]
            known = math.isfinite(severity)
            alarms.append(
                Alarm(
                    name,
                    limits.state(severity) if known else "ok",
                    severity,
                    limits,
                    limits.factor(severity) if known else 1.0,
                    missing,
                )
            )
        self._stopped = self._stopped or any(alarm.state == "stop" for alarm in alarms)
        wanted = 0.0 if self._stopped else min(alarm.factor for alarm in alarms)
        self._factor = min(wanted, self._factor + self._recovery)
        cooled = self._factor < 1 or any(alarm.state == "cool" for alarm in alarms)
        return AlarmReport(tuple(alarms), "stop" if self._stopped else "cool" if cooled else "ok", self._factor)

    def state_dict(self) -> dict[str, Any]:
        """Lists and numbers only."""
        return {
            "references": {
                name: [np.asarray(value, dtype=np.float64).tolist() for value in some]
                for name, some in self._references.items()
            },
            "severity": dict(self._severity),
            "stopped": self._stopped,
            "factor": self._factor,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.reset()
        for name, some in state["references"].items():
            arrays = [np.array(value) for value in some]
            self._references[name] = arrays
        self._severity = {name: float(value) for name, value in state["severity"].items()}
        self._stopped, self._factor = bool(state["stopped"]), float(state["factor"])

    def _gap_of(self, measured: Measured) -> np.ndarray | None:
        train, held_out = _known(measured.train_score), _known(measured.held_out_score)
        error = _known(measured.gap_error)
        if train is None or held_out is None or error is None:
            return None
        return np.array([train - held_out, max(error, 1e-9)])

    def _take_in(self, name: str, value: Any) -> bool:
        """Whether that told anything: no latent that is known, now or in the reference, is no news and no reference."""
        reference = self._references[name]
        if np.isnan(value).all():
            return False
        if len(reference) < self._reference_rounds:
            reference.append(value)
            self._severity[name] = 0.0
        elif name == HELD_OUT_GAP:
            before = max(0.0, self._severity[name])
            self._severity[name] = before + gap_evidence(value, np.array(reference), self._tolerance)
        elif name == DUPLICATES:
            self._severity[name] = float(value) - float(np.mean(reference))
        elif name == FIRING_ENTROPY:
            return self._keep(name, median_fall(reference_mean(reference), value))
        else:
            then_M = reference_mean(reference)
            with np.errstate(divide="ignore", invalid="ignore"):
                # A latent that has died has become infinitely rare; one that never fired says nothing.
                then_M, now_M = np.log(np.where(then_M > 0, then_M, np.nan)), np.log(value)
            return self._keep(name, median_fall(then_M, now_M))
        return True

    def _keep(self, name: str, severity: float) -> bool:
        """NaN: no latent can be compared, so nothing is known anew. Infinity is a stop."""
        if math.isnan(severity):
            return False
        self._severity[name] = min(severity, 1e6)
        return True


def gap_evidence(gap: np.ndarray, reference: np.ndarray, tolerance: float) -> float:
    """What one round's (gap, standard error) adds to the log e-detector.

    Args:
        reference: (gap, standard error) of the reference rounds, [R, 2].
    """
    centre = float(reference[:, 0].mean())
    error = float(np.sqrt((reference[:, 1] ** 2).sum()) / len(reference))
    # The reference's own error is common to all later rounds: its upper end is used once and for all.
    z = (float(gap[0]) - (centre + 1.645 * error) - tolerance) / float(gap[1])
    # One freak round may not stop a run alone: half of ln(1000).
    return min(z - 0.5, 3.45)


def median_fall(then_M: np.ndarray, now_M: np.ndarray) -> float:
    """Median over latents of then - now; latents that are NaN on either side are left out. NaN: none is left."""
    if then_M.shape != now_M.shape:
        raise ValueError(f"{now_M.shape[0]} latents now, {then_M.shape[0]} in the reference: not the same ones")
    fall_M = then_M - now_M
    fall_M = fall_M[~np.isnan(fall_M)]
    return float(np.median(fall_M)) if len(fall_M) else math.nan


def reference_mean(rounds: list[np.ndarray]) -> np.ndarray:
    """Per latent, over the rounds in which it is known."""
    stacked_RM = np.stack([np.asarray(values, dtype=np.float64) for values in rounds])
    known_RM = ~np.isnan(stacked_RM)
    count_M = known_RM.sum(axis=0)
    total_M = np.where(known_RM, stacked_RM, 0).sum(axis=0)
    return np.divide(total_M, count_M, out=np.full(len(count_M), np.nan), where=count_M > 0)


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
