"""Each part of the reward on a small world, against plain references."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayTaskError
from round_world import CONTEXT, LATENTS, Remote, Tokenizer, World, WorldJudge, run_config
from steering_world import Steering

from sae_ray.errors import UserError
from sae_ray.evidence.logit_lens import Unembedding
from sae_ray.reward.atomicity import compositions, fit_atoms
from sae_ray.reward.composition import LatentReward
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.decoder import COSINE_LIMIT, duplicate_share, look_at_decoder
from sae_ray.reward.evidence import ContextScan, LatentPlan
from sae_ray.reward.logit_effect import logit_effects
from sae_ray.reward.overlap import nearest_rows
from sae_ray.reward.parts import Outcome, RewardParts, prompts
from sae_ray.reward.rounds import Candidate, Choice
from sae_ray.reward.specificity import Fit

JUDGED = np.array([1, 3, 4, 7, 14, 20])
EXPLANATIONS = {1: "w1", 3: "w3", 4: "Twins!", 7: "w7", 14: "twins", 20: "w20"}


@pytest.fixture(autouse=True)
def _words(monkeypatch) -> None:
    monkeypatch.setattr("sae_ray.reward.contexts.load_tokenizer", lambda _: Tokenizer())


@pytest.fixture
def world() -> World:
    return World()


def scan_of(world: World, latents: np.ndarray) -> ContextScan:
    return ContextScan.merge([rank.scan_of(rank.own(latents.tolist())) for rank in world.ranks])


def rewards() -> list[LatentReward]:
    return [LatentReward(n, EXPLANATIONS[n], "llm", 0.8, 0.1, 0.5, 0.3, 16) for n in JUDGED.tolist()]


def outcome(world: World, folder: Any, whole: bool = False, near: bool = False) -> Outcome:
    scan = scan_of(world, JUDGED)

    async def rescan(latents: np.ndarray) -> ContextScan:
        return scan_of(world, latents)

    decoder = asyncio.run(look_at_decoder(world.ranks, LATENTS, scan, rescan, whole=whole, near=near))
    texts = ContextTexts(run_config(folder), world.blocks)
    return Outcome(scan, texts, [], rewards(), decoder)


def parts(folder: Any, judge: Any = None, steering: Any = None, **settings: Any) -> RewardParts:
    weights = {"interpretability": 1, "description": 1}
    rlaif = {"estimator": "selection_bonus", "rewards": {"weights": weights, **settings}}
    return RewardParts(run_config(folder, **rlaif), judge or WorldJudge(), steering)


# ---------------------------------------------------------------------- the decoder


def test_rows_come_from_all_ranks_in_the_order_of_the_latents(world, tmp_path):
    facts = outcome(world, tmp_path).decoder
    np.testing.assert_array_equal(facts.rows_NO, world.W_dec[JUDGED])
    assert (facts.whole_MO, facts.near) == (None, None)
    np.testing.assert_array_equal(outcome(world, tmp_path, whole=True).decoder.whole_MO, world.W_dec)


def test_only_close_neighbours_are_scanned_and_only_once(world, tmp_path):
    scanned = []

    async def rescan(latents: np.ndarray) -> ContextScan:
        scanned.append(latents.tolist())
        return scan_of(world, latents)

    asyncio.run(look_at_decoder(world.ranks, LATENTS, scan_of(world, JUDGED), rescan, whole=True, near=True))
    unit = world.W_dec / np.linalg.norm(world.W_dec, axis=1, keepdims=True)
    cosine = unit @ unit.T - 9 * np.eye(LATENTS)
    # As long as fewer than the four neighbours that are looked for are close.
    close = np.flatnonzero((cosine[JUDGED] > COSINE_LIMIT).any(axis=0))
    assert scanned == [np.setdiff1d(close, JUDGED).tolist()]
    assert {5, 15} <= set(scanned[0])


def test_the_share_of_duplicates_counts_both_twins(world):
    assert duplicate_share(torch.from_numpy(world.W_dec)) == pytest.approx(2 / LATENTS)
    assert duplicate_share(torch.eye(5)) == 0
    assert duplicate_share(torch.zeros(5, 3)) == 0


def test_of_a_large_decoder_the_share_of_twins_is_that_of_some_rows_among_all(monkeypatch):
    rows_MO = torch.randn(20_000, 24, generator=torch.Generator().manual_seed(0))
    rows_MO[:600] = rows_MO[10_000:10_600]  # 6% of all have a twin, most of them one that is not counted itself
    looked_at = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        looked_at.append(len(args[0]))
        return nearest_rows(*args, **kwargs)

    monkeypatch.setattr("sae_ray.reward.decoder.nearest_rows", counting)
    assert duplicate_share(rows_MO) == pytest.approx(0.06, abs=0.012)
    assert looked_at == [4096]


# ---------------------------------------------------------------------- judge-free parts


def test_splitting_is_minus_duplicates_splits_and_shared_explanations(world, tmp_path):
    fires = world.fires_CM()
    fires[:, 5] = fires[:, 4]  # twins that fire together; 3 and 15 take turns
    world.ranks[0].scan_of = _firing_as(world.ranks[0].scan_of, {5: 4})
    found = asyncio.run(parts(tmp_path)._splitting(outcome(world, tmp_path, whole=True, near=True)))
    unit = world.W_dec / np.linalg.norm(world.W_dec, axis=1, keepdims=True)
    for latent in JUDGED:
        duplicate = split = 0.0
        for other in range(LATENTS):
            close = np.clip((unit[latent] @ unit[other] - 0.6) / 0.4, 0, 1)
            if other == latent or close == 0:
                continue
            a, b = fires[:, latent], fires[:, other]
            jaccard = (a & b).sum() / (a | b).sum()
            duplicate, split = max(duplicate, close * jaccard), max(split, close * (1 - jaccard))
        shared = 0.5 if latent in (4, 14) else 0.0
        assert found[latent] == pytest.approx(-(duplicate + split + shared), abs=1e-5)
    assert found[4] < -1.4
    assert found[3] < -0.2


def _firing_as(scan_of: Any, alias: dict[int, int]) -> Any:
    """Latents that respond as others do."""

    def changed(latents: np.ndarray) -> ContextScan:
        scan = scan_of(np.array([alias.get(int(latent), int(latent)) for latent in latents], dtype=np.int64))
        return ContextScan(np.asarray(latents), scan.act_CN, scan.margin_CN, scan.token_CN)

    return changed


def test_atomicity_is_minus_what_shared_atoms_compose_of_each_row(world, tmp_path):
    settings = {"atoms": 8, "per_code": 3, "rounds": 6}
    found = asyncio.run(parts(tmp_path, atomicity=settings)._atomicity(outcome(world, tmp_path, whole=True)))
    whole = torch.from_numpy(world.W_dec)
    composed = compositions(whole, fit_atoms(whole, 8, 3, 6, seed=5)).composed
    assert list(found) == JUDGED.tolist()
    assert list(found.values()) == pytest.approx((-composed[JUDGED]).tolist(), abs=1e-6)
    assert min(found.values()) < -0.01


def test_logit_effects_are_of_the_token_behind_the_strongest_one(world, tmp_path):
    lens = Unembedding(torch.randn(60, 16, generator=torch.Generator().manual_seed(3)), torch.ones(16))
    measuring = parts(tmp_path)
    measuring._unembedding = lens
    found = asyncio.run(measuring._logit_effect(outcome(world, tmp_path)))
    tokens_CS = world.tokens_BSL.reshape(-1, CONTEXT)
    x_CSV = world.x_TD.numpy().reshape(-1, CONTEXT, 60)
    following = []
    for latent in JUDGED:
        examples = []
        for tokens_S, x_SV in zip(tokens_CS, x_CSV, strict=True):
            if latent in tokens_S:
                peak = int(x_SV[:, latent].argmax())
                examples.append(tokens_S[peak + 1 : peak + 2].astype(np.int64))
        following.append(examples)
    expected = logit_effects(torch.from_numpy(world.W_dec[JUDGED]), lens, following, JUDGED.tolist(), seed=5)
    assert found == pytest.approx({one.latent: one.score for one in expected}, abs=1e-6)


def test_the_unembedding_is_that_of_the_language_model_and_is_loaded_once_and_only_when_needed(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("sae_ray.reward.parts._unembedding", lambda config: loaded.append(config.model.name) or "lens")
    asyncio.run(parts(tmp_path).prepare())
    assert loaded == []
    weights = {"weights": {"logit_effect": 1.0}}
    config = run_config(tmp_path, estimator="selection_bonus", rewards=weights)
    threads = torch.get_num_threads()
    try:
        asyncio.run(RewardParts(config, WorldJudge()).prepare())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert loaded == ["smollm2-135m-instruct"]


# ---------------------------------------------------------------------- description


def fit(f1: float) -> Fit:
    return Fit(f1, 0.05, 0.9, 0.05, 0.2, 0.5)


def choice(latent: int, *offered: tuple[str, float]) -> Choice:
    candidates = tuple(Candidate(text, "llm") for text, _ in offered)
    return Choice(LatentPlan(latent, [], [], []), candidates[0], candidates, tuple(fit(f1) for _, f1 in offered))


def described(folder: Any, priors: dict[str, float | None], choices: list[Choice]) -> dict[int, float]:
    async def read(explanations: list[str]) -> list[float | None]:
        return [priors.get(explanation) for explanation in explanations]

    measuring = parts(folder, SimpleNamespace(priors=read))
    got = [LatentReward(c.plan.latent, c.explanation.text, "llm", 0.8, 0.1, 0.5, 0.3, 16) for c in choices]
    return asyncio.run(measuring._description(Outcome(None, None, choices, got)))  # type: ignore[arg-type]


def test_a_latent_that_can_only_be_said_at_length_has_less_than_one_that_can_be_said_in_a_word(tmp_path):
    nats = {"all about dogs": -9.0, "dogs": -4.0, "cats": -4.0, "anything": -1.0, "tokens of any kind but nouns": -90.0}
    choices = [
        choice(1, ("all about dogs", 0.80), ("dogs", 0.78)),
        choice(2, ("cats", 0.8), ("anything", 0.3)),
        choice(3, ("tokens of any kind but nouns", 0.8)),
    ]
    bits = {1: -4 / math.log(2), 2: -4 / math.log(2), 3: -90 / math.log(2)}
    assert described(tmp_path, nats, choices) == pytest.approx(bits)


def test_bits_that_latents_usually_pay_for_their_score_are_excused(tmp_path):
    scores = [0.4 + 0.05 * n for n in range(10)]
    nats = {f"e{n}": -20 * score for n, score in enumerate(scores)} | {"e3": -20 * scores[3] - 6}
    found = described(tmp_path, nats, [choice(n, (f"e{n}", score)) for n, score in enumerate(scores)])
    assert min(found, key=found.__getitem__) == 3
    others = [value for latent, value in found.items() if latent != 3]
    assert np.ptp(others) < 2, "they all pay the common price: by length alone they differ by 13 bits"
    assert min(others) - found[3] > 7


def test_words_are_counted_where_nothing_is_read_and_lost_readings_are_missing(tmp_path):
    choices = [choice(1, ("all about dogs", 0.80), ("dogs", 0.78)), choice(2, ("cats", 0.8))]
    assert described(tmp_path, {}, choices) == {1: -1, 2: -1}
    assert described(tmp_path, {"cats": -3.0, "dogs": -1.0}, choices) == pytest.approx({2: -3 / math.log(2)})


# ---------------------------------------------------------------------- causality


def test_causality_is_what_a_latents_own_steering_shows_beyond_both_controls(world, tmp_path):
    steering, judge = Steering(), WorldJudge(noise=0.0)
    settings = {"prompts": 3, "prompt_tokens": 4, "samples": 2, "target_kl": 0.25}
    found = asyncio.run(parts(tmp_path, judge, steering, causality=settings)._causality(outcome(world, tmp_path)))
    yes, no = (1 / (1 + math.exp(-v)) for v in (1, -1))
    latents, W, texts, sent = steering.asked
    # A prompt that holds the word shows it whether it is steered or not.
    gain = {n: (yes - no) * np.mean([f"w{n}" not in text.split() for text in texts]) for n in (1, 3, 7)}
    assert found == pytest.approx({**gain, 4: 0, 14: 0})
    assert max(gain.values()) > 0.3
    assert latents == JUDGED.tolist()
    np.testing.assert_array_equal(W, world.W_dec[JUDGED])
    assert len(set(texts)) == 3
    assert all(len(text.split()) == 4 for text in texts)
    assert (sent.target_kl, sent.samples, sent.seed) == (0.25, 2, 5)
    assert not sent.gradients, "what nobody learns from is not computed"
    assert len(judge.asked) == len(set(judge.asked)), "nothing is asked twice"


def test_prompts_are_the_same_in_every_round_and_too_few_are_named(world, tmp_path):
    texts = ContextTexts(run_config(tmp_path), world.blocks)
    assert prompts(texts, 4, 5, seed=1) == prompts(texts, 4, 5, seed=1)
    with pytest.raises(UserError, match=r"causality\.prompts = 4: only 0 evidence contexts are longer than"):
        prompts(texts, 4, CONTEXT, seed=1)


def test_trouble_of_the_steered_model_is_told_as_its_own(tmp_path):
    def fails() -> Any:
        raise RayTaskError("ready", "traceback", UserError("hook.layer = 40: the model has 30 layers"))

    steering = SimpleNamespace(ready=Remote(fails))
    weights = {"weights": {"causality": 1.0}}
    config = run_config(tmp_path, estimator="selection_bonus", rewards=weights)
    with pytest.raises(UserError, match=r"^hook\.layer = 40: the model has 30 layers$"):
        asyncio.run(RewardParts(config, WorldJudge(), steering).prepare())
