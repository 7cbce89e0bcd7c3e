"""What the hack alarms are told about a round, and what becomes of gamma.

Of the latents judged first: the share of evidence contexts in which each fires, and the entropy of
the token ids on which it fires (the strongest token of each such context). The evidence is the same in every round, so
both are compared on the same texts. The entropy is the expected one of FIRINGS firings drawn from a latent's: of all of
them it would fall with their number, and tell of rarity a second time. A latent that is not scanned is missing, one
that fires nowhere is rare.

The latents of the first round watched are the ones that are followed; what they were like is kept with the round. Those
that a later round does not judge are scanned all the same (`unscanned`).

Suffixes: N followed latents, C contexts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sae_ray.config import AlarmsConfig
from sae_ray.reward.alarms import FIRING_ENTROPY, RARITY, AlarmReport, HackAlarms, Limits, Measured
from sae_ray.reward.composition import LatentReward
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.evidence import ContextScan

FIRINGS = 8


ALWAYS_MEASURED = (FIRING_ENTROPY, RARITY)  # the other alarms must be asked for


def unscanned(state: Mapping[str, Any], scan: ContextScan) -> np.ndarray:
    """Latents that are followed and not in `scan`, int64, ascending.

    Args:
        state: as for `watch`.
    """
    return np.setdiff1d(np.array(state.get("latents", []), dtype=np.int64), scan.latents)


def watch(
    settings: AlarmsConfig,
    state: Mapping[str, Any],
    scan: ContextScan,
    texts: ContextTexts,
    duplicate_share: float | None = None,
    scores: tuple[float, float, float] | None = None,
    also: ContextScan | None = None,
) -> tuple[AlarmReport, dict[str, Any]]:
    """Takes in one round.

    Args:
        state: as the round before left it; empty before the first.
        also: a scan of followed latents that are not in `scan`, which is of those that the round judges.
        duplicate_share, scores: None where they are not measured; scores as `held_out_scores` gives them.
    Returns:
        What the alarms say, and the state that this round leaves.
    """
    limits = {name: Limits(each.cool, each.stop) for name, each in settings.limits.items()}
    alarms = HackAlarms(limits, settings.reference_rounds, settings.gap_tolerance, settings.recovery)
    if state:
        alarms.load_state(state["alarms"])
    followed: list[int] = state["latents"] if state else scan.latents.tolist()
    entropy, density = firing(scan, texts)
    if also is not None:
        for known, more in zip((entropy, density), firing(also, texts), strict=True):
            known |= more
    train, held_out, error = scores if scores is not None else (None, None, None)
    report = alarms.update(
        Measured(
            train_score=train,
            held_out_score=held_out,
            gap_error=error,
            entropy_M=np.array([entropy.get(latent, math.nan) for latent in followed]),
            density_M=np.array([density.get(latent, math.nan) for latent in followed]),
            duplicate_share=duplicate_share,
        )
    )
    return report, {"alarms": alarms.state_dict(), "latents": followed}


def firing(scan: ContextScan, texts: ContextTexts) -> tuple[dict[int, float], dict[int, float]]:
    """By latent: entropy of its strongest tokens' ids (nats, NaN where it fires in fewer than FIRINGS contexts), and
    the share of contexts with a kept token in which it fires."""
    entropy, density = {}, {}
    for column, latent in enumerate(scan.latents.tolist()):
        contexts = np.flatnonzero(scan.act_CN[:, column] > 0)
        tokens = scan.token_CN[contexts, column]
        ids = [int(texts.tokens(int(c))[texts.offset_of(int(t))]) for c, t in zip(contexts, tokens, strict=True)]
        entropy[latent] = rarefied_entropy(np.unique(ids, return_counts=True)[1], FIRINGS)
        density[latent] = len(contexts) / max(1, int(np.isfinite(scan.margin_CN[:, column]).sum()))
    return entropy, density


def rarefied_entropy(count_K: np.ndarray, draws: int) -> float:
    """Expected entropy (nats) of so many draws without replacement from counts of K kinds; NaN if there are fewer."""
    total = int(count_K.sum())
    if total < draws:
        return math.nan
    found = 0.0
    for count, kinds in zip(*(each.tolist() for each in np.unique(count_K, return_counts=True)), strict=True):
        for drawn in range(1, min(count, draws) + 1):
            chance = math.comb(count, drawn) * math.comb(total - count, draws - drawn) / math.comb(total, draws)
            found -= kinds * chance * drawn / draws * math.log(drawn / draws)
    return found


def held_out_scores(own: Sequence[LatentReward], held_out: Sequence[LatentReward]) -> tuple[float, float, float] | None:
    """(training judge's, held-out judge's mean score, standard error of their difference), paired over the latents that
    both could score; None if there are fewer than two."""
    other = {reward.latent: reward.interpretability for reward in held_out}
    pairs = np.array([(r.interpretability, other[r.latent]) for r in own if r.latent in other])
    if len(pairs) < 2:
        return None
    difference = pairs[:, 0] - pairs[:, 1]
    error = float(difference.std(ddof=1) / len(pairs) ** 0.5)
    return float(pairs[:, 0].mean()), float(pairs[:, 1].mean()), error


def told(report: AlarmReport) -> str:
    """The report in a few words, for a person: what is wrong, and what that does to gamma."""
    raised = [f"{alarm.name} {alarm.severity:.2f} ({alarm.state})" for alarm in report.alarms if alarm.state != "ok"]
    silent = [alarm.name for alarm in report.alarms if alarm.missing and alarm.name in ALWAYS_MEASURED]
    unknown = f"; not measured: {', '.join(silent)}" if silent else ""
    if report.state == "ok":
        return f"alarms ok{unknown}"
    return f"alarms {report.state}: {', '.join(raised) or 'recovering'}; gamma x {report.factor:.2f}{unknown}"
