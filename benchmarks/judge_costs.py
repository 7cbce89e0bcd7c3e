"""What a feature costs each contender of `judge.py`, and what it would at an equal standard error. Pure."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """What one feature costs, and the standard error of its score that this buys (NaN: it has no score)."""

    name: str
    stderr: float
    calls: float
    prompt_tokens: float
    uncached_tokens: float
    output_tokens: float
    seconds: float
    cpu_seconds: float

    @property
    def per_minute(self) -> float:
        return 60 / self.seconds


def balanced(counts: dict[str, int], all_parsed: bool = False) -> tuple[float, float]:
    """(balanced accuracy, its standard error) of one latent's verdicts; NaN without a verdict of each class.

    all_parsed: the error at the same accuracy over every verdict asked for, lost ones included.
    """
    rates, variances = [], []
    for side in ("positive", "negative"):
        right, wrong = counts.get(f"{side}_right", 0), counts.get(f"{side}_wrong", 0)
        parsed = right + wrong
        rate = (right + 0.5) / (parsed + 1)
        n = parsed + counts.get(f"{side}_failed", 0) if all_parsed else parsed
        rates.append(right / parsed if parsed else math.nan)
        variances.append(rate * (1 - rate) / n if n else math.nan)
    return sum(rates) / 2, math.sqrt(sum(variances)) / 2


def coin_error(counts: dict[str, int]) -> float:
    """The standard error that the balanced accuracy of as many parsed verdicts has where each is a coin flip."""
    parsed = [counts.get(f"{side}_right", 0) + counts.get(f"{side}_wrong", 0) for side in ("positive", "negative")]
    return math.sqrt(sum(0.25 / n for n in parsed)) / 2 if all(parsed) else math.nan


def said_yes(counts: dict[str, int]) -> float:
    """The share of the parsed verdicts that are "yes"; NaN without any."""
    parsed = sum(count for name, count in counts.items() if not name.endswith("failed"))
    yes = counts.get("positive_right", 0) + counts.get("negative_wrong", 0)
    return yes / parsed if parsed else math.nan


def median(values: list[float]) -> float:
    """Of those that exist; NaN where none does."""
    there = [value for value in values if not math.isnan(value)]
    return statistics.median(there) if there else math.nan


def cost_of(name: str, counts: dict[str, Any], stderr: float) -> Cost:
    n = counts["features"]
    uncached = counts["prompt_tokens"] - counts["cached_tokens"]
    totals = (counts.get("calls", math.nan), counts["prompt_tokens"], uncached, counts["output_tokens"])
    cpu = counts.get("cpu_seconds", math.nan)
    return Cost(name, stderr, *(total / n for total in (*totals, counts["seconds"], cpu)))


def at_error(peer: dict[str, Any], name: str, own: float, wanted: float) -> Cost:
    """The peer's cost per feature where its error is `wanted`: explained once, scored (own / wanted)^2 times."""
    n: int = peer["features"]
    times: float = (own / wanted) ** 2
    explaining = peer["by_kind"].get("explainer", {})
    share = peer["seconds_by_kind"].get("explainer", 0.0) / peer["engine_seconds"]

    def scaled(key: str) -> float:
        once: float = explaining.get(key, 0)
        whole: float = peer[key]
        return (once + times * (whole - once)) / n

    prompt, cached = scaled("prompt_tokens"), scaled("cached_tokens")
    longer = (share + (1 - share) * times) / n
    seconds, cpu = peer["seconds"] * longer, peer["cpu_seconds"] * longer
    return Cost(name, wanted, scaled("calls"), prompt, prompt - cached, scaled("output_tokens"), seconds, cpu)


def errors_of(verdicts: dict[str, dict[str, int]]) -> dict[str, float]:
    """Median standard error of the features' balanced accuracies, by what is told of delphi at that error."""
    each = list(verdicts.values())
    return {
        "": median([balanced(counts)[1] for counts in each]),
        ", all parsed": median([balanced(counts, all_parsed=True)[1] for counts in each]),
        ", coin flips": median([coin_error(counts) for counts in each]),
    }


def costs(peer: dict[str, Any], ours: dict[str, Any] | None, scorer: str, wanted: float | None) -> list[Cost]:
    """Ours, the peer as it ran, and the peer at our error (or at `wanted`), by three ways of counting the error."""
    theirs = errors_of(peer["verdicts"][scorer])
    delphi = cost_of(peer["peer"], peer, theirs[""])
    if ours is not None:
        same = dict.fromkeys(theirs, float(ours["stderr"]))
        own = errors_of(ours["verdicts"]) if "verdicts" in ours else same
        rows = [cost_of("sae-ray judge", ours, own[""]), delphi]
    elif wanted is not None:
        own, rows = dict.fromkeys(theirs, wanted), [delphi]
    else:
        return [delphi]
    return rows + [at_error(peer, f"delphi at that error{way}", theirs[way], own[way]) for way in theirs]
