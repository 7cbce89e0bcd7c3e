"""Which parts of the reward a judged round measures, what becomes of them, and that nothing else is touched."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from round_world import CONTEXT, WORDS, World, WorldJudge, run_config
from steering_world import Steering

from sae_ray.config import RunConfig
from sae_ray.reward import desk as desk_module
from sae_ray.reward.bank import VerdictBank
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.desk import CHUNK_LATENTS, RewardDesk
from sae_ray.reward.evidence import ContextScan, make_plans
from sae_ray.reward.history import UnitRows
from sae_ray.reward.parts import RewardParts
from sae_ray.reward.round_batch import reward_batch
from sae_ray.reward.rounds import compete, detect, rewards_of
from sae_ray.reward.siblings import look_around
from sae_ray.reward.specificity import Judged, JudgedTexts, choose_specific, far_ratio
from sae_ray.reward.weights import PARTS, RewardCombiner
from sae_ray.storage import LocalStorage

BONUS = {"estimator": "selection_bonus"}
OFF = {"enabled": False}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch) -> None:
    monkeypatch.setattr("sae_ray.reward.contexts.load_tokenizer", lambda _: _tokenizer())
    monkeypatch.setattr(desk_module.ray, "put", lambda value: value)


def _tokenizer() -> Any:
    from round_world import Tokenizer

    return Tokenizer()


def make_desk(config: RunConfig, steering: Any = None, judge: WorldJudge | None = None) -> RewardDesk:
    desk = RewardDesk(config.model_dump_json(), steering=steering)
    desk.judge = judge or WorldJudge()  # type: ignore[assignment]
    desk.parts = RewardParts(config, desk.judge, steering)
    return desk


def judged(desk: RewardDesk, world: World, number: int = 0) -> tuple[dict[str, Any], RewardBatch]:
    summary, batch = asyncio.run(desk.judge_round(number, 10 + number, world.ranks, world.evidence))
    return summary, batch  # type: ignore[return-value]


def weights(**parts: float) -> dict[str, Any]:
    return BONUS | {"rewards": {"weights": {"interpretability": 0, **parts}}}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("computed although nothing needs it")


def same(one: RewardBatch, other: RewardBatch) -> None:
    for each in dataclasses.fields(RewardBatch):
        a, b = getattr(one, each.name), getattr(other, each.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, each.name
            np.testing.assert_array_equal(a, b, err_msg=each.name)
        else:
            assert a == b, each.name


async def as_before(config: RunConfig, world: World, scan: ContextScan) -> RewardBatch:
    """Plans, competition and detection in the order and with the random numbers that rounds have always had."""
    judge, texts = WorldJudge(), ContextTexts(config, world.blocks)
    unit = UnitRows.merge([rank.unit_rows_of(scan.latents.tolist()) for rank in world.ranks])
    near = await look_around(world.ranks, world.evidence, CONTEXT, scan.latents, scan, unit)
    plans, rewards, rows = make_plans(config, scan, near=near), [], []

    def make_row(plan, candidate, verdict, raw, *, chosen, purpose):
        column = scan.latents.tolist().index(plan.latent)
        return {
            "latent": plan.latent, "explanation": candidate.text, "purpose": purpose, "context": verdict.context,
            "active": verdict.kind == "positive", "token": int(scan.token_CN[verdict.context, column]),
            "weight": verdict.weight, "margin": float(scan.margin_CN[verdict.context, column]), "score": raw,
            "probability": judge.probability(candidate.text, raw),
        }  # fmt: skip

    for start in range(0, len(plans), CHUNK_LATENTS):
        rng = np.random.default_rng([config.seed, 8, 0, start])
        choices, chosen_by = await compete(plans[start : start + CHUNK_LATENTS], {}, texts, judge, make_row)
        detections, more = await detect(choices, texts, judge, make_row, rng)
        rewards += rewards_of(choices, detections)
        rows += chosen_by + more
    return reward_batch(0, 10, rewards, rows, judge.rates)


@pytest.mark.parametrize("alarms", [{}, OFF])
def test_with_default_weights_a_round_is_what_it_was_and_measures_no_part(tmp_path, monkeypatch, alarms):
    world, config = World(), run_config(tmp_path, alarms=alarms)
    for part in PARTS:
        monkeypatch.setattr(RewardParts, f"_{part}", never)
    monkeypatch.setattr(RewardCombiner, "combine", never)
    if alarms:
        monkeypatch.setattr(desk_module, "watch", never)
        monkeypatch.setattr("sae_ray.reward.applied.AppliedRounds.memory_before", never)
    desk = make_desk(config)
    asyncio.run(desk.parts.prepare())
    _, batch = judged(desk, world)
    latents = batch.latents if len(batch.latents) == 12 else None
    assert latents is not None, "every chosen latent of this world can be judged"
    scan = ContextScan.merge([rank.scan_of(rank.own(latents.tolist())) for rank in world.ranks])
    assert batch.reward is None
    assert batch.judged_ND is not None
    assert np.array_equal(batch.judged_ND, np.eye(WORDS)[latents])  # the encoder rows of this world
    same(dataclasses.replace(batch, judged_ND=None), asyncio.run(as_before(config, world, scan)))
    assert [rank.decoder_rows.calls for rank in world.ranks] == [0, 0]
    assert [rank.scan.calls for rank in world.ranks] == [1, 1]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_weight_is_not_even_called(tmp_path, monkeypatch, part):
    world = World()
    config = run_config(tmp_path, alarms=OFF, **weights(**{part: 1.0, "description": 1.0}))
    for other in PARTS:
        if other not in (part, "description"):
            monkeypatch.setattr(RewardParts, f"_{other}", never)

    async def measured(self: Any, outcome: Any) -> dict[int, float]:
        assert (outcome.decoder is not None) == (part not in ("interpretability", "description"))
        return {reward.latent: float(reward.latent) for reward in outcome.rewards}

    monkeypatch.setattr(RewardParts, f"_{part}", measured)
    summary, batch = judged(make_desk(config), world)
    assert {key.split("/")[0] for key in summary["parts"]} == {part, "description", "advantage"}
    # By the decoder's reader: nobody, the judged rows, or the whole decoder.
    asked = {rank.decoder_rows.calls for rank in world.ranks}
    assert asked == ({0} if part in ("interpretability", "description") else {1})
    assert np.isfinite(batch.reward).all()


def questions(folder: Path, **rlaif: Any) -> tuple[dict[str, int], dict[str, Any], RewardBatch]:
    """(banked verdicts by purpose, summary, batch) of a round of which every question to the judge is banked."""
    config, judge = run_config(folder, alarms=OFF, **rlaif), WorldJudge()
    desk = make_desk(config, Steering(), judge)
    summary, batch = judged(desk, World())
    bank = VerdictBank(LocalStorage(config.run_dir)).read()
    steered = [pair for pair in judge.asked if pair not in {(row["text"], row["explanation"]) for row in bank}]
    assert len(judge.asked) - len(bank) == len(steered), "what is not banked is about steered texts"
    return dict(Counter(row["purpose"] for row in bank)), summary, batch


def test_without_a_weight_on_interpretability_no_other_latents_explanation_is_asked_about(tmp_path):
    default, told, _ = questions(tmp_path / "default")
    assert default["shuffled"] == default["score"] > 0
    assert 0.3 < told["mean_shuffled"] < 0.7
    by_reward, summary, batch = questions(tmp_path / "reward", **weights(atomicity=1.0))
    assert by_reward == {purpose: n for purpose, n in default.items() if purpose != "shuffled"}
    assert summary["mean_shuffled"] is None, "what nobody measured is missing"
    assert (batch.credit_weight > 0).any()
    both, _, _ = questions(tmp_path / "both", **weights(atomicity=1.0, interpretability=0.5))
    assert both == default


def test_an_estimator_that_weighs_latents_by_trust_has_the_null_asked_under_any_weights(tmp_path):
    steered = {"prompts": 3, "prompt_tokens": 4, "samples": 2}
    rewards = {"weights": {"interpretability": 0, "causality": 1.0}, "causality": steered}
    found, _, _ = questions(tmp_path, estimator="teacher_gate+policy_gradient", rewards=rewards)
    assert found["shuffled"] == found["score"]


def test_parts_become_one_advantage_in_units_of_the_clip(tmp_path):
    settings = {"interpretability": 1.0, "description": 0.5}
    config = run_config(tmp_path, alarms=OFF, **weights(**settings))
    judge = WorldJudge()
    summary, batch = judged(make_desk(config, judge=judge), World())
    bank = VerdictBank(LocalStorage(config.run_dir)).read()
    chosen = {row["latent"]: row["explanation"] for row in bank if row["purpose"] == "score"}
    # A reading of n words costs 2 n + 1 nats here; both candidates hold the word that decides, so either may win.
    by_hand = RewardCombiner(settings).combine(
        {
            "interpretability": _interpretability(bank),
            "description": _description(bank, chosen),
        }
    )
    np.testing.assert_allclose(batch.reward, by_hand.advantage / (4 * 1.25**0.5), rtol=1e-5, atol=1e-7)
    assert np.ptp(batch.reward) > 0.1
    assert summary["parts"]["description/weight"] == 0.5
    assert summary["parts"]["interpretability/known"] == 12
    assert summary["rewards"] == int((batch.credit_weight > 0).sum())


def _interpretability(bank: list[dict[str, Any]]) -> dict[int, float]:
    out = {}
    for latent in {row["latent"] for row in bank}:
        aurocs = {}
        for purpose in ("score", "shuffled"):
            rows = [row for row in bank if row["latent"] == latent and row["purpose"] == purpose]
            wins = [
                (a["score"] > b["score"]) + 0.5 * (a["score"] == b["score"])
                for a in rows if a["active"] for b in rows if not b["active"]
            ]  # fmt: skip
            aurocs[purpose] = np.mean(wins)
        out[latent] = float(aurocs["score"] - aurocs["shuffled"])
    return out


def _description(bank: list[dict[str, Any]], chosen: dict[int, str]) -> dict[int, float]:
    """Minus bits, less what the least squares line over the latents gives for an F1 beyond their mean."""
    rivals = {latent: _rivals(bank, latent) for latent in sorted(chosen)}
    together = [list(rivals.values())[start : start + CHUNK_LATENTS] for start in range(0, len(rivals), CHUNK_LATENTS)]
    ratios = [far_ratio((list(told.values()), texts) for told, texts in chunk) for chunk in together]
    found = [
        _shortest(*rivals[latent], chosen[latent], ratios[index // CHUNK_LATENTS])
        for index, latent in enumerate(sorted(chosen))
    ]
    bits, f1 = np.array(found).T
    slope = max(0.0, np.polyfit(f1, bits, 1)[0])
    return dict(zip(sorted(chosen), slope * (f1 - f1.mean()) - bits, strict=True))


def _rivals(bank: list[dict[str, Any]], latent: int) -> tuple[dict[str, np.ndarray], JudgedTexts]:
    """The probabilities that each candidate got, and the texts."""
    rows = [row for row in bank if row["latent"] == latent and row["purpose"] == "select"]
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sides.setdefault(row["explanation"], []).append(row)
    first = next(iter(sides.values()))
    texts = JudgedTexts(*(np.array([row[key] for row in first]) for key in ("active", "weight", "kind")))
    return {e: np.array([row["probability"] for row in side]) for e, side in sides.items()}, texts


def _shortest(told: dict[str, np.ndarray], texts: JudgedTexts, chosen: str, ratio: float | None) -> tuple[float, float]:
    """(bits, F1) of the shortest candidate with an F1 within an error of the chosen one's."""
    fits = choose_specific([Judged(each, len(e.split())) for e, each in told.items()], texts, ratio).fits
    fit = dict(zip(told, fits, strict=True))
    good = [e for e in told if e == chosen or fit[e].f1 >= fit[chosen].f1 - fit[chosen].f1_error]
    bits = {e: (2 * len(e.split()) + 1) / np.log(2) for e in told}
    shortest = min(good, key=bits.__getitem__)
    return float(bits[shortest]), fit[shortest].f1


def test_a_resumed_run_goes_on_with_the_baselines_of_the_round_before(tmp_path):
    world = World()
    settings = weights(interpretability=1.0, description=1.0)
    whole = make_desk(run_config(tmp_path / "whole", **settings))
    resumed = make_desk(run_config(tmp_path / "resumed", **settings))
    for desk in (whole, resumed):
        judged(desk, world)
        desk.keep(0, 11)
    summary, batch = judged(whole, world, 1)
    # Another process, which judges the round twice because its first answer was lost.
    resumed = make_desk(run_config(tmp_path / "resumed", **settings))
    judged(resumed, world, 1)
    again_summary, again = judged(resumed, world, 1)
    same(batch, again)
    assert summary["parts"] == again_summary["parts"]
    assert summary["alarms"] == again_summary["alarms"]
    alone = make_desk(run_config(tmp_path / "alone", **settings))
    judged(alone, world)
    _, without_memory = judged(alone, world, 1)
    assert (without_memory.reward != batch.reward).any(), "a round that was never applied leaves nothing behind"


def test_the_desk_answers_and_can_be_cancelled_while_it_plans(tmp_path, monkeypatch):
    world, desk = World(), make_desk(run_config(tmp_path))
    planning, goes_on = threading.Event(), threading.Event()

    def plans(*_: Any) -> list[Any]:
        planning.set()
        assert goes_on.wait(30)
        return []

    async def look() -> None:
        round_ = asyncio.create_task(desk.judge_round(0, 10, world.ranks, world.evidence))
        assert await asyncio.to_thread(planning.wait, 30)
        assert desk.progress()["queue"] == 0
        assert not round_.done()
        round_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await round_
        goes_on.set()

    monkeypatch.setattr(desk_module, "make_plans", plans)
    asyncio.run(look())


def test_only_the_round_that_was_judged_last_can_be_kept(tmp_path):
    desk = make_desk(run_config(tmp_path))
    judged(desk, World())
    with pytest.raises(RuntimeError, match="round 3 is to be kept"):
        desk.keep(3, 12)
    desk.keep(0, 12)
    assert desk.applied.read(0).at_step == 12


def test_alarms_are_in_the_summary_and_their_factor_is_in_the_batch(tmp_path):
    world = World()
    desk = make_desk(run_config(tmp_path, alarms={"reference_rounds": 1}))
    summary, batch = judged(desk, world)
    assert (batch.gamma_factor, summary["alarms"]["told"]) == (1.0, "alarms ok")
    assert summary["alarms"]["alarm/held_out_gap"] is None, "nobody is asked"
    assert summary["alarms"]["alarm/duplicates"] is None
    desk.keep(0, 11)
    # Half of each latent's firings go: rarer by ln 2, between the limits ln 1.5 and ln 3.
    fires = np.stack([(world.tokens_BSL == latent).reshape(-1) for latent in range(24)])
    peak = world.x_TD.numpy()[:, :24].T
    world.threshold_M = np.array([2 * np.median(p[f]) for p, f in zip(peak, fires, strict=True)])
    summary, batch = judged(desk, world, 1)
    assert summary["alarms"]["state"] in ("cool", "stop")
    assert batch.gamma_factor == summary["alarms"]["alarm/gamma_factor"] < 1
    assert "rarity" in summary["alarms"]["told"]


def test_alarms_follow_the_first_latents_when_others_are_judged_and_change_no_plan(tmp_path):
    found = {}
    for alarms in ({}, OFF):
        world = World()
        desk = make_desk(run_config(tmp_path / str(bool(alarms)), choose="random", latents=5, alarms=alarms))
        _, first = judged(desk, world)
        desk.keep(0, 11)
        world.threshold_M[:] = 2.02  # many firings go
        summary, second = judged(desk, world, 1)
        found[bool(alarms)] = second
        assert set(second.latents.tolist()) != set(first.latents.tolist())
        if not alarms:
            assert desk.applied.read(0).memory["alarms"]["latents"] == first.latents.tolist()
            assert summary["alarms"]["alarm/rarity"] > 0.3
            assert "not measured: rarity" not in summary["alarms"]["told"]
    assert [rank.scan.calls for rank in world.ranks] == [2, 2], "without alarms nothing more is scanned"
    same(dataclasses.replace(found[False], gamma_factor=1.0), found[True])


def test_duplicates_are_counted_only_when_asked_for(tmp_path):
    world = World()
    summary, _ = judged(make_desk(run_config(tmp_path, alarms={"duplicates": True})), world)
    assert summary["alarms"]["alarm/duplicates"] == 0.0, "the first round is the reference"
    assert {rank.decoder_rows.calls for rank in world.ranks} == {1}
    cosine = world.W_dec @ world.W_dec.T / np.outer(*[np.linalg.norm(world.W_dec, axis=1)] * 2)
    twins = (cosine - 9 * np.eye(24)).max(axis=1) >= 0.9
    desk = make_desk(run_config(tmp_path, alarms={"duplicates": True}))
    judged(desk, world)
    desk.keep(0, 11)
    assert desk.applied.read(0).memory["alarms"]["alarms"]["references"]["duplicates"] == [twins.mean()]


def test_a_held_out_judge_is_asked_the_same_questions_only_by_its_alarm(tmp_path):
    world, held_out = World(), WorldJudge(seed=9)
    config = run_config(tmp_path, alarms={"held_out": False})
    assert make_desk(config).heldout is None
    tree = config.model_dump()
    tree["judges"] = {"heldout": {"endpoint": "http://127.0.0.1:1/v1"}}
    tree["rlaif"]["alarms"]["held_out"] = True
    own = WorldJudge()
    desk = make_desk(RunConfig.model_validate(tree), judge=own)
    assert desk.heldout is not None
    desk.heldout = held_out  # type: ignore[assignment]
    summary, _ = judged(desk, world)
    assert summary["alarms"]["alarm/held_out_gap"] == 0.0, "the first round is the reference"
    assert set(held_out.asked) < set(own.asked)
    desk.keep(0, 11)
    gap, error = desk.applied.read(0).memory["alarms"]["alarms"]["references"]["held_out_gap"][0]
    bank = VerdictBank(LocalStorage(config.run_dir)).read()
    theirs = _interpretability(
        [row | {"score": held_out.raw(row["text"], row["explanation"])} for row in bank if row["purpose"] != "select"]
    )
    difference = np.array([value - theirs[latent] for latent, value in _interpretability(bank).items()])
    assert gap == pytest.approx(difference.mean())
    assert error == pytest.approx(difference.std(ddof=1) / len(difference) ** 0.5)


def test_contexts_give_ids_and_their_beginning(tmp_path):
    world = World()
    texts = ContextTexts(run_config(tmp_path), world.blocks)
    np.testing.assert_array_equal(texts.tokens(5), world.tokens_BSL.reshape(-1, CONTEXT)[5])
    assert texts[5].startswith(texts.opening(5, 3))
    assert len(texts.opening(5, 3).split()) == 3


# ---------------------------------------------------------------------- rollouts

CAUSAL = {
    "weights": {"interpretability": 1, "causality": 1},
    "causality": {"prompts": 3, "prompt_tokens": 4, "samples": 2},
}


@pytest.mark.parametrize("estimator", ["policy_gradient", "teacher_gate+policy_gradient"])
def test_steered_generations_come_as_rollouts_whose_mean_is_the_latents_causality(tmp_path, estimator):
    steering, judge = Steering(), WorldJudge(noise=0.0)
    desk = make_desk(run_config(tmp_path, estimator=estimator, rewards=CAUSAL), steering, judge)
    world = World()
    summary, batch = judged(desk, world)
    rollouts = batch.rollouts
    unit_MO = world.W_dec / np.linalg.norm(world.W_dec, axis=1, keepdims=True)
    np.testing.assert_array_equal(batch.judged_decoder_ND, unit_MO[batch.latents].astype(np.float16))
    latents, _, texts, sent = steering.asked
    assert (sent.gradients, steering.steer.calls) == (True, 1)
    steerable = [n for n in latents if n != 20]
    assert rollouts.latent.tolist() == np.repeat(steerable, 6).tolist()
    assert summary["rollouts"] == len(rollouts.latent)
    np.testing.assert_array_equal(rollouts.log_prob_grad[:, 0], rollouts.latent)
    np.testing.assert_array_equal(rollouts.log_prob_grad[:, 1], np.tile([0, 0, 1, 1, 2, 2], len(steerable)))
    np.testing.assert_array_equal(rollouts.log_prob_grad[:, 2], np.tile([0, 1] * 3, len(steerable)))
    np.testing.assert_allclose(rollouts.strength, 1 + rollouts.latent)
    yes, no = (1 / (1 + np.exp(-v)) for v in (1, -1))
    for n in steerable:
        shows = np.array([f"w{n}" in text.split() for text in texts])
        steered = np.where(shows | (n < 10), yes, no)
        expected = np.repeat(steered - np.where(shows, yes, no).mean(), 2)
        np.testing.assert_allclose(rollouts.reward[rollouts.latent == n], expected, atol=1e-6)
    desk.keep(0, 11)
    kept = desk.applied.read(0).batch.rollouts
    for name in ("latent", "strength", "reward", "log_prob_grad"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(rollouts, name))
    assert (kept.perturbation, kept.sigma) == (None, 0.0)


def test_an_estimator_without_rollouts_gets_none_and_shuffling_deals_their_rewards_anew(tmp_path):
    steering = Steering()
    config = run_config(tmp_path / "bonus", **BONUS, rewards=CAUSAL)
    summary, batch = judged(make_desk(config, steering), World())
    assert batch.rollouts is None
    assert "rollouts" not in summary
    assert not steering.asked[3].gradients
    found = []
    for shuffle in (False, True):
        settings = {"estimator": "policy_gradient", "rewards": CAUSAL, "shuffle_verdicts": shuffle}
        desk = make_desk(run_config(tmp_path / str(shuffle), **settings), Steering(), WorldJudge(noise=0.0))
        found.append(judged(desk, World())[1].rollouts)
    plain, dealt = found
    np.testing.assert_array_equal(plain.log_prob_grad, dealt.log_prob_grad)
    np.testing.assert_allclose(np.sort(plain.reward), np.sort(dealt.reward))
    assert (plain.reward != dealt.reward).mean() > 0.2
