import json
import math

import numpy as np
import pytest

from sae_ray.reward.alarms import (
    DUPLICATES,
    FIRING_ENTROPY,
    HELD_OUT_GAP,
    RARITY,
    HackAlarms,
    Limits,
    Measured,
    gap_evidence,
)

LATENTS = 50


def measured(**changes) -> Measured:
    plain = {
        "train_score": 0.7, "held_out_score": 0.68, "gap_error": 0.01, "entropy_M": np.linspace(1, 5, LATENTS),
        "density_M": np.geomspace(1e-4, 1e-2, LATENTS), "duplicate_share": 0.01,
    }  # fmt: skip
    return Measured(**{**plain, **changes})


def alarm_of(report, name):
    return next(alarm for alarm in report.alarms if alarm.name == name)


def after_reference(**options) -> HackAlarms:
    alarms = HackAlarms(**options)
    for _ in range(2):
        assert alarms.update(measured()).state == "ok"
    return alarms


def test_nothing_changes_nothing():
    alarms = after_reference()
    for _ in range(30):
        report = alarms.update(measured())
    assert (report.state, report.factor) == ("ok", 1.0)


@pytest.mark.parametrize(
    ("name", "change", "severity"),
    [
        (FIRING_ENTROPY, {"entropy_M": np.linspace(1, 5, LATENTS) - 0.65}, 0.65),
        (DUPLICATES, {"duplicate_share": 0.07}, 0.06),
        (RARITY, {"density_M": np.geomspace(1e-4, 1e-2, LATENTS) / 2}, math.log(2)),
    ],
)
def test_a_level_between_its_limits_cools_gamma_in_proportion(name, change, severity):
    report = after_reference().update(measured(**change))
    alarm = alarm_of(report, name)
    assert alarm.severity == pytest.approx(severity)
    expected = (alarm.limits.stop - severity) / (alarm.limits.stop - alarm.limits.cool)
    assert report.factor == pytest.approx(expected)
    assert 0 < report.factor < 1
    assert [a.state for a in report.alarms if a.name != name] == ["ok"] * 3
    assert alarm.state == report.state == "cool"


def only(values: np.ndarray, known: slice) -> np.ndarray:
    out = np.full(LATENTS, np.nan)
    out[known] = values[known]
    return out


@pytest.mark.parametrize(("name", "key"), [(FIRING_ENTROPY, "entropy_M"), (RARITY, "density_M")])
def test_what_no_latent_tells_is_missing_and_neither_ok_nor_a_reference(name, key):
    values, nothing = getattr(measured(), key), np.full(LATENTS, np.nan)
    alarms = HackAlarms(reference_rounds=1)
    first = alarm_of(alarms.update(measured(**{key: nothing})), name)
    assert first.missing
    assert math.isnan(first.severity)
    assert not alarm_of(alarms.update(measured(**{key: only(values, slice(0, 20))})), name).missing  # the reference
    for unknown in (nothing, only(values, slice(20, 50))):  # nobody, or none that the reference knows
        assert alarm_of(alarms.update(measured(**{key: unknown})), name).missing
    later = alarm_of(alarms.update(measured(**{key: only(values, slice(10, 50)) / 9})), name)
    assert (later.missing, later.state) == (False, "stop")


@pytest.mark.parametrize(
    "change",
    [
        {"entropy_M": np.zeros(LATENTS)},
        {"duplicate_share": 0.2},
        {"density_M": np.geomspace(1e-4, 1e-2, LATENTS) / 10},
        {"density_M": np.zeros(LATENTS)},
    ],
)
def test_a_stop_stays_until_somebody_resets_it(change):
    alarms = after_reference()
    assert (alarms.update(measured(**change)).state, alarms.update(measured()).factor) == ("stop", 0)
    assert alarms.update(measured()).state == "stop"
    alarms.reset()
    assert alarms.update(measured()).state == "ok"


def test_a_training_judge_that_rises_alone_is_found_and_a_rise_of_both_is_not():
    both, alone = after_reference(), after_reference()
    states = []
    for round_ in range(1, 16):
        gain = 0.01 * round_
        report = both.update(measured(train_score=0.7 + gain, held_out_score=0.68 + gain))
        assert report.state == "ok"
        states.append(alone.update(measured(train_score=0.7 + gain)).state)
    assert states[0] == "ok"
    assert states[-1] == "stop"
    assert states.index("cool") < states.index("stop") <= 8


def test_one_freak_round_does_not_stop_a_run():
    alarms = after_reference()
    assert alarms.update(measured(train_score=1.0)).state == "cool"
    for _ in range(10):
        report = alarms.update(measured())
    assert report.state == "ok"


def test_false_alarms_of_the_gap_are_as_rare_as_promised():
    """Rounds until the first alarm of a gap that has not grown, the reference being as noisy as the rest."""
    rng = np.random.default_rng(0)
    alarmed = 0
    for _ in range(300):
        noise = rng.normal(0, 0.02, 52)
        severity, reference = 0.0, np.array([[gap, 0.02] for gap in noise[:2]])
        for gap in noise[2:]:
            severity = max(0.0, severity) + gap_evidence(np.array([gap, 0.02]), reference, 0.0)
            if severity >= math.log(1000):
                alarmed += 1
                break
    # At least 1,000 rounds on average: at most about 50 in 1,000 within 50 rounds, and the cut z makes it rarer.
    assert alarmed / 300 <= 0.05


def test_the_factor_comes_back_slowly():
    alarms = after_reference(recovery=0.25)
    low = alarms.update(measured(duplicate_share=0.09)).factor
    assert low == pytest.approx(0.25)
    factors = [alarms.update(measured()).factor for _ in range(4)]
    assert factors == pytest.approx([0.5, 0.75, 1.0, 1.0])


def test_what_is_not_measured_leaves_its_alarm_as_it_was():
    alarms = after_reference()
    alarms.update(measured(duplicate_share=0.07))
    report = alarms.update(Measured())
    assert all(alarm.missing for alarm in report.alarms)
    assert alarm_of(report, DUPLICATES).state == "cool"
    assert math.isnan(alarm_of(HackAlarms().update(Measured()), HELD_OUT_GAP).severity)


def test_latents_that_never_fired_say_nothing_and_dead_ones_are_rare():
    density = np.geomspace(1e-4, 1e-2, LATENTS)
    density[:10] = 0
    alarms = HackAlarms()
    for _ in range(2):
        alarms.update(measured(density_M=density))
    assert alarms.update(measured(density_M=density)).state == "ok"
    gone = density.copy()
    gone[20:] = 0
    assert alarm_of(alarms.update(measured(density_M=gone)), RARITY).state == "stop"


def test_a_resumed_run_goes_on_with_the_same_alarms():
    alarms = after_reference()
    alarms.update(measured(train_score=0.74, duplicate_share=0.05))
    other = HackAlarms()
    other.load_state(json.loads(json.dumps(alarms.state_dict())))
    for change in ({"train_score": 0.75}, {"duplicate_share": 0.08}, {"entropy_M": np.linspace(0, 4, LATENTS)}):
        assert alarms.update(measured(**change)).log() == other.update(measured(**change)).log()


def test_other_latents_than_the_references_are_refused():
    with pytest.raises(ValueError, match="not the same"):
        after_reference().update(measured(entropy_M=np.ones(3)))


def test_limits_are_checked():
    with pytest.raises(ValueError, match="cool < stop"):
        Limits(2, 1)
    with pytest.raises(ValueError, match="no such alarm"):
        HackAlarms({"boredom": Limits(1, 2)})
