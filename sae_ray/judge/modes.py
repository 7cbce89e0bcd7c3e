"""From raw readings to a verdict. Pure.

`likelihood`: how much more likely the explanation is after this text than after no text: log p(e|text) - log p(e|no
text). The prior removes what common words gain. What a text gives to *every* phrase stays in: subtracting the gain of
two unrelated phrases cost 0.02 AUROC on planted items and two more readings of each text
(`benchmarks/judge_validity.md`).

`yes_no`: log P(Yes) - log P(No), the log-odds that the judge itself states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sae_ray.judge.prompts import Mode

NO_TEXT = ""


def needed(pairs: Sequence[tuple[str, str]], mode: Mode) -> list[tuple[str, str]]:
    """(text, explanation) readings that the verdicts of `pairs` are made of, without duplicates."""
    keys = dict.fromkeys(pairs)
    if mode == "likelihood":
        keys.update(dict.fromkeys((NO_TEXT, explanation) for _, explanation in pairs))
    return list(keys)


def verdict(
    text: str, explanation: str, mode: Mode, readings: Mapping[tuple[str, str], tuple[float, int] | None]
) -> float | None:
    """The verdict in nats, or None when a reading that it needs is missing."""
    if mode == "yes_no":
        reading = readings.get((text, explanation))
        return None if reading is None else reading[0]
    given, prior = readings.get((text, explanation)), readings.get((NO_TEXT, explanation))
    if given is None or prior is None:
        return None
    # A sum over the explanation's tokens: dividing by the number of words cost 0.08 AUROC on planted items that differ
    # in length (one to three words), by its root 0.02.
    return given[0] - prior[0]
