"""How many producers there are: a model of the loop, second by second, decides nothing itself."""

from __future__ import annotations

import itertools
import math

import pytest

from sae_ray.activations.scaling import REMEMBER_S, ProducerScaling, Seen, Shares


def live(scaling: ProducerScaling, need: float, start: int, seconds: int, begin: int = 0) -> list[int]:
    """The number of producers each second, of a trainer that `need` producers' blocks keep exactly busy.

    With fewer it starves for the share that lacks; with more, what is left over is idle.
    """
    ready, found = start, []
    owed = 0.0
    for second in range(begin, begin + seconds):
        owed += max(0.0, 1 - ready / need)
        starves = owed >= 1
        owed -= starves
        idle = max(0, math.floor(ready - need))
        scaling.observe(Seen("starves" if starves else "trains", ready, idle), second)
        ready = scaling.wanted()
        found.append(ready)
    return found


def test_producers_are_added_until_the_trainer_is_busy_and_no_further() -> None:
    numbers = live(ProducerScaling(1, 8), need=5, start=1, seconds=300)
    assert numbers[-1] == 5
    assert sorted(numbers) == numbers, "it never took back what it had added"
    # It doubles at most, and looks for half a minute in between.
    assert [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]] == [1, 2, 4, 5]


def test_the_limits_hold() -> None:
    assert max(live(ProducerScaling(1, 3), need=5, start=1, seconds=300)) == 3
    assert min(live(ProducerScaling(2, 8), need=0.5, start=6, seconds=2000)) == 2


def test_idle_producers_go_one_by_one_and_slowly() -> None:
    numbers = live(ProducerScaling(1, 8), need=2, start=6, seconds=600)
    drops = [i for i in range(1, len(numbers)) if numbers[i] < numbers[i - 1]]
    assert all(numbers[i] == numbers[i - 1] - 1 for i in drops)
    assert min(b - a for a, b in itertools.pairwise(drops)) >= 60
    # One producer's time to spare is not enough: the next slow block would starve the trainer.
    assert numbers[-1] == 3


@pytest.mark.parametrize("need", [1.5, 2.5, 2.96, 3.0, 3.04, 4.7])
def test_the_number_settles(need: float) -> None:
    """No to and fro: after a while it changes no more, although nothing is ever exactly right."""
    numbers = live(ProducerScaling(1, 8), need=need, start=1, seconds=1200)
    assert len(set(numbers[300:])) == 1
    assert numbers[-1] in (math.floor(need), math.ceil(need), math.ceil(need) + 1)


def test_a_number_that_starved_the_trainer_is_not_tried_again_at_once() -> None:
    scaling = ProducerScaling(1, 4)
    live(scaling, need=3, start=2, seconds=40)  # two are too few
    quiet = live(scaling, need=0.5, start=3, seconds=int(REMEMBER_S) - 60, begin=40)
    assert set(quiet) == {3}
    later = live(scaling, need=0.5, start=3, seconds=400, begin=40 + int(REMEMBER_S) - 60)
    assert later[-1] < 3


def test_more_producers_are_no_use_where_the_window_holds_them_back() -> None:
    scaling = ProducerScaling(1, 8)
    for second in range(100):
        scaling.observe(Seen("starves" if second % 2 else "trains", 4, 3), second)
        assert scaling.wanted() == 4
    assert "window_blocks" in scaling.total.told()


def test_waits_for_judges_move_nothing() -> None:
    scaling = ProducerScaling(1, 8)
    for second in range(1000):
        scaling.observe(Seen("elsewhere", 4, 4), second)
        assert scaling.wanted() == 4
    assert scaling.total.trainer_wait_share is None


def test_a_fixed_number_stays_whatever_waits() -> None:
    scaling = ProducerScaling(3, 3)
    for second in range(200):
        scaling.observe(Seen("starves", 3, 0), second)
        assert scaling.wanted() == 3
    assert scaling.total.trainer_wait_share == 1


def test_the_shares_are_those_of_the_seconds_that_were_seen() -> None:
    shares = Shares()
    shares.add(Seen("trains", 4, 1), 6.0)
    shares.add(Seen("starves", 2, 0), 2.0)
    shares.add(Seen("elsewhere", 4, 4), 100.0)
    assert shares.trainer_wait_share == pytest.approx(2 / 8)
    assert shares.producers_idle_share == pytest.approx(6 / (4 * 6 + 2 * 2))
    assert shares.told().startswith("the trainer waited for blocks 25.0% of its time, producers idled 21.4%")
