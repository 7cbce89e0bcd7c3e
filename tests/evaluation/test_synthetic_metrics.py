"""Metrics of synthetic worlds against loops over samples, latents and features."""

import itertools
import math

import numpy as np
import pytest
import torch

from sae_ray.evaluation.synthetic_matching import assign, best_features, mcc, uniqueness
from sae_ray.evaluation.synthetic_metrics import (
    SPLIT_GAIN,
    Truth,
    absorption,
    collapsed,
    detect,
    explained_variance,
    measure,
    splitting,
    threshold_shift,
    trackers,
)
from sae_ray.evaluation.synthetic_worlds import WorldSpec, grow

SPEC = WorldSpec(n_features=12, d_in=10, roots=3, branching=3, depth=1, d_sae=6)


@pytest.fixture(scope="module")
def case():
    g = torch.Generator().manual_seed(0)
    on_NF = torch.rand(300, 12, generator=g) < 0.3
    fires_NM = (on_NF[:, :6] & (torch.rand(300, 6, generator=g) < 0.7)) | (torch.rand(300, 6, generator=g) < 0.05)
    fires_NM[:, 5] = False
    directions_FD = torch.nn.functional.normalize(torch.randn(12, 10, generator=g), dim=1)
    W_dec_MD = directions_FD[torch.tensor([0, 1, 1, 7, 4, 4])] + 0.1 * torch.randn(6, 10, generator=g)
    return on_NF, fires_NM, directions_FD, W_dec_MD


def plain_f1(fires, on):
    tp = sum(bool(a and b) for a, b in zip(fires, on, strict=True))
    precision = tp / sum(fires) if sum(fires) else 0.0
    recall = tp / sum(on) if sum(on) else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_every_metric_equals_its_definition_taken_sample_by_sample(case):
    on_NF, fires_NM, directions_FD, W_dec_MD = case
    x_ND = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))
    x_hat_ND = 0.5 * x_ND
    forest = grow(SPEC)
    found = measure(fires_NM.float() * 1.7, x_hat_ND, W_dec_MD, Truth(x_ND, on_NF, directions_FD, forest))
    best = [0, 1, 1, 7, 4, 4]
    assert best_features(W_dec_MD, directions_FD).tolist() == best
    rows = [plain_f1(fires_NM[:, j].tolist(), on_NF[:, best[j]].tolist()) for j in range(6)]
    assert found.precision == pytest.approx(np.mean([row[0] for row in rows]))
    assert found.recall == pytest.approx(np.mean([row[1] for row in rows]))
    assert found.f1 == pytest.approx(np.mean([row[2] for row in rows]))
    assert found.l0 == pytest.approx(sum(fires_NM.sum(1).tolist()) / 300)
    assert found.dead == 1
    assert found.uniqueness == pytest.approx(4 / 6)
    assert found.tracked == 4
    residual = sum(float((x - y) @ (x - y)) for x, y in zip(x_ND, x_hat_ND, strict=True))
    variance = sum(float((x - x_ND.mean(0)) @ (x - x_ND.mean(0))) for x in x_ND)
    assert found.ev == pytest.approx(1 - residual / variance, abs=1e-5)


def test_a_feature_is_tracked_by_the_most_parallel_of_its_latents(case):
    _, _, directions_FD, W_dec_MD = case
    tracker_F = trackers(W_dec_MD, directions_FD)
    cosine = torch.nn.functional.cosine_similarity
    for feature, rivals in ((1, (1, 2)), (4, (4, 5))):
        strongest = max(rivals, key=lambda j: abs(float(cosine(W_dec_MD[j], directions_FD[feature], dim=0))))
        assert int(tracker_F[feature]) == strongest
    assert tracker_F[[2, 3, 5, 6, 8, 9, 10, 11]].tolist() == [-1] * 8


def test_absorption_is_the_parents_silence_where_a_child_shows(case):
    on_NF, fires_NM, _, _ = case
    forest = grow(SPEC)
    tracker_F = torch.tensor([2, -1, 5] + [-1] * 9)  # latent 5 never fires; parent 1 has no latent
    silent, alone = [], []
    for parent, latent in ((0, 2), (2, 5)):
        kids = range(3 + 3 * parent, 6 + 3 * parent)
        with_child = [n for n in range(300) if any(on_NF[n, kid] for kid in kids)]
        without = [n for n in range(300) if on_NF[n, parent] and n not in with_child]
        silent.append(np.mean([not fires_NM[n, latent] for n in with_child]))
        alone.append(np.mean([bool(fires_NM[n, latent]) for n in without]))
    found = absorption(fires_NM, on_NF, tracker_F, forest)
    assert found == (pytest.approx(np.mean(silent)), pytest.approx(np.mean(alone)), 2)


def test_absorption_without_a_tracked_parent_is_missing_not_zero(case):
    on_NF, fires_NM, _, _ = case
    absorbed, alone, parents = absorption(fires_NM, on_NF, torch.full((12,), -1), grow(SPEC))
    assert math.isnan(absorbed)
    assert math.isnan(alone)
    assert parents == 0


def test_an_sae_that_absorbs_is_told_from_one_that_does_not():
    on_NF = torch.zeros(200, 12, dtype=torch.bool)
    on_NF[:100, 0] = True
    on_NF[:60, 3] = True  # the child of 0
    tracker_F = torch.tensor([0] + [-1] * 11)
    absorbing = (on_NF[:, 0] & ~on_NF[:, 3])[:, None]
    assert absorption(absorbing, on_NF, tracker_F, grow(SPEC))[:2] == (1.0, 1.0)
    assert absorption(on_NF[:, :1], on_NF, tracker_F, grow(SPEC))[:2] == (0.0, 1.0)


def test_a_latent_collapses_when_its_childs_place_is_taken_by_a_parent_at_any_remove():
    deep = grow(WorldSpec(n_features=7, d_in=4, roots=1, branching=2, depth=2, d_sae=4))
    assert deep.parent_F.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    before = torch.tensor([3, 3, 3, 1, 1, 0])
    after = torch.tensor([1, 0, 2, 0, 3, 1])  # parent, grandparent, aunt; parent, child; a root has no parent
    assert collapsed(before, after, deep) == pytest.approx(3 / 5)
    assert collapsed(before, before, deep) == 0
    assert math.isnan(collapsed(torch.tensor([0]), torch.tensor([1]), deep))


def test_splitting_tries_every_pair_of_latents(case):
    on_NF, fires_NM, _, _ = case
    halves_NM = fires_NM.clone()
    halves_NM[:, 4] = on_NF[:, 0] & (torch.arange(300) % 2 == 0)  # feature 0 is split over two latents
    halves_NM[:, 5] = on_NF[:, 0] & (torch.arange(300) % 2 == 1)
    halves_NM[:, 0] = False
    features = torch.tensor([0, 1, 2, 7])
    split = 0
    for feature in features.tolist():
        on = on_NF[:, feature].tolist()
        single = max(plain_f1(halves_NM[:, j].tolist(), on)[2] for j in range(6))
        best = max(range(6), key=lambda j, on=on: plain_f1(halves_NM[:, j].tolist(), on)[2])
        pair = max(plain_f1((halves_NM[:, best] | halves_NM[:, j]).tolist(), on)[2] for j in range(6))
        split += pair > single + SPLIT_GAIN
    assert split >= 1
    assert splitting(halves_NM, on_NF, features) == pytest.approx(split / 4)
    assert splitting(on_NF[:, :3], on_NF, torch.tensor([0, 1, 2])) == 0
    assert math.isnan(splitting(halves_NM, on_NF, torch.empty(0, dtype=torch.int64)))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 3), (4, 6), (5, 5)])
def test_the_assignment_is_the_cheapest_of_all_permutations(rows, columns):
    rng = np.random.default_rng(rows * 10 + columns)
    for trial in range(30):
        cost = rng.random((rows, columns)).round(1 if trial % 2 else 8)  # rounded: many ties
        found = assign(cost)
        assert len(set(found.tolist())) == rows
        cheapest = min(
            sum(cost[i, j] for i, j in enumerate(pick)) for pick in itertools.permutations(range(columns), rows)
        )
        assert cost[np.arange(rows), found].sum() == pytest.approx(cheapest)


def test_more_rows_than_columns_cannot_be_assigned():
    with pytest.raises(ValueError, match="3 rows"):
        assign(np.zeros((3, 2)))


def test_mcc_ignores_order_sign_and_scale_and_works_both_ways():
    g = torch.Generator().manual_seed(2)
    features_FD = torch.randn(8, 20, generator=g)
    order = torch.randperm(8, generator=g)
    assert mcc(-3 * features_FD[order], features_FD) == pytest.approx(1.0, abs=1e-6)
    some = torch.randn(5, 20, generator=g)
    assert mcc(some, features_FD) == pytest.approx(mcc(features_FD, some), abs=1e-6)
    assert 0 < mcc(some, features_FD) < 1
    assert uniqueness(features_FD[torch.tensor([0, 0, 1, 2])], features_FD) == 0.75


def test_latents_that_never_fire_have_no_precision_and_count_as_zero():
    on = torch.tensor([[True, False], [True, False]])
    found = detect(torch.tensor([[False, True], [False, True]]), on)
    assert [t.tolist() for t in found] == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_reconstruction_by_the_mean_explains_nothing():
    x_ND = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) + 50
    assert explained_variance(x_ND, x_ND.mean(0).expand_as(x_ND)) == pytest.approx(0.0, abs=1e-5)
    assert explained_variance(x_ND, x_ND) == 1.0


@pytest.mark.parametrize("l0", [0.5, 2, 3.25])
def test_one_shift_brings_the_number_of_active_latents_to_the_target(l0):
    margin_NM = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    allowed_NM = torch.rand(400, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    shift = threshold_shift(margin_NM, allowed_NM, l0)
    assert int(((margin_NM >= shift) & allowed_NM).sum()) == round(l0 * 400)


def test_a_target_beyond_what_may_fire_lets_all_of_it_fire():
    margin_NM = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    allowed_NM = margin_NM > 0.5
    shift = threshold_shift(margin_NM, allowed_NM, 4)
    assert int(((margin_NM >= shift) & allowed_NM).sum()) == int(allowed_NM.sum())
