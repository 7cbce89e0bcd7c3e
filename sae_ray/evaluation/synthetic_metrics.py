"""How well an SAE found a synthetic world's features.

EV, L0, F1, precision, recall, MCC, uniqueness and dead are what SAELens's `eval_sae_on_synthetic_data` reports, by its
definitions (`benchmarks/synthetic_check.py` compares the numbers). Absorption, splitting and composed are defined here.

Suffixes: N samples, M latents, F features, D d_in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sae_ray.evaluation.synthetic_matching import best_features, cosines, mcc, uniqueness
from sae_ray.evaluation.synthetic_worlds import Forest
from sae_ray.reward.atomicity import MetaDictionary, compositions, unit_rows

# By how much a second latent must raise a feature's F1 before the feature counts as split between the two.
SPLIT_GAIN = 0.03
COMPOSED_OF = 3  # features at most: a child, its parent and its grandparent


@dataclass(frozen=True)
class SyntheticMetrics:
    """l0: mean active latents per sample. ev: 1 - sum |x - x_hat|^2 / sum |x - mean x|^2.

    precision, recall, f1: means over latents, each as a detector of the feature that its decoder row is most parallel
    to; undefined ones are 0. mcc: mean |cosine| under the best one-to-one assignment of latents to features.
    uniqueness: distinct best features over latents. dead: latents that never fire.

    A feature is tracked if it is some latent's best feature; of several the most parallel is its latent.
    absorption: over tracked features with children, the share of the samples showing a child in which the parent's
    latent is silent (1 - parent recall given a child); recall_alone: that latent's recall where the parent shows and
    no child does. splitting: share of tracked features that an OR of two latents detects better than the best single
    one, by more than SPLIT_GAIN of F1. NaN where no feature is concerned. composed: mean over latents of the share of
    the decoder row's squared length that COMPOSED_OF features explain together beyond what the best of them does:
    `reward.atomicity`'s measure with the true features for atoms. Directions that are no feature's have some too.
    """

    l0: float
    ev: float
    f1: float
    precision: float
    recall: float
    mcc: float
    uniqueness: float
    dead: int
    absorption: float
    recall_alone: float
    splitting: float
    tracked: int
    tracked_parents: int
    composed: float


class Truth(NamedTuple):
    """What is known of some samples: activations, which features they show, and the features themselves."""

    x_ND: torch.Tensor
    on_NF: torch.Tensor  # bool
    directions_FD: torch.Tensor
    forest: Forest


class Detection(NamedTuple):
    """Of each latent for some feature, [M] each."""

    precision: torch.Tensor
    recall: torch.Tensor
    f1: torch.Tensor


class Matching(NamedTuple):
    """Which latent stands for which feature: what depends on the decoder alone, at any L0."""

    best_M: torch.Tensor
    tracker_F: torch.Tensor
    mcc: float
    uniqueness: float
    composed: float


def match(W_dec_MD: torch.Tensor, directions_FD: torch.Tensor) -> Matching:
    return Matching(
        best_features(W_dec_MD, directions_FD),
        trackers(W_dec_MD, directions_FD),
        mcc(W_dec_MD, directions_FD),
        uniqueness(W_dec_MD, directions_FD),
        composed(W_dec_MD, directions_FD),
    )


def measure(
    f_NM: torch.Tensor,
    x_hat_ND: torch.Tensor,
    W_dec_MD: torch.Tensor,
    truth: Truth,
    matching: Matching | None = None,
) -> SyntheticMetrics:
    """All metrics of an SAE that encodes the samples as `f_NM` and reconstructs them as `x_hat_ND`.

    Args:
        matching: of this decoder, where it is known already.
    """
    fires_NM = f_NM != 0
    matching = matching or match(W_dec_MD, truth.directions_FD)
    detection = detect(fires_NM, truth.on_NF[:, matching.best_M])
    absorbed, alone, parents = absorption(fires_NM, truth.on_NF, matching.tracker_F, truth.forest)
    tracked = torch.nonzero(matching.tracker_F >= 0).flatten()
    return SyntheticMetrics(
        l0=float(fires_NM.sum(1, dtype=torch.float64).mean()),
        ev=explained_variance(truth.x_ND, x_hat_ND),
        f1=float(detection.f1.mean()),
        precision=float(detection.precision.mean()),
        recall=float(detection.recall.mean()),
        mcc=matching.mcc,
        uniqueness=matching.uniqueness,
        dead=int((~fires_NM.any(0)).sum()),
        absorption=absorbed,
        recall_alone=alone,
        splitting=splitting(fires_NM, truth.on_NF, tracked),
        tracked=len(tracked),
        tracked_parents=parents,
        composed=matching.composed,
    )


def explained_variance(x_ND: torch.Tensor, x_hat_ND: torch.Tensor) -> float:
    """Share of the total variance that a reconstruction explains; below 0 where the mean would have been better."""
    x_ND = x_ND.double()
    return 1 - float((x_ND - x_hat_ND).square().sum() / (x_ND - x_ND.mean(0)).square().sum())


def detect(fires_NM: torch.Tensor, on_NM: torch.Tensor) -> Detection:
    """Column by column, how well firing says that the column's feature is there."""
    both_M = (fires_NM & on_NM).sum(0).double()
    return _detection(both_M, fires_NM.sum(0).double(), on_NM.sum(0).double())


def _detection(both: torch.Tensor, fires: torch.Tensor, on: torch.Tensor) -> Detection:
    precision = torch.where(fires > 0, both / fires.clamp(min=1), 0)
    recall = torch.where(on > 0, both / on.clamp(min=1), 0)
    f1 = torch.where(both > 0, 2 * both / (fires + on).clamp(min=1), 0)
    return Detection(precision, recall, f1)


def trackers(W_dec_MD: torch.Tensor, directions_FD: torch.Tensor) -> torch.Tensor:
    """The latent of each feature, int64 [F], -1 where it is no latent's best feature."""
    similarity_MF = cosines(W_dec_MD, directions_FD).abs()
    strength_M, best_M = similarity_MF.max(1)
    tracker_F = torch.full((len(directions_FD),), -1)
    for latent in strength_M.argsort().tolist():  # the most parallel one is written last
        tracker_F[best_M[latent]] = latent
    return tracker_F


def composed(W_dec_MD: torch.Tensor, directions_FD: torch.Tensor) -> float:
    """How far latents' directions are sums of several features'; see SyntheticMetrics."""
    n_features = len(directions_FD)
    features = MetaDictionary(unit_rows(directions_FD)[0], torch.ones(n_features, dtype=torch.int64), COMPOSED_OF, 1, 0)
    return float(compositions(W_dec_MD, features, shared_by=0).composed.nanmean())


def absorption(
    fires_NM: torch.Tensor, on_NF: torch.Tensor, tracker_F: torch.Tensor, forest: Forest
) -> tuple[float, float, int]:
    """(1 - recall given a child, recall without one, how many parents the first is a mean of); see SyntheticMetrics."""
    silent, alone, parents = 0.0, [], 0
    for parent in torch.nonzero((tracker_F >= 0) & (forest.n_children_F > 0)).flatten().tolist():
        first, count = int(forest.first_child_F[parent]), int(forest.n_children_F[parent])
        child_N = on_NF[:, first : first + count].any(1)
        fires_N = fires_NM[:, tracker_F[parent]]
        only_N = on_NF[:, parent] & ~child_N
        if child_N.any():
            silent += 1 - float(fires_N[child_N].double().mean())
            parents += 1
        if only_N.any():
            alone.append(float(fires_N[only_N].double().mean()))
    return silent / parents if parents else math.nan, sum(alone) / len(alone) if alone else math.nan, parents


def collapsed(before_M: torch.Tensor, after_M: torch.Tensor, forest: Forest) -> float:
    """Share of the latents that stood for a child and now stand for a parent of it, at any remove; NaN without any.

    Args:
        before_M, after_M: the feature that each latent stands for.
    """
    of_child = forest.parent_F[before_M] >= 0
    if not of_child.any():
        return math.nan
    before_M, after_M = before_M[of_child], after_M[of_child]
    taken_M, above_M = torch.zeros_like(before_M, dtype=torch.bool), forest.parent_F[before_M]
    while (above_M >= 0).any():
        taken_M |= (above_M >= 0) & (above_M == after_M)
        above_M = torch.where(above_M >= 0, forest.parent_F[above_M.clamp(min=0)], -1)
    return float(taken_M.double().mean())


def splitting(fires_NM: torch.Tensor, on_NF: torch.Tensor, features: torch.Tensor) -> float:
    """Share of `features` that two latents together detect better than one; see SyntheticMetrics."""
    if not len(features):
        return math.nan
    fires = fires_NM.float()
    together_MM = (fires.T @ fires).double()
    n_M = together_MM.diagonal()
    split = 0
    for feature in features.tolist():
        shown = fires[on_NF[:, feature]]
        if not len(shown):
            continue
        n_on = torch.tensor(float(len(shown)), dtype=torch.float64)
        both_M = shown.sum(0).double()
        f1_M = _detection(both_M, n_M, n_on).f1
        best = int(f1_M.argmax())
        both_pair_M = both_M + both_M[best] - (shown.T @ shown[:, best]).double()
        f1_pair_M = _detection(both_pair_M, n_M + n_M[best] - together_MM[best], n_on).f1
        split += bool(f1_pair_M.max() > f1_M[best] + SPLIT_GAIN)
    return split / len(features)


def threshold_shift(margin_NM: torch.Tensor, allowed_NM: torch.Tensor, l0: float) -> float:
    """The number at or above which `l0` of the allowed margins lie per sample: one shift of all thresholds.

    Margins are pre-activations less their latents' thresholds; a shift of 0 is how the SAE is deployed. Where fewer
    pairs are allowed (have a positive pre-activation) the shift lets all of them pass.
    """
    margin_K = margin_NM[allowed_NM]
    want = round(l0 * len(margin_NM))
    if want >= len(margin_K):
        return float(margin_K.min()) if len(margin_K) else 0.0
    return float(margin_K.kthvalue(len(margin_K) - max(want, 1) + 1).values)
