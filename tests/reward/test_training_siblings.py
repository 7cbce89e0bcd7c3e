"""Sibling negatives in training come from the latents that lie closest in the whole dictionary, judged or not."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from round_world import LATENTS, RANKS, WIDTH, Tokenizer, World, WorldJudge, run_config

from sae_ray.reward import desk as desk_module
from sae_ray.reward.bank import VerdictBank
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.desk import RewardDesk
from sae_ray.reward.evidence import SIBLING, ContextScan, Quota, make_plans, plan_latent
from sae_ray.reward.siblings import NEIGHBOURS, Neighbourhood
from sae_ray.storage import LocalStorage


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch) -> None:
    monkeypatch.setattr("sae_ray.reward.contexts.load_tokenizer", lambda _: Tokenizer())
    monkeypatch.setattr(desk_module.ray, "put", lambda value: value)


def partners() -> World:
    """Latent m and the one half the dictionary further lie close: they are on different ranks."""
    world, rng = World(), np.random.default_rng(1)
    half = LATENTS // 2
    world.W_dec[half:] = world.W_dec[:half] + 0.5 * rng.normal(size=(half, WIDTH)).astype(np.float32)
    return world


def judged(folder: Any, world: World, **rlaif: Any) -> tuple[RewardBatch, list[dict[str, Any]], WorldJudge]:
    config = run_config(folder, **{"latents": 6, **rlaif})
    desk, judge = RewardDesk(config.model_dump_json()), WorldJudge()
    desk.judge = judge  # type: ignore[assignment]
    batch = asyncio.run(desk.judge_round(0, 10, world.ranks, world.evidence))[1]
    return batch, VerdictBank(LocalStorage(config.run_dir)).read(), judge  # type: ignore[return-value]


def test_the_closest_latent_of_the_dictionary_is_the_sibling_though_it_is_not_judged(tmp_path):
    world = partners()
    batch, bank, _ = judged(tmp_path, world)
    latents, fires_CM = set(batch.latents.tolist()), world.fires_CM()
    unit = world.W_dec / np.linalg.norm(world.W_dec, axis=1, keepdims=True)
    nearest = (unit @ unit.T - 2 * np.eye(LATENTS)).argmax(axis=1)
    away = [latent for latent in latents if nearest[latent] not in latents]
    assert len(latents) == 6
    assert len(away) >= 3
    rows = [row for row in bank if row["kind"] == SIBLING]
    assert {row["latent"] for row in rows} == latents
    for row in rows:
        assert fires_CM[row["context"], nearest[row["latent"]]]
        assert not fires_CM[row["context"], row["latent"]]
    assert {row["latent"] for row in bank} == latents, "siblings are not judged"
    assert [rank.scan.calls for rank in world.ranks] == [1] * RANKS
    assert [(rank.nearest_latents.calls, rank.firing.calls) for rank in world.ranks] == [(1, 1)] * RANKS


def test_a_round_without_sibling_texts_asks_for_no_neighbours(tmp_path):
    world = partners()
    _, bank, _ = judged(tmp_path, world, siblings=0)
    assert SIBLING not in {row["kind"] for row in bank}
    assert [(rank.nearest_latents.calls, rank.firing.calls) for rank in world.ranks] == [(0, 0)] * RANKS


def test_a_round_that_is_judged_again_draws_the_same_texts(tmp_path):
    (one, first, _), (other, second, _) = (judged(tmp_path / name, partners()) for name in "ab")
    np.testing.assert_array_equal(one.row_context, other.row_context)
    assert [(r["context"], r["kind"], r["weight"]) for r in first] == [
        (r["context"], r["kind"], r["weight"]) for r in second
    ]


def test_firings_that_are_asked_for_are_a_bit_each_and_of_few_latents(tmp_path):
    world, sizes = partners(), []
    for rank in world.ranks:
        call = rank.firing.call
        rank.firing.call = lambda *args, call=call: sizes.append(call(*args)[1].shape) or call(*args)
    batch, _, _ = judged(tmp_path, world)
    n_contexts = world.layout.n_contexts
    assert 0 < sum(rows for rows, _ in sizes) <= NEIGHBOURS * len(batch.latents)
    assert {width for _, width in sizes} == {-(-n_contexts // 8)}


# ---------------------------------------------------------------------- by itself


def scene(neighbours: list[tuple[int, float, range]]) -> tuple[ContextScan, Neighbourhood]:
    """Latent 1 is active in contexts 0..19, latent 2, scanned too, in 100..119. Neighbours of 1: id, cosine, and where
    each is active."""
    active_CN = np.zeros((200, 2), dtype=bool)
    active_CN[:20, 0] = active_CN[100:120, 1] = True
    act_CN = active_CN.astype(np.float32)
    scan = ContextScan(np.array([1, 2]), act_CN, act_CN - 0.5, np.zeros(act_CN.shape, dtype=np.int32))
    ids = np.array([[n for n, _, _ in neighbours], [-1] * len(neighbours)])
    cosine = np.array([[c for _, c, _ in neighbours], [-np.inf] * len(neighbours)], dtype=np.float32)
    asked = sorted((n, where) for n, _, where in neighbours if n not in (1, 2))
    bits = np.array([np.packbits(np.isin(np.arange(200), where)) for _, where in asked], dtype=np.uint8)
    return scan, Neighbourhood(np.array([1, 2]), ids, cosine, np.array([n for n, _ in asked]), bits)


def starts(siblings: list[np.ndarray]) -> list[int]:
    return [int(np.flatnonzero(active_C)[0]) for active_C in siblings]


def test_siblings_stand_by_the_larger_of_cosine_and_shared_contexts():
    scan, near = scene([(9, 0.7, range(30, 50)), (5, 0.3, range(10, 30))])
    assert starts(near.siblings(scan, 0, 1)) == [30, 10, 100]  # Jaccard index of the second: a third
    scan, near = scene([(9, 0.2, range(30, 50)), (5, 0.1, range(10, 30))])
    assert starts(near.siblings(scan, 0, 1)) == [10, 30, 100]
    scan, near = scene([(2, 0.8, range(0)), (5, 0.1, range(30, 40))])
    assert starts(near.siblings(scan, 0, 1)) == [100, 30]  # the scanned one is a neighbour itself
    assert starts(near.siblings(scan, 1, None)) == []


def test_a_twin_has_no_text_to_offer_so_the_next_sibling_gives_them():
    scan, near = scene([(9, 0.99, range(20)), (5, 0.6, range(30, 50))])
    plan = plan_latent(scan, 0, near.siblings(scan, 0, 1), Quota(8, 0, 4, 4, 2), (0,))
    texts = {verdict.context: verdict.weight for verdict in plan.verdicts if verdict.kind == SIBLING}
    assert set(texts) <= set(range(30, 50))
    assert len(texts) == 4
    assert set(texts.values()) == {20 / 4}
    assert sum(verdict.weight for verdict in plan.verdicts) == pytest.approx(200)


def test_a_sibling_with_few_texts_is_joined_by_the_next():
    scan, near = scene([(9, 0.9, range(18, 22)), (5, 0.6, range(30, 50))])
    plan = plan_latent(scan, 0, near.siblings(scan, 0, 1), Quota(8, 0, 6, 4, 2), (0,))
    texts = {verdict.context for verdict in plan.verdicts if verdict.kind == SIBLING}
    assert texts <= {20, 21, *range(30, 50)}
    assert sum(verdict.weight for verdict in plan.verdicts) == pytest.approx(200)


def test_without_neighbours_plans_are_those_of_the_scanned_latents(tmp_path):
    config = run_config(tmp_path)
    world = World()
    scan = ContextScan.merge([rank.scan_of(np.arange(rank.first, rank.last)) for rank in world.ranks])
    none = np.zeros((LATENTS, 0))
    empty = Neighbourhood(scan.latents, none.astype(np.int64), none, np.zeros(0, dtype=np.int64), none.astype(np.uint8))
    assert make_plans(config, scan) == make_plans(config, scan, near=empty)
