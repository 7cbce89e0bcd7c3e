"""The arithmetic of the comparison with delphi, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from benchmark_scripts import load

judge_costs = load("judge_costs")


def counts(right: int, wrong: int, failed: int = 0) -> dict[str, int]:
    return {f"{side}_{name}": n for side in ("positive", "negative")
            for name, n in (("right", right), ("wrong", wrong), ("failed", failed))}  # fmt: skip


def peer(verdicts: dict[str, int]) -> dict[str, Any]:
    """Explaining takes a tenth of the prompt tokens and half of the seconds."""
    return {
        "peer": "delphi", "features": 2, "verdicts": {"detection": {"0": verdicts, "1": verdicts}},
        "seconds": 100.0, "cpu_seconds": 200.0, "engine_seconds": 80.0, "seconds_by_kind": {"explainer": 40.0},
        "calls": 20, "prompt_tokens": 1000, "cached_tokens": 400, "output_tokens": 60,
        "by_kind": {"explainer": {"calls": 2, "prompt_tokens": 100, "cached_tokens": 0, "output_tokens": 20}},
    }  # fmt: skip


OURS = {
    "features": 2, "seconds": 10.0, "prompt_tokens": 600, "cached_tokens": 500, "output_tokens": 9, "stderr": 0.2,
}  # fmt: skip


def test_four_times_the_verdicts_halve_the_error_and_explaining_is_paid_once() -> None:
    own = judge_costs.balanced(counts(10, 10))[1]
    row = judge_costs.at_error(peer(counts(10, 10)), "x", own, own / 2)
    assert row.stderr == own / 2
    assert row.prompt_tokens == (100 + 4 * 900) / 2
    assert row.uncached_tokens == (100 + 4 * 500) / 2
    assert row.seconds == pytest.approx((50 + 4 * 50) / 2)


def test_a_constant_answer_has_a_small_error_of_its_own_and_a_coins_by_its_number() -> None:
    constant = {"positive_right": 20, "negative_wrong": 20}
    value, own = judge_costs.balanced(constant)
    assert value == 0.5
    assert own < 0.04
    assert judge_costs.coin_error(constant) == pytest.approx(math.sqrt(0.25 / 20 + 0.25 / 20) / 2)
    assert judge_costs.said_yes(constant) == 1
    assert math.isnan(judge_costs.coin_error({"positive_right": 3}))


def test_lost_answers_count_only_where_it_is_said() -> None:
    few, many = judge_costs.balanced(counts(5, 5, failed=30)), judge_costs.balanced(counts(5, 5, 30), all_parsed=True)
    assert few[0] == many[0] == 0.5
    assert many[1] == pytest.approx(few[1] / 2)


def test_each_row_compares_errors_of_one_kind() -> None:
    constant = {"positive_right": 20, "negative_wrong": 20}
    ours = {**OURS, "verdicts": {"0": counts(20, 20), "1": counts(20, 20)}}
    mine, delphi, own, parsed, coin = judge_costs.costs(peer(constant), ours, "detection", None)
    assert mine.uncached_tokens == 50
    assert mine.stderr == judge_costs.balanced(counts(20, 20))[1]
    assert delphi.uncached_tokens == 300
    # 40 verdicts a class against its 20: as coins, delphi needs twice what it asked; as a constant, next to nothing.
    assert coin.prompt_tokens == pytest.approx((100 + 2 * 900) / 2)
    assert own.prompt_tokens < delphi.prompt_tokens / 2
    assert parsed.prompt_tokens == pytest.approx(own.prompt_tokens)


def test_without_our_verdicts_our_error_stands_for_all_kinds() -> None:
    rows = judge_costs.costs(peer(counts(10, 10)), OURS, "detection", None)
    assert [row.stderr for row in rows[2:]] == [0.2] * 3
    assert len(judge_costs.costs(peer(counts(10, 10)), None, "detection", None)) == 1
    assert len(judge_costs.costs(peer(counts(10, 10)), None, "detection", 0.1)) == 4
