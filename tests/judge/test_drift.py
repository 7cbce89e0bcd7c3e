from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from sae_ray.judge.calibration import Anchor, Calibration
from sae_ray.judge.drift import DriftCheck, binomial_tail, compare, signed_rank_p

RNG = random.Random(0)
ANCHORS = tuple(Anchor(f"text {i}", f"label {i % 7}", RNG.gauss(0, 3)) for i in range(32))
CALIBRATION = Calibration("likelihood", {}, anchors=ANCHORS)


class Judge:
    """Says what it said at calibration, plus whatever `change` does to a verdict."""

    def __init__(self, change=lambda v: v) -> None:
        self.change, self.asked = change, 0
        self.before = {(a.text, a.explanation): a.verdict for a in ANCHORS}

    async def __call__(self, pairs: Sequence[tuple[str, str]], mode: str) -> list[float | None]:
        assert mode == "likelihood"
        self.asked += 1
        return [self.change(self.before[pair]) for pair in pairs]


def check(judge: Judge, checks: int = 1, **settings: float):
    drift = DriftCheck(CALIBRATION, **settings)
    for n in range(checks):
        asyncio.run(drift.check(judge, (n + 1) * 20_000))
    return drift.reports[-1]


def test_a_judge_that_repeats_itself_up_to_rounding_is_ok() -> None:
    rng = random.Random(1)
    report = check(Judge(lambda v: v + rng.uniform(-0.2, 0.2)))
    assert report.status == "ok"
    assert (report.equal, report.beyond, report.missing) == (32, 0, 0)
    assert report.p_shift == 1.0
    assert "judge ok after 20,000 verdicts: 32 of 32" in report.summary


def test_a_small_shift_of_every_verdict_is_seen() -> None:
    report = check(Judge(lambda v: v + 0.8))
    assert report.status == "drifted"
    assert report.shift == pytest.approx(0.8)
    assert report.shift_sd == pytest.approx(0.8 / np.std([a.verdict for a in ANCHORS], ddof=1))
    assert report.p_shift < report.level


def test_other_weights_that_leave_the_mean_alone_are_seen() -> None:
    rng = random.Random(2)
    report = check(Judge(lambda v: v + rng.choice([-2.0, 2.0])))
    assert abs(report.shift_sd) < 0.4
    assert report.status == "drifted"
    assert report.beyond == 32


def test_noise_within_what_is_allowed_raises_the_stated_rate_of_false_alarms_over_a_whole_run() -> None:
    """An engine whose repeats exceed the tolerance one time in 25, either way: 20 checks a run."""
    rng = np.random.default_rng(3)
    before = [a.verdict for a in ANCHORS]
    alarms, runs = 0, 60
    for _ in range(runs):
        drifted = False
        for k in range(1, 21):
            noise = np.where(rng.random(32) < 0.04, rng.choice([-1.0, 1.0], 32), 0.0)
            report = compare(before, list(np.array(before) + noise), 0.5, 0.1 / (k * (k + 1)))
            drifted |= report.status == "drifted"
        alarms += drifted
    assert alarms / runs <= 0.1


def test_missing_answers_are_no_evidence() -> None:
    report = check(Judge(lambda v: None))
    assert report.status == "unknown"
    assert report.missing == 32
    assert "0 of 32" in report.summary
    some = itertools.cycle([True, False])
    assert check(Judge(lambda v: v if next(some) else None)).answered == 16


def test_checks_come_every_so_many_verdicts_and_get_stricter() -> None:
    judge, drift = Judge(), DriftCheck(CALIBRATION, every=1000)
    asked_at = []
    for verdicts in range(0, 5000, 300):
        if drift.due(verdicts):
            asyncio.run(drift.check(judge, verdicts))
            asked_at.append(verdicts)
    assert asked_at == [1200, 2100, 3000, 4200]
    levels = [report.level for report in drift.reports]
    assert levels == sorted(levels, reverse=True)
    assert 2 * sum(levels) < 0.01


def test_a_calibration_without_anchors_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate again"):
        DriftCheck(Calibration("likelihood", {}))


@pytest.mark.parametrize("seed", range(5))
def test_the_signed_rank_p_value_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Integers: ties and zeros as well.
    differences = rng.integers(-4, 6, 9).astype(float)
    nonzero = differences[differences != 0]
    ranks = np.array([(np.abs(nonzero) < abs(d)).sum() + ((np.abs(nonzero) == abs(d)).sum() + 1) / 2 for d in nonzero])
    centre = ranks.sum() / 2
    seen = abs(ranks[nonzero > 0].sum() - centre)
    signs = np.array(list(itertools.product([0, 1], repeat=len(nonzero))))
    every = np.abs(signs @ ranks - centre)
    assert signed_rank_p(differences) == pytest.approx((every >= seen - 1e-9).mean())


def test_the_binomial_tail_adds_up() -> None:
    assert binomial_tail(0, 10, 0.3) == pytest.approx(1)
    assert binomial_tail(10, 10, 0.3) == pytest.approx(0.3**10)
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)
