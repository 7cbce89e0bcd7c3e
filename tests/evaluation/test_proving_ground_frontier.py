"""Methods are compared where they paid the same EV, and only between what was run."""

import math

import pytest

from sae_ray.evaluation.proving_ground_frontier import at_ev, undominated

PATH = [
    {"gamma": 0.0, "ev": 0.75, "f1": 0.70},
    {"gamma": 0.01, "ev": 0.74, "f1": 0.74},
    {"gamma": 0.03, "ev": 0.70, "f1": 0.80},
    {"gamma": 0.1, "ev": 0.50, "f1": 0.84},
]


@pytest.mark.parametrize(
    ("ev", "gamma", "f1"),
    [(0.75, 0.0, 0.70), (0.745, 0.005, 0.72), (0.74, 0.01, 0.74), (0.71, 0.025, 0.785), (0.5, 0.1, 0.84)],
)
def test_a_path_is_linear_between_its_points(ev, gamma, f1):
    found = at_ev(PATH, ev)
    assert found["ev"] == pytest.approx(ev)
    assert found["gamma"] == pytest.approx(gamma)
    assert found["f1"] == pytest.approx(f1)


def test_what_was_never_reached_is_missing_and_what_lies_beyond_the_last_gamma_is_not_guessed():
    assert all(math.isnan(value) for value in at_ev(PATH, 0.76).values())
    assert at_ev(PATH, 0.3) == PATH[-1]
    assert at_ev(PATH[:1], 0.7) == PATH[0]
    with pytest.raises(ValueError, match="at least one point"):
        at_ev([], 0.5)


def test_the_first_of_several_crossings_counts_so_that_no_metric_is_chosen_by_its_value():
    there_and_back = [*PATH[:3], {"gamma": 0.1, "ev": 0.74, "f1": 0.99}, {"gamma": 0.3, "ev": 0.6, "f1": 0.9}]
    assert at_ev(there_and_back, 0.72)["f1"] == pytest.approx(0.77)


def test_missing_metrics_stay_missing():
    path = [{"ev": 0.7, "absorption": math.nan}, {"ev": 0.6, "absorption": 0.1}]
    assert math.isnan(at_ev(path, 0.65)["absorption"])


def test_a_point_is_dominated_by_one_that_is_nowhere_worse_with_no_more_active_latents():
    point = {"l0": 8.0, "ev": 0.7, "f1": 0.8, "mcc": 0.8}
    better = {**point, "f1": 0.81}
    assert undominated([point], [better]) == []
    assert undominated([point], [{**better, "l0": 8.01}]) == []
    assert undominated([point], [{**better, "l0": 8.1}]) == [point]  # it may fire more
    assert undominated([point], [{**better, "ev": 0.69}]) == [point]  # it paid
    assert undominated([point], [point]) == [point]  # as good is not better
    assert undominated([point], [{**better, "mcc": math.nan}]) == [point]
