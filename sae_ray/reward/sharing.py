"""Two close latents may not both be taught one explanation: the worse one's credit of the round is taken.

`specificity.without_shared` decides, on what a judged round knows anyway: the F1 with which explanations won, the unit
decoder rows and the contexts in which the latents are active. No judge is asked. Only latents with credit count: one
without teaches nothing, so it holds no explanation either.

The loser's credit weight is 0. With it goes the right to keep the explanation (`history.LatentHistory.stands`): the
next round explains it anew.

Cosines and contexts are compared among latents of one explanation only; the most that is held is a square of those.
They are few: where a judge is given one explanation for many latents, the shuffled null is as good and earns no credit.

Suffixes: N latents of one explanation, D width, C contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sae_ray.reward.composition import LatentReward
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.history import UnitRows
from sae_ray.reward.rounds import Choice
from sae_ray.reward.specificity import Kept, Lost, Pair, normalised, without_shared


def one_holder_each(
    rewards: Sequence[LatentReward], choices: Sequence[Choice], scan: ContextScan, unit: UnitRows
) -> list[LatentReward]:
    """A round's rewards, `lost_to` set where a close latent has the same explanation and a higher F1.

    Args:
        choices: at least of the rewarded latents. One whose F1 was not measured loses to any whose was.
        scan, unit: of at least the rewarded latents.
    """
    fit_of = {each.plan.latent: _f1(each) for each in choices}
    kept = [Kept(each.latent, each.explanation, fit_of[each.latent]) for each in rewards if each.credit_weight > 0]
    holder_of = {lost.latent: lost.holder for lost in losers(kept, scan, unit)}
    return [replace(each, lost_to=holder_of.get(each.latent)) for each in rewards]


def newest_holder_each(
    batch: RewardBatch, explanation: Mapping[int, int], judged: np.ndarray, scan: ContextScan, unit: UnitRows
) -> RewardBatch:
    """A batch in which verdicts of earlier rounds teach on, without credit of those latents whose explanation a close
    one has that was judged now, or that is trusted more.

    Args:
        explanation: a number for the explanation of each of the batch's latents.
        judged: latents judged in this round, which `one_holder_each` has settled.
    """
    trust = dict(zip(batch.latents.tolist(), batch.credit_weight.tolist(), strict=True))
    now = set(judged.tolist())
    kept = [
        Kept(latent, str(explanation[latent]), weight + (latent in now)) for latent, weight in trust.items() if weight
    ]
    lost = np.isin(batch.latents, [each.latent for each in losers(kept, scan, unit)])
    if not lost.any():
        return batch
    # Weights are shared out among trusted latents, of which there are fewer now.
    credit_weight = np.where(lost, 0, batch.credit_weight) * (len(kept) / (len(kept) - lost.sum()))
    return replace(batch, credit_weight=credit_weight.astype(np.float32))


def losers(kept: Sequence[Kept], scan: ContextScan, unit: UnitRows) -> list[Lost]:
    """Those that `without_shared` takes the credit of."""
    alike: dict[str, list[int]] = {}
    for each in kept:
        alike.setdefault(normalised(each.explanation), []).append(each.latent)
    pairs = [pair for latents in alike.values() if len(latents) > 1 for pair in _pairs(latents, scan, unit)]
    return without_shared(kept, pairs) if pairs else []


def _pairs(latents: list[int], scan: ContextScan, unit: UnitRows) -> list[Pair]:
    unit_ND = unit.decoder_ND[np.searchsorted(unit.latents, latents)].astype(np.float32)
    active_CN = (scan.act_CN[:, np.searchsorted(scan.latents, latents)] > 0).astype(np.float32)
    cosine_NN, both_NN, count_N = unit_ND @ unit_ND.T, active_CN.T @ active_CN, active_CN.sum(0)
    jaccard_NN = both_NN / np.maximum(count_N[:, None] + count_N - both_NN, 1)
    return [
        Pair(latents[i], latents[j], float(cosine_NN[i, j]), float(jaccard_NN[i, j]))
        for i, j in zip(*np.triu_indices(len(latents), 1), strict=True)
    ]


def _f1(choice: Choice) -> float:
    if choice.explanation not in choice.offered:
        return 0.0
    fit = choice.fits[choice.offered.index(choice.explanation)]
    return 0.0 if fit is None else fit.f1
