import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.reward.evidence import (
    NEAR_MISS,
    POSITIVE,
    RANDOM,
    SIBLING,
    ContextScan,
    LatentPlan,
    Quota,
    choose_latents,
    density_matched_threshold,
    layout_contexts,
    plan_latent,
    scan_contexts,
    sibling_columns,
)


def random_scan(seed: int, contexts: int = 400, latents: int = 6) -> ContextScan:
    rng = np.random.default_rng(seed)
    margin_CN = rng.normal(-1.0, 1.0, (contexts, latents)).astype(np.float32)
    margin_CN[: contexts // 20] = -np.inf
    act_CN = np.where(margin_CN > 0, margin_CN + 0.5, 0).astype(np.float32)
    return ContextScan(np.arange(latents), act_CN, margin_CN, np.zeros((contexts, latents), dtype=np.int32))


def plan_of(scan: ContextScan, column: int, quota: Quota, seed: tuple[int, ...], **draw: tuple[int, ...]) -> LatentPlan:
    alike = sibling_columns(scan, np.array([column]))[0]
    return plan_latent(scan, column, [scan.act_CN[:, alike] > 0], quota, seed, **draw)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n_explainer=st.integers(0, 12), n_positives=st.integers(1, 30))
def test_explainer_and_judged_contexts_never_meet(seed, n_explainer, n_positives):
    scan = random_scan(seed)
    plan = plan_of(scan, 2, Quota(n_positives, 6, 6, 6, n_explainer), (seed,))
    judged = [verdict.context for verdict in plan.verdicts]
    assert not {*plan.explainer, *plan.unjudged} & set(judged)
    assert len(judged) == len(set(judged))
    for verdict in plan.verdicts:
        assert (scan.act_CN[verdict.context, 2] > 0) == (verdict.kind == POSITIVE)
        assert np.isfinite(scan.margin_CN[verdict.context, 2])
        assert verdict.weight >= 1
        if verdict.kind == SIBLING:
            others = np.delete(scan.act_CN[verdict.context], 2)
            assert (others > 0).any()
    assert all(scan.act_CN[context, 2] > 0 for context in plan.explainer)


def test_both_halves_of_a_plan_hold_positives_and_negatives():
    plan = plan_of(random_scan(1), 0, Quota(12, 6, 6, 6, 8), (0,))
    for half in (True, False):
        kinds = [verdict.kind for verdict in plan.verdicts if verdict.select == half]
        assert kinds.count(POSITIVE) == 6
        assert len(kinds) - kinds.count(POSITIVE) == 9


def test_weights_restore_the_natural_prior():
    scan = random_scan(3)
    plan = plan_of(scan, 1, Quota(12, 6, 6, 30, 0), (0,))
    active = sum(v.weight for v in plan.verdicts if v.kind == POSITIVE)
    everything = sum(v.weight for v in plan.verdicts)
    assert active == pytest.approx((scan.act_CN[:, 1] > 0).sum())
    assert everything == pytest.approx(np.isfinite(scan.margin_CN[:, 1]).sum())


@pytest.mark.parametrize("near", [0, 6])
@pytest.mark.parametrize("siblings", [0, 6])
def test_kinds_that_are_not_asked_for_are_drawn_among_the_random_texts(near, siblings):
    scan = random_scan(3)
    plan = plan_of(scan, 1, Quota(12, near, siblings, 300, 0), (0,))
    kinds = {verdict.kind for verdict in plan.verdicts}
    assert kinds == {POSITIVE, RANDOM} | ({NEAR_MISS} if near else set()) | ({SIBLING} if siblings else set())
    assert sum(v.weight for v in plan.verdicts) == pytest.approx(np.isfinite(scan.margin_CN[:, 1]).sum())


def plain_sibling(scan: ContextScan, column: int) -> int:
    margin_CN = scan.margin_CN[np.isfinite(scan.margin_CN).all(axis=1)].astype(np.float64)
    correlation = np.corrcoef(margin_CN.T)[column]
    correlation[column] = -np.inf
    return int(correlation.argmax())


def test_a_sibling_is_the_latent_whose_margins_correlate_most(monkeypatch):
    monkeypatch.setattr("sae_ray.reward.evidence.COLUMNS_AT_ONCE", 3)
    for seed in range(5):
        scan = random_scan(seed, latents=11)
        scan.margin_CN[:] *= np.geomspace(0.01, 100, 11, dtype=np.float32)  # scales must not matter
        scan.margin_CN[:, 4] += 0.3 * scan.margin_CN[:, 9] + 7
        some = np.array([9, 4, 0, 10, 2])
        assert sibling_columns(scan, some) == [plain_sibling(scan, column) for column in some]
    assert sibling_columns(random_scan(0, latents=1), np.array([0])) == [None]


def test_all_siblings_cost_little_more_than_a_few():
    scan, all_N = random_scan(0, contexts=4000, latents=512), np.arange(512)
    seconds = []
    for columns in (all_N[:1], all_N):
        began = time.perf_counter()
        sibling_columns(scan, columns)
        seconds.append(time.perf_counter() - began)
    assert seconds[1] < 50 * seconds[0]  # centring for each of them would be 512 times


def test_a_scan_equals_a_plain_loop_over_contexts():
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(2):
        seq, pos = np.nonzero(rng.random((3, 8)) < 0.7)
        blocks.append((seq.astype(np.int32), pos.astype(np.int32)))
    layout = layout_contexts(blocks, sequences=3, length=8, context_tokens=4)
    n_tokens = len(layout.context_T)
    x_TD = torch.randn(n_tokens, 5, dtype=torch.float64)
    W_ND, b_N = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    b_dec_D, threshold_N = torch.randn(5, dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    scan = scan_contexts(x_TD, layout, np.array([4, 9]), W_ND, b_N, b_dec_D, threshold_N)
    pre_TN = (x_TD - b_dec_D) @ W_ND.T + b_N
    place = [(b * 3 + s) * 2 + p // 4 for b, (seq, pos) in enumerate(blocks) for s, p in zip(seq, pos, strict=True)]
    assert layout.n_contexts == 12
    for context in range(12):
        tokens = [index for index, where in enumerate(place) if where == context]
        for n in range(2):
            if not tokens:
                assert scan.margin_CN[context, n] == -np.inf
                continue
            best = max(tokens, key=lambda t: pre_TN[t, n])
            top = float(pre_TN[best, n])
            assert scan.margin_CN[context, n] == pytest.approx(top - float(threshold_N[n]), abs=1e-6)
            assert scan.act_CN[context, n] == pytest.approx(top if top >= threshold_N[n] else 0, abs=1e-6)
            assert scan.token_CN[context, n] == best


def test_shards_merge_in_latent_order():
    scan = random_scan(5)
    parts = [
        ContextScan(scan.latents[s], scan.act_CN[:, s], scan.margin_CN[:, s], scan.token_CN[:, s])
        for s in ([3, 4, 5], [0, 1, 2])
    ]
    merged = ContextScan.merge(parts)
    assert np.array_equal(merged.latents, scan.latents)
    assert np.array_equal(merged.margin_CN, scan.margin_CN)


def test_chosen_latents_can_be_judged_and_cover_the_densities():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 900, 500)
    chosen = choose_latents(counts, 1000, 20, need=30, max_share=0.5, rng=rng)
    assert len(chosen) == len(set(chosen.tolist())) == 20
    assert counts[chosen].min() >= 30
    assert counts[chosen].max() <= 500
    assert np.quantile(counts[chosen], 0.9) > 2 * np.quantile(counts[chosen], 0.1)
    assert len(choose_latents(np.array([0, 50, 5]), 1000, 20, need=30, max_share=0.5, rng=rng)) == 1


def test_matched_thresholds_give_the_wanted_density():
    margin = np.random.default_rng(0).normal(size=(100, 2))
    threshold = density_matched_threshold(margin, np.array([10, 40]))
    assert ((margin >= threshold).sum(0) == [10, 40]).all()


def test_versions_that_nearly_agree_are_judged_on_nearly_the_same_texts():
    scan = random_scan(4)
    margin_CN = scan.margin_CN + np.random.default_rng(9).normal(0, 0.02, scan.margin_CN.shape).astype(np.float32)
    act_CN = np.where(margin_CN > 0, margin_CN + 0.5, 0).astype(np.float32)
    other = ContextScan(scan.latents, act_CN, margin_CN, scan.token_CN)
    quota = Quota(12, 6, 6, 6, 0)
    a, b = ({(v.context, v.kind == POSITIVE) for v in plan_of(each, 1, quota, (5,)).verdicts} for each in (scan, other))
    assert len(a & b) > 0.6 * len(a)


def test_latents_share_their_random_texts():
    scan = random_scan(6)
    quota = Quota(12, 6, 6, 6, 0)
    first, second = (
        {v.context for v in plan_of(scan, column, quota, (5,)).verdicts if v.kind == "random"} for column in (0, 1)
    )
    assert first & second


def test_rounds_that_draw_anew_judge_other_texts_and_never_what_any_explainer_saw():
    scan = random_scan(7, contexts=2000)
    quota = Quota(20, 6, 6, 6, 12)
    plans = [plan_of(scan, 1, quota, (5,), draw=(5, number)) for number in range(6)]
    judged = [{v.context for v in plan.verdicts if v.kind == POSITIVE} for plan in plans]
    seen = set().union(*({*plan.explainer, *plan.unjudged} for plan in plans))
    assert not seen & set().union(*judged)
    assert seen == {*plans[0].explainer, *plans[0].unjudged}  # the same half in every round
    assert len(set().union(*judged)) > 2.5 * len(judged[0])
    randoms = [{v.context for v in plan.verdicts if v.kind == "random"} for plan in plans]
    assert len(set().union(*randoms)) > 4 * len(randoms[0])
    active = (scan.act_CN[:, 1] > 0).sum()
    for plan in plans:
        assert sum(v.weight for v in plan.verdicts if v.kind == POSITIVE) == pytest.approx(active)
        assert all(scan.act_CN[context, 1] > 0 for context in plan.explainer)
