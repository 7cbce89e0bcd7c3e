from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from round_world import LATENTS, Tokenizer, World, run_config

from sae_ray.config import AlarmsConfig, RLAIFConfig
from sae_ray.reward.composition import LatentReward
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.watch import FIRINGS, firing, held_out_scores, rarefied_entropy, told, unscanned, watch


@pytest.fixture
def texts(tmp_path, monkeypatch) -> ContextTexts:
    monkeypatch.setattr("sae_ray.reward.contexts.load_tokenizer", lambda _: Tokenizer())
    return ContextTexts(run_config(tmp_path), World().blocks)


def scan_of(latents: list[int], keep: float = 1.0, positions: int = 8) -> ContextScan:
    """Latents that fire in the first `keep` of 100 contexts, on one of the first `positions` tokens."""
    context_C = np.arange(100)
    act_CN = np.zeros((100, len(latents)), dtype=np.float32)
    act_CN[: int(keep * 100)] = 1
    token_CN = np.repeat((8 * context_C + context_C % positions)[:, None], len(latents), axis=1).astype(np.int32)
    return ContextScan(np.array(latents), act_CN, np.zeros_like(act_CN), token_CN)


def test_the_entropy_of_a_few_draws_is_the_mean_over_all_of_them():
    kinds = [0, 0, 0, 0, 1, 1, 2, 3]
    found = []
    for drawn in itertools.combinations(kinds, 4):
        share = np.unique(drawn, return_counts=True)[1] / 4
        found.append(-(share * np.log(share)).sum())
    assert rarefied_entropy(np.bincount(kinds), 4) == pytest.approx(np.mean(found))
    assert rarefied_entropy(np.array([9]), 4) == 0
    assert rarefied_entropy(np.ones(9, dtype=int), 4) == pytest.approx(math.log(4))
    assert math.isnan(rarefied_entropy(np.array([3]), 4))
    assert math.isnan(rarefied_entropy(np.zeros(0, dtype=int), 4))


def test_entropy_is_over_the_ids_of_strongest_tokens_and_density_over_contexts(texts):
    world = World()
    scan = ContextScan.merge([rank.scan_of(np.arange(rank.first, rank.last)) for rank in world.ranks])
    entropy, density = firing(scan, texts)
    fires = world.fires_CM()
    assert [density[n] for n in range(LATENTS)] == pytest.approx(fires.mean(axis=0).tolist())
    assert set(entropy.values()) == {0.0}, "each latent fires on one word"
    ids = [int(world.tokens_BSL.reshape(-1, 8)[c, c % 8]) for c in range(50)]
    expected = rarefied_entropy(np.unique(ids, return_counts=True)[1], FIRINGS)
    assert firing(scan_of([3], keep=0.5), texts)[0][3] == pytest.approx(expected)
    entropy, density = firing(scan_of([3], keep=0), texts)
    assert math.isnan(entropy[3])
    assert density[3] == 0


def test_followed_latents_are_those_of_the_first_round_in_whatever_order_they_come(texts):
    settings = AlarmsConfig(reference_rounds=1)
    _, state = watch(settings, {}, scan_of([2, 5, 9]), texts)
    assert state["latents"] == [2, 5, 9]
    # One is gone and another has come: what both rounds have is compared.
    report, state = watch(settings, json.loads(json.dumps(state)), scan_of([5, 9, 11], keep=0.5), texts)
    rarity = next(alarm for alarm in report.alarms if alarm.name == "rarity")
    assert rarity.severity == pytest.approx(math.log(2))
    assert report.factor == pytest.approx((math.log(3) - math.log(2)) / (math.log(3) - math.log(1.5)))
    # That there are fewer firings does not make them narrower.
    assert told(report) == "alarms cool: rarity 0.69 (cool); gamma x 0.58"
    assert state["latents"] == [2, 5, 9]


def test_latents_that_are_not_judged_any_more_are_compared_all_the_same(texts):
    settings, judged = AlarmsConfig(), scan_of([11, 12])
    _, state = watch(settings, {}, scan_of([2, 5, 9]), texts)
    assert unscanned({}, judged).tolist() == []
    assert unscanned(state, judged).tolist() == [2, 5, 9]
    assert unscanned(state, scan_of([5, 11])).tolist() == [2, 9]
    report, _ = watch(settings, state, judged, texts)
    assert told(report) == "alarms ok; not measured: firing_entropy, rarity"
    report, state = watch(settings, state, judged, texts, also=scan_of([2, 5, 9], keep=0.2))
    assert told(report).startswith("alarms stop: rarity 1.61 (stop)")
    assert state["latents"] == [2, 5, 9]


def test_by_default_a_runs_last_round_is_compared_with_its_first():
    assert AlarmsConfig().reference_rounds < RLAIFConfig().rounds


def test_a_latent_that_is_left_with_one_token_stops_gamma_for_good(texts):
    texts._tokens_CS[:, 0] = 7
    settings = AlarmsConfig(reference_rounds=1)
    _, state = watch(settings, {}, scan_of([2]), texts)
    report, state = watch(settings, state, scan_of([2], positions=1), texts)
    narrowing = next(alarm for alarm in report.alarms if alarm.name == "firing_entropy")
    assert narrowing.severity == pytest.approx(firing(scan_of([2]), texts)[0][2])
    assert (report.state, report.factor) == ("stop", 0.0)
    report, _ = watch(settings, json.loads(json.dumps(state)), scan_of([2]), texts)
    assert (report.state, report.factor) == ("stop", 0.0)
    assert "gamma x 0.00" in told(report)


def test_limits_and_references_are_the_configs(texts):
    loose = AlarmsConfig.model_validate({"reference_rounds": 1, "limits": {"rarity": {"cool": 5, "stop": 9}}})
    _, state = watch(loose, {}, scan_of([2]), texts)
    assert watch(loose, state, scan_of([2], keep=0.1), texts)[0].state == "ok"


def test_scores_of_two_judges_are_paired_over_the_latents_that_both_have():
    def rewards(values: dict[int, float]) -> list[LatentReward]:
        return [LatentReward(n, "", "llm", 0.5 + v, 0.1, 0.5, v, 8) for n, v in values.items()]

    own, other = {1: 0.3, 2: 0.1, 3: 0.4}, {2: 0.2, 3: 0.1, 7: 0.9}
    train, held_out, error = held_out_scores(rewards(own), rewards(other))
    assert (train, held_out) == pytest.approx((0.25, 0.15))
    assert error == pytest.approx(np.std([-0.1, 0.3], ddof=1) / 2**0.5)
    assert held_out_scores(rewards(own), rewards({1: 0.2})) is None
    assert held_out_scores(rewards(own), []) is None
