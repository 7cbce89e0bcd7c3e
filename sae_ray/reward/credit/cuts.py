"""Where a direction's gate should be: the share of contexts that it marks, that verdicts imply, and their cuts."""

from __future__ import annotations

import math

import numpy as np
import torch

from sae_ray.reward.credit.base import RewardBatch
from sae_ray.reward.credit.gates import platt
from sae_ray.reward.credit.rows import padded, rows_of

HALF_F1 = 0.4


def marked_share(batch: RewardBatch) -> np.ndarray:
    """float64 [N]: the share of contexts in which each latent is active, by its rows' propensities."""
    place = np.searchsorted(batch.latents, batch.row_latent)
    weight = batch.row_weight.astype(np.float64)
    marked = np.bincount(place, weight * batch.row_active, len(batch.latents))
    return marked / np.maximum(np.bincount(place, weight, len(batch.latents)), 1e-9)


def cut_at(score_CN: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """[N]: the cut that `count` contexts are above, halfway between the last of them and the first that is not."""
    ordered_CN = score_CN.sort(dim=0, descending=True).values
    index_N = count_N.long().clamp(1, len(ordered_CN) - 1)
    columns_N = torch.arange(len(index_N), device=index_N.device)
    return (ordered_CN[index_N - 1, columns_N] + ordered_CN[index_N, columns_N]) / 2


def implied_cuts(best_CN: torch.Tensor, batch: RewardBatch, factor_N: np.ndarray) -> torch.Tensor:
    """[N]: cuts of new scores that mark the share of contexts in which the verdicts imply the concept.

    The share is the mean of a Platt map over all contexts, fitted at the natural prior through the judge's error
    rates, and at most a factor of `factor` away from what the latent itself marked.

    Args:
        best_CN: each context's largest score; -inf where no token is kept.
    """
    latent_V = torch.tensor(np.searchsorted(batch.latents, batch.row_latent), device=best_CN.device)
    score_V = best_CN[torch.tensor(batch.row_context, device=best_CN.device), latent_V]
    columns = [score_V, *(torch.tensor(values).to(best_CN) for values in (batch.row_verdict, batch.row_weight))]
    score_NV, verdict_NV, weight_NV = padded(columns, rows_of(batch))
    rates = (batch.false_positive_rate, batch.false_negative_rate)
    slope_N, offset_N = platt(score_NV, verdict_NV, weight_NV, rates)
    finite_CN = best_CN[torch.isfinite(best_CN).all(1)]
    implied_N = torch.sigmoid(slope_N * finite_CN + offset_N).mean(0)
    own_N, most_N = (torch.tensor(values).to(best_CN) for values in (marked_share(batch), factor_N))
    share_N = torch.minimum(torch.maximum(implied_N, own_N / most_N), own_N * most_N)
    return cut_at(finite_CN, share_N * len(finite_CN))


def f1_cuts(best_CN: torch.Tensor, batch: RewardBatch, factor_N: np.ndarray) -> torch.Tensor:
    """[N]: cuts of new scores at which F1 against the concept is largest: where its probability falls to half of it.

    F1 is largest when everything is marked whose probability of presence is above half of the F1 that this gives
    (Lipton, Elkan and Naryanaswamy 2014); good detectors have F1 about .8, hence HALF_F1. The probability is a Platt
    map through the judge's error rates. Its rows count by the root of their propensities: at the full ones the few
    random rows decide, and with 10% flipped verdicts they say that a rare concept is common. The share that is marked
    is at most a factor of `factor` away from what the latent itself marked.

    Args:
        best_CN: each context's largest score; -inf where no token is kept.
    """
    latent_V = torch.tensor(np.searchsorted(batch.latents, batch.row_latent), device=best_CN.device)
    score_V = best_CN[torch.tensor(batch.row_context, device=best_CN.device), latent_V]
    weight_V = torch.tensor(batch.row_weight).to(best_CN).sqrt()
    score_NV, verdict_NV, weight_NV = padded(
        [score_V, torch.tensor(batch.row_verdict).to(best_CN), weight_V], rows_of(batch)
    )
    rates = (batch.false_positive_rate, batch.false_negative_rate)
    slope_N, offset_N = platt(score_NV, verdict_NV, weight_NV, rates)
    finite_CN = best_CN[torch.isfinite(best_CN).all(1)]
    above_N = (finite_CN > (math.log(HALF_F1 / (1 - HALF_F1)) - offset_N) / slope_N).sum(0)
    own_N, most_N = (torch.tensor(values).to(best_CN) for values in (marked_share(batch), factor_N))
    own_N = own_N * len(finite_CN)
    return cut_at(finite_CN, torch.minimum(torch.maximum(above_N.to(best_CN), own_N / most_N), own_N * most_N))
