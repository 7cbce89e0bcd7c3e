"""Who is judged next, and when the money is spent."""

from __future__ import annotations

import pytest

from sae_ray.errors import UserError
from sae_ray.judging.run import Budget, Schedule, computed_tokens


def run_out(schedule: Schedule, error_of) -> list[tuple[str, tuple[int, ...], int]]:
    tasks = []
    while (task := schedule.next()) is not None:
        tasks.append(task)
        schedule.finished(task, {latent: error_of(latent, task[2]) for latent in task[1]})
    return tasks


def test_without_a_budget_every_latent_is_judged_once_on_all_its_texts():
    schedule = Schedule({"latent": [3, 5, 8], "random_direction": [0]}, {}, batch=2, most=20, widen=False)
    tasks = run_out(schedule, lambda latent, texts: 0.1)
    assert tasks == [("latent", (3, 5), 20), ("latent", (8,), 20), ("random_direction", (0,), 20)]
    assert (schedule.left, schedule.total) == (0, 4)


def test_what_is_committed_is_not_judged_again():
    done = {("latent", 3): (20, 0.1), ("latent", 5): (20, None)}
    schedule = Schedule({"latent": [3, 5, 8]}, done, batch=4, most=20, widen=False)
    assert run_out(schedule, lambda latent, texts: 0.1) == [("latent", (8,), 20)]


def test_a_budget_first_gives_everyone_a_little_and_then_the_widest_intervals_more():
    schedule = Schedule({"latent": [0, 1, 2, 3]}, {}, batch=2, most=20, widen=True)
    wide = {0: 0.05, 1: 0.3, 2: 0.2, 3: 0.1}
    tasks = run_out(schedule, lambda latent, texts: wide[latent] * (5 / texts) ** 0.5)
    assert tasks[:2] == [("latent", (0, 1), 5), ("latent", (2, 3), 5)]
    assert tasks[2] == ("latent", (1, 2), 10)
    assert tasks[3] == ("latent", (1, 2), 20)  # .21 and .14 are still wider than .1
    assert [texts for _, _, texts in tasks[4:]] == [10, 20]


def test_a_latent_whose_score_is_missing_counts_as_the_widest():
    done = {("latent", 0): (5, 0.2), ("latent", 1): (5, None)}
    schedule = Schedule({"latent": [0, 1]}, done, batch=1, most=10, widen=True)
    assert schedule.next() == ("latent", (1,), 10)


def test_two_batches_under_way_share_no_latent():
    schedule = Schedule({"latent": [0, 1, 2]}, {}, batch=2, most=20, widen=True)
    first, second = schedule.next(), schedule.next()
    assert first is not None
    assert second is not None
    assert not set(first[1]) & set(second[1])
    assert schedule.next() is None


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [
        ("30minutes", 1800, None),
        ("2h", 7200, None),
        ("90 s", 90, None),
        ("500000tokens", None, 500_000),
        ("1.5M tokens", None, 1_500_000),
    ],
)
def test_budgets_in_time_or_tokens_are_read(text, seconds, tokens):
    assert Budget.parse(text) == Budget(seconds, tokens)


@pytest.mark.parametrize("text", ["soon", "10", "-5minutes", "0tokens", "5 parsecs", "1.2.3h"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError, match="--budget"):
        Budget.parse(text)


def test_a_budget_counts_what_was_computed_not_what_was_cached():
    cost = {"prompt_tokens": 1000.0, "cached_tokens": 900.0, "output_tokens": 10.0}
    assert computed_tokens(cost) == 110
    assert not Budget(tokens=111).spent(0, cost)
    assert Budget(tokens=110).spent(0, cost)
    assert Budget(seconds=5).spent(5, {})
    assert not Budget()
