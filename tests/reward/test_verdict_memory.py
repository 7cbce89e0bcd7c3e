"""Verdicts of earlier rounds: which are taught again, with which weights, and what of them is brought up to date."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.verdict_memory import VerdictMemory
from sae_ray.storage import LocalStorage

C = 600
SAME = {3: 30, 8: 80}


def scan_of(margin_CN: np.ndarray, latents: tuple[int, ...] = (3, 8)) -> ContextScan:
    act_CN = np.where(margin_CN > 0, margin_CN + 0.5, 0).astype(np.float32)
    token_CN = np.arange(C)[:, None] * 10 + np.arange(len(latents))
    return ContextScan(np.array(latents), act_CN, margin_CN.astype(np.float32), token_CN.astype(np.int32))


def margins(seed: int, moved: float = 0.0, n: int = 2) -> np.ndarray:
    """[C, n]: every seed has its own responses; `moved` mixes others in."""
    rng = np.random.default_rng(seed)
    start, other = rng.normal(-1, 1, (C, n)), rng.normal(-1, 1, (C, n))
    return np.sqrt(1 - moved**2) * (start + 1) + moved * (other + 1) - 1


def truth(seed: int = 0) -> np.ndarray:
    """bool [C, 2]: whether a context shows each latent's explanation, mostly where the latent is strong."""
    return margins(seed) + 0.7 * np.random.default_rng(99).normal(size=(C, 2)) > 0.3


def judged(scan: ContextScan, number: int, seed: int, latents=(3, 8), quota=(20, 20)) -> RewardBatch:
    """A round that draws some active and some inactive contexts of each latent, and whose judge is always right."""
    rng, parts = np.random.default_rng(seed), []
    for latent in latents:
        column = scan.latents.tolist().index(latent)
        for side, n in zip((True, False), quota, strict=True):
            pool = np.flatnonzero((scan.act_CN[:, column] > 0) == side)
            drawn = rng.choice(pool, min(n, len(pool)), replace=False)
            parts.append((np.full(len(drawn), latent), drawn, truth()[drawn, (3, 8).index(latent)],
                          np.full(len(drawn), side), np.full(len(drawn), len(pool) / len(drawn)),
                          scan.token_CN[drawn, column], scan.margin_CN[drawn, column]))  # fmt: skip
    latent, context, verdict, active, weight, token, margin = (np.concatenate(p) for p in zip(*parts, strict=True))
    trust = np.full(len(latents), 0.5 / len(latents), dtype=np.float32)
    return RewardBatch(
        number, 100 * number, np.array(latents), trust, latent, context, verdict.astype(np.float32), active,
        weight.astype(np.float32), token.astype(np.int64), 0.0, 0.0, row_margin=margin,
    )  # fmt: skip


def as_facts(batch: RewardBatch) -> dict[tuple[int, int], tuple[float, bool, float, int]]:
    rows = zip(
        batch.row_latent.tolist(), batch.row_context.tolist(), batch.row_verdict.tolist(), batch.row_active.tolist(),
        batch.row_weight.round(3).tolist(), batch.row_token.tolist(), strict=True,
    )  # fmt: skip
    return {(latent, context): rest for latent, context, *rest in rows}


def test_a_first_round_teaches_what_it_found():
    scan = scan_of(margins(0))
    batch = judged(scan, 0, seed=1)
    joined = VerdictMemory(2, 400).join(batch, SAME, scan, {})
    assert as_facts(joined) == as_facts(batch)
    assert np.allclose(joined.credit_weight, batch.credit_weight)
    assert joined.sae_step == batch.sae_step


def test_old_verdicts_come_back_with_how_the_latent_responds_now():
    old, now = scan_of(margins(0)), scan_of(margins(0, moved=0.6))
    memory = VerdictMemory(1, 400)
    first = judged(old, 0, seed=1)
    memory.join(first, SAME, old, {})
    second = judged(now, 1, seed=2)
    joined = memory.join(second, SAME, now, {})
    assert set(as_facts(joined)) == set(as_facts(first)) | set(as_facts(second))
    assert len(joined.row_latent) > 1.5 * len(second.row_latent)
    column = np.searchsorted(now.latents, joined.row_latent)
    assert np.array_equal(joined.row_active, now.act_CN[joined.row_context, column] > 0)
    assert np.array_equal(joined.row_token, now.token_CN[joined.row_context, column])
    assert np.array_equal(joined.row_margin, now.margin_CN[joined.row_context, column])
    for latent, concept in ((3, 0), (8, 1)):
        mine = joined.row_latent == latent
        assert np.array_equal(joined.row_verdict[mine], truth()[joined.row_context[mine], concept].astype(np.float32))
    # Some were active then and are not now: otherwise nothing here was brought up to date.
    then = {key: fact[1] for key, fact in as_facts(first).items()}
    assert any(as_facts(joined)[key][1] != side for key, side in then.items())


def test_weights_add_up_to_what_the_scan_counts():
    old, now = scan_of(margins(0)), scan_of(margins(0, moved=0.6))
    memory = VerdictMemory(1, 400)
    memory.join(judged(old, 0, seed=1), SAME, old, {})
    joined = memory.join(judged(now, 1, seed=2), SAME, now, {})
    for column, latent in enumerate(now.latents):
        mine = joined.row_latent == latent
        active = int((now.act_CN[:, column] > 0).sum())
        assert joined.row_weight[mine & joined.row_active].sum() == pytest.approx(active, rel=1e-5)
        assert joined.row_weight[mine & ~joined.row_active].sum() == pytest.approx(C - active, rel=1e-5)


def share_of_yes(batch: RewardBatch, latent: int, side: bool) -> float:
    some = (batch.row_latent == latent) & (batch.row_active == side)
    return float((batch.row_weight * batch.row_verdict)[some].sum() / batch.row_weight[some].sum())


def test_two_rounds_say_more_surely_how_often_an_explanation_holds():
    old, now = scan_of(margins(0)), scan_of(margins(0, moved=0.5))
    alone, pooled = [], []
    for seed in range(200):
        memory = VerdictMemory(1, 400)
        memory.join(judged(old, 0, seed=2 * seed), SAME, old, {})
        second = judged(now, 1, seed=2 * seed + 1)
        alone.append([share_of_yes(second, 3, side) for side in (True, False)])
        joined = memory.join(second, SAME, now, {})
        pooled.append([share_of_yes(joined, 3, side) for side in (True, False)])
    active_C = now.act_CN[:, 0] > 0
    expected = [truth()[active_C, 0].mean(), truth()[~active_C, 0].mean()]
    alone, pooled = np.array(alone), np.array(pooled)
    # The cut of weights costs a little bias among active contexts; a gain in the error all the same.
    assert pooled.mean(0) == pytest.approx(expected, abs=0.04)
    errors = [np.sqrt(((values - expected) ** 2).mean(0)) for values in (alone, pooled)]
    assert (errors[1] < 0.85 * errors[0]).all()


def test_a_text_on_which_the_latent_has_begun_to_fire_does_not_decide_alone():
    margin_CN = margins(0)
    old = scan_of(margin_CN)
    memory = VerdictMemory(1, 400)
    first = judged(old, 0, seed=1, quota=(20, 4))  # each inactive row stands for more than a hundred contexts
    memory.join(first, SAME, old, {})
    begun = first.row_context[(first.row_latent == 3) & ~first.row_active][0]
    margin_CN[begun, 0] = 0.4
    now = scan_of(margin_CN)
    joined = memory.join(judged(now, 1, seed=2), SAME, now, {})
    active = (joined.row_latent == 3) & joined.row_active
    assert begun in joined.row_context[active]
    weight = joined.row_weight[active]
    assert weight[joined.row_context[active] == begun][0] <= 4.01 * np.median(weight)


def test_verdicts_on_an_explanation_that_was_given_up_are_forgotten():
    scan = scan_of(margins(0))
    memory = VerdictMemory(3, 400)
    memory.join(judged(scan, 0, seed=1), SAME, scan, {})
    second = judged(scan, 1, seed=2)
    joined = memory.join(second, {3: 31, 8: 80}, scan, {})
    contexts = {latent: set(batch.row_context[batch.row_latent == latent].tolist())
                for latent, batch in ((3, second), (8, joined))}  # fmt: skip
    assert set(joined.row_context[joined.row_latent == 3].tolist()) == contexts[3]
    assert len(contexts[8]) > (second.row_latent == 8).sum()


def test_a_latent_that_is_not_judged_again_still_teaches_and_its_trust_fades():
    scan = scan_of(margins(0))
    memory = VerdictMemory(1, half_life_steps=200)
    memory.join(judged(scan, 0, seed=1), SAME, scan, {})
    joined = memory.join(judged(scan, 1, seed=2, latents=(8,)), {8: 80}, scan, {3: 0.8})
    assert joined.latents.tolist() == [3, 8]
    # Trust 0.5 each: halved after 200 steps, and 100 have passed.
    assert joined.credit_weight == pytest.approx([0.5 * 0.5**0.5 * 0.8 / 2, 0.5 / 2], rel=1e-5)
    assert (joined.row_latent == 3).sum() == 40
    turned_away = memory.join(judged(scan, 1, seed=2, latents=(8,)), {8: 80}, scan, {3: -0.1})
    assert turned_away.credit_weight.tolist() == pytest.approx([0, 0.5])


def test_only_so_many_rounds_are_kept_and_a_round_asked_again_counts_once():
    scan = scan_of(margins(0))
    memory = VerdictMemory(1, 400)
    for number in range(3):
        memory.join(judged(scan, number, seed=number), SAME, scan, {})
    again = memory.join(judged(scan, 2, seed=2), SAME, scan, {})
    expected = VerdictMemory(1, 400)
    expected.join(judged(scan, 1, seed=1), SAME, scan, {})
    assert as_facts(again) == as_facts(expected.join(judged(scan, 2, seed=2), SAME, scan, {}))
    assert memory.latents(3).tolist() == [3, 8]
    assert memory.latents(9).tolist() == []


def test_rewards_that_a_round_gave_are_kept_with_the_latent():
    scan = scan_of(margins(0))
    memory = VerdictMemory(1, 400)
    first = dataclasses.replace(judged(scan, 0, seed=1), reward=np.array([0.1, 0.2], dtype=np.float32))
    memory.join(first, SAME, scan, {})
    second = judged(scan, 1, seed=2, latents=(8,))
    joined = memory.join(dataclasses.replace(second, reward=np.array([0.3], dtype=np.float32)), {8: 80}, scan, {})
    assert joined.reward == pytest.approx([0.1, 0.3])


def test_a_resumed_run_joins_the_same(tmp_path):
    storage = LocalStorage(tmp_path)
    old, now = scan_of(margins(0)), scan_of(margins(0, moved=0.6))
    memory = VerdictMemory(1, 400)
    for number in range(3):
        memory.join(judged(old, number, seed=number), SAME, old, {})
        memory.save(storage)
    resumed = VerdictMemory(1, 400)
    resumed.load(storage, 2)  # the last round, asked again
    assert [kept.number for kept in resumed.kept] == [1]
    resumed.load(storage, 3)
    third = judged(now, 3, seed=3)
    assert as_facts(resumed.join(third, SAME, now, {})) == as_facts(memory.join(third, SAME, now, {}))
    resumed.load(storage, 0)
    assert resumed.kept == []
