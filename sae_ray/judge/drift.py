"""Does the judge still say what it said when it was calibrated? A few gold items are asked again during the run.

A replica that came back with other weights, a changed prompt, a full disk under a quantised model: each changes
verdicts without an error. The same engine on the same items repeats itself up to rounding (batch composition moves a
bfloat16 verdict a little), so the paired differences to calibration are compared, not AUROCs: 32 items see a change
that an AUROC of 32 items could not.

Two two-sided tests share each check's false-alarm rate: a signed-rank test (all verdicts moved one way) and a count of
differences beyond the tolerance (some moved, either way). Check k may spend `false_alarm / (k (k + 1))`, which sums to
`false_alarm` over a run of any length.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sae_ray.judge.calibration import Anchor, Calibration
from sae_ray.judge.prompts import Mode

# Asks the judge itself, past every cache: `lambda pairs, mode: client.score(pairs, mode, use_cache=False)`.
Ask = Callable[[Sequence[tuple[str, str]], Mode], Awaitable[Sequence[float | None]]]

# Fewer answered anchors than this say nothing either way.
_LEAST_ANCHORS = 8
# Share of differences beyond the tolerance that a judge which has not changed may show.
_ALLOWED_SHARE = 0.05


@dataclass(frozen=True)
class DriftReport:
    """One check. shift: mean of now - calibration, in nats; shift_sd: the same in standard deviations of the anchors'
    verdicts at calibration; largest: the largest difference; beyond: how many exceed `tolerance`; equal: how many are
    within it. p_shift, p_beyond: two-sided p values; `level` is what each was held against."""

    verdicts: int
    status: Literal["ok", "drifted", "unknown"]
    answered: int
    missing: int
    shift: float
    shift_sd: float
    largest: float
    equal: int
    beyond: int
    tolerance: float
    p_shift: float
    p_beyond: float
    level: float

    @property
    def summary(self) -> str:
        """One line for a log."""
        if self.status == "unknown":
            return f"drift check: only {self.answered} of {self.answered + self.missing} gold items were answered"
        return (
            f"judge {self.status} after {self.verdicts:,} verdicts: {self.equal} of {self.answered} gold items within "
            f"{self.tolerance:g} nats of calibration, mean shift {self.shift:+.3f} nats ({self.shift_sd:+.2f} sd), "
            f"largest {self.largest:.2f}; p {min(self.p_shift, self.p_beyond):.2g} against {self.level:.2g}"
        )


class DriftCheck:
    """Asks the calibration's anchors again every `every` verdicts.

    Args:
        calibration: what `calibrate` found; its `anchors` are the items and their verdicts then.
        every: verdicts between two checks.
        tolerance: nats within which a difference is rounding; a bfloat16 engine moves with the batch that a request
            falls into. The default is a guess: anchors asked again under the same load differed by 0.00.
        false_alarm: probability that a judge which has not changed is ever called drifted, all checks together.
    Raises:
        ValueError: the calibration carries no anchors (it was written by an older version).
    """

    def __init__(
        self, calibration: Calibration, every: int = 20_000, tolerance: float = 0.5, false_alarm: float = 0.01
    ) -> None:
        if not calibration.anchors:
            raise ValueError("this calibration carries no anchors to compare with; calibrate again")
        self._anchors: tuple[Anchor, ...] = calibration.anchors
        self._mode = calibration.mode
        self._every, self._tolerance, self._false_alarm = every, tolerance, false_alarm
        self._next = every
        self.reports: list[DriftReport] = []

    def due(self, verdicts: int) -> bool:
        """Whether a check is due after this many verdicts of the run."""
        return verdicts >= self._next

    async def check(self, ask: Ask, verdicts: int) -> DriftReport:
        """Asks all anchors once and compares. `verdicts`: how many the run has had, for the report and the schedule."""
        self._next = (verdicts // self._every + 1) * self._every
        now = await ask([(anchor.text, anchor.explanation) for anchor in self._anchors], self._mode)
        k = len(self.reports) + 1
        level = self._false_alarm / (k * (k + 1))
        report = compare([anchor.verdict for anchor in self._anchors], now, self._tolerance, level, verdicts)
        self.reports.append(report)
        return report


def compare(
    before: Sequence[float], now: Sequence[float | None], tolerance: float, level: float, verdicts: int = 0
) -> DriftReport:
    """Paired comparison at false-alarm rate `level`; differences within `tolerance` count as none."""
    pairs = [(b, n) for b, n in zip(before, now, strict=True) if n is not None]
    missing = len(before) - len(pairs)
    if len(pairs) < _LEAST_ANCHORS:
        nan = math.nan
        return DriftReport(
            verdicts, "unknown", len(pairs), missing, nan, nan, nan, 0, 0, tolerance, nan, nan, level / 2
        )
    then_N, now_N = np.array(pairs, dtype=np.float64).T
    difference_N = now_N - then_N
    beyond = int((np.abs(difference_N) > tolerance).sum())
    p_shift = signed_rank_p(np.where(np.abs(difference_N) > tolerance, difference_N, 0.0))
    p_beyond = binomial_tail(beyond, len(pairs), _ALLOWED_SHARE)
    shift = float(difference_N.mean())
    spread = float(then_N.std(ddof=1))
    return DriftReport(
        verdicts=verdicts,
        status="drifted" if min(p_shift, p_beyond) <= level / 2 else "ok",
        answered=len(pairs),
        missing=missing,
        shift=shift,
        shift_sd=shift / spread if spread > 0 else math.nan,
        largest=float(np.abs(difference_N).max()),
        equal=len(pairs) - beyond,
        beyond=beyond,
        tolerance=tolerance,
        p_shift=p_shift,
        p_beyond=p_beyond,
        level=level / 2,
    )


def signed_rank_p(differences: np.ndarray) -> float:
    """Exact two-sided p value of Wilcoxon's signed-rank test; zeros are left out, ties share their mean rank.

    Reference: Wilcoxon, Biometrics Bulletin 1 (1945); the null distribution by convolution, ranks doubled to integers.
    """
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return 1.0
    size = np.abs(nonzero)
    # Twice the mean rank: smaller ones below, half of the equal ones.
    double_N = np.array([(size < s).sum() * 2 + (size == s).sum() + 1 for s in size], dtype=np.int64)
    total = int(double_N.sum())
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in double_N:
        shifted = np.zeros_like(ways)
        shifted[rank:] = ways[: total + 1 - rank]
        ways = (ways + shifted) / 2
    least = int(min(double_N[nonzero > 0].sum(), double_N[nonzero < 0].sum()))
    return float(min(1.0, 2 * ways[: least + 1].sum()))


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """P(at least `successes` of `trials`)."""
    return float(
        sum(math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(successes, trials + 1))
    )
