"""From raw readings to a verdict. Pure.

`likelihood`: how much more likely the explanation is after this text than after no text, beyond how much more likely
*any* phrase of the kind is: log p(e|text) - log p(e|no text) - the mean of the same over fixed distractors. The prior
removes what common words gain; the distractors remove what a text gives to every continuation.

`yes_no`: log P(Yes) - log P(No), the log-odds that the judge itself states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sae_ray.judge.prompts import DISTRACTORS, Mode

NO_TEXT = ""


def needed(pairs: Sequence[tuple[str, str]], mode: Mode) -> list[tuple[str, str]]:
    """(text, explanation) readings that the verdicts of `pairs` are made of, without duplicates."""
    keys = dict.fromkeys(pairs)
    if mode == "likelihood":
        for text, explanation in pairs:
            keys[NO_TEXT, explanation] = None
            keys.update(dict.fromkeys((text, each) for each in DISTRACTORS))
        keys.update(dict.fromkeys((NO_TEXT, each) for each in DISTRACTORS))
    return list(keys)


def verdict(
    text: str, explanation: str, mode: Mode, readings: Mapping[tuple[str, str], tuple[float, int] | None]
) -> float | None:
    """The verdict in nats, or None when a reading that it needs is missing."""
    if mode == "yes_no":
        reading = readings.get((text, explanation))
        return None if reading is None else reading[0]
    gain = _gain(text, explanation, readings)
    baseline = [_gain(text, each, readings) for each in DISTRACTORS]
    if gain is None or any(each is None for each in baseline):
        return None
    return gain - sum(each for each in baseline if each is not None) / len(baseline)


def _gain(text: str, explanation: str, readings: Mapping[tuple[str, str], tuple[float, int] | None]) -> float | None:
    """What the text adds to the explanation's log-probability, in nats.

    A sum over its tokens: dividing by the number of words cost 0.08 AUROC on planted items that differ in length (one
    to three words), by its root 0.02.
    """
    given, prior = readings.get((text, explanation)), readings.get((NO_TEXT, explanation))
    if given is None or prior is None:
        return None
    return given[0] - prior[0]
