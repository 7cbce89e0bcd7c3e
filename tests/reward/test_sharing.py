"""Close latents with one explanation: who keeps its credit, in a round and over rounds, and what a replay gets."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from round_world import LATENTS, WIDTH, WORDS, Tokenizer, World, WorldJudge, run_config

from sae_ray.reward import desk as desk_module
from sae_ray.reward.composition import LatentReward
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.desk import RewardDesk
from sae_ray.reward.evidence import ContextScan, LatentPlan
from sae_ray.reward.history import UnitRows
from sae_ray.reward.rounds import Candidate, Choice
from sae_ray.reward.sharing import newest_holder_each, one_holder_each
from sae_ray.reward.specificity import Fit


class EitherWord(WorldJudge):
    """A text shows an explanation where it holds any of its words."""

    def __init__(self, explanation_of: dict[int, str]) -> None:
        super().__init__(noise=0.3)
        self.explanation_of, self.explained = explanation_of, []

    def raw(self, text: str, explanation: str) -> float:
        words = explanation.split()
        own = next((word for word in words if word in text.split()), words[0])
        return super().raw(text, own)

    async def explain(self, plan: LatentPlan) -> list[Candidate]:
        self.explained.append(plan.latent)
        return [Candidate(self.explanation_of.get(plan.latent, f"w{plan.latent}"), "llm")]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch) -> None:
    monkeypatch.setattr("sae_ray.reward.contexts.load_tokenizer", lambda _: Tokenizer())
    monkeypatch.setattr(desk_module.ray, "put", lambda value: value)


def twins_and_others() -> tuple[World, EitherWord]:
    """5 fires where 4 does and lies beside it, and both have one explanation; so have 8 and 9, each of which fires on
    a word of its own and lies elsewhere; 21 fires where 20 does and is explained otherwise."""
    world = World()
    world.word_M[[5, 21]] = [4, 20]
    world.W_dec = np.pad(world.W_dec, ((0, 0), (0, WORDS - WIDTH)))  # as wide as the encoder's rows
    return world, EitherWord({4: "w4", 5: "w4", 8: "w8 w9", 9: "w8 w9", 21: "w20 w59"})


def judged(
    folder: Any, world: World, judge: WorldJudge, rounds: int = 1, **rlaif: Any
) -> tuple[RewardDesk, list[tuple[dict[str, Any], RewardBatch]]]:
    quota = {"near_misses": 10, "randoms": 30}
    desk = RewardDesk(run_config(folder, latents=LATENTS, **quota, **rlaif).model_dump_json())
    desk.judge = judge  # type: ignore[assignment]
    found: list[Any] = []
    for number in range(rounds):
        found.append(asyncio.run(desk.judge_round(number, 10 + number, world.ranks, world.evidence)))
        desk.keep(number, 11 + number)
    return desk, found


def credit(batch: RewardBatch) -> dict[int, float]:
    return dict(zip(batch.latents.tolist(), batch.credit_weight.tolist(), strict=True))


def test_twins_do_not_both_earn_credit_for_one_explanation_and_unlike_latents_do(tmp_path):
    world, judge = twins_and_others()
    for name in ("twins", "alone"):
        if name == "alone":
            world.W_dec[5], world.word_M[5] = -world.W_dec[4], 5
            judge = EitherWord({**judge.explanation_of, 5: "w5"})
        desk, [(summary, batch)] = judged(tmp_path / name, world, judge)
        weights = credit(batch)
        assert (weights[4] > 0) + (weights[5] > 0) == (1 if name == "twins" else 2)
        assert min(weights[n] for n in (8, 9, 20, 21)) > 0
        assert summary["shared"] == (name == "twins")
        assert summary["rewards"] == sum(weight > 0 for weight in weights.values())
        # What a replay trains with, and what shards get of it.
        kept = desk.applied.read(0).batch
        np.testing.assert_array_equal(kept.credit_weight, batch.credit_weight)
        assert set(kept.for_shard(4, 6).latents) == {n for n in (4, 5) if weights[n] > 0}
        assert len(judge.asked) == len(desk.bank.read()), "nobody is asked who is close to whom"


def test_who_lost_is_explained_anew_while_the_holders_explanation_stands(tmp_path):
    world, judge = twins_and_others()
    _, [(_, first), (_, second)] = judged(tmp_path, world, judge, rounds=2, reexplain_cosine=0.9)
    (loser,) = [latent for latent in (4, 5) if credit(first)[latent] == 0]
    again = judge.explained[len(first.latents) :]
    assert loser in again
    assert 9 - loser not in again
    # It says the same again and is as close, so again only one of them has credit.
    assert sorted(credit(second)[n] > 0 for n in (4, 5)) == [False, True]


def test_a_round_that_is_judged_again_takes_the_same_credit(tmp_path):
    found = [judged(tmp_path / name, *twins_and_others())[1][0][1] for name in "ab"]
    np.testing.assert_array_equal(found[0].credit_weight, found[1].credit_weight)


# ---------------------------------------------------------------------- by itself


def scene() -> tuple[ContextScan, UnitRows]:
    """0, 1 and 2 point one way, 3 another way but fires with 0, 4 is alone."""
    fires_CN = np.zeros((40, 5), dtype=bool)
    for column, start in enumerate((0, 8, 16, 1, 30)):
        fires_CN[start : start + 8, column] = True
    act_CN = fires_CN.astype(np.float32)
    rows_ND = np.array([[1, 0, 0], [0.9, 0.4359, 0], [0.9, -0.4359, 0], [0, 0, 1], [0, 1, 0]], dtype=np.float16)
    latents = np.array([10, 11, 12, 13, 14])
    scan = ContextScan(latents, act_CN, act_CN - 0.5, np.zeros(act_CN.shape, dtype=np.int32))
    return scan, UnitRows(latents, rows_ND, rows_ND)


def reward(latent: int, explanation: str, auroc: float = 0.9) -> LatentReward:
    return LatentReward(latent, explanation, "llm", auroc, 0.05, 0.5, auroc - 0.5, 12)


def choice(latent: int, explanation: str, f1: float | None) -> Choice:
    own, plan = Candidate(explanation, "llm"), LatentPlan(latent, [0], [], [])
    fit = None if f1 is None else Fit(f1, 0.1, 0.9, 0.1, 0.2, 0.5)
    return Choice(plan, own, (Candidate("else", "lexical"), own), (None, fit))


def test_f1_decides_who_keeps_an_explanation_and_who_was_not_measured_loses():
    said = {10: "Dogs.", 11: "dogs", 12: "dogs", 13: "dogs", 14: "dogs"}
    f1 = {10: 0.5, 11: 0.8, 12: None, 13: 0.4, 14: 0.1}
    rewards = [reward(latent, text) for latent, text in said.items()]
    settled = one_holder_each(rewards, [choice(n, said[n], f1[n]) for n in said], *scene())
    # 13 lies elsewhere but fires with 10, which has lost its own; 14 is like nobody.
    assert {each.latent: each.lost_to for each in settled} == {10: 11, 11: None, 12: 11, 13: None, 14: None}
    assert [each.credit_weight > 0 for each in settled] == [False, True, False, True, True]
    assert [replace(each, lost_to=None) for each in settled] == rewards


def test_a_latent_without_credit_holds_no_explanation():
    rewards = [reward(10, "dogs"), reward(11, "dogs", auroc=0.5), reward(13, "dogs")]
    f1 = {10: 0.5, 11: 0.9, 13: 0.4}
    settled = one_holder_each(rewards, [choice(n, "dogs", f1[n]) for n in f1], *scene())
    assert {each.latent: each.lost_to for each in settled} == {10: None, 11: None, 13: 10}


def test_what_earlier_rounds_taught_gives_way_to_who_was_judged_now():
    none = np.zeros(0, dtype=np.int64)
    trust = np.array([0.9, 0.2, 0.5, 0.0, 0.4], dtype=np.float32) / 4
    batch = RewardBatch(2, 40, np.arange(10, 15), trust, none, none, none, none, none, none, 0.1, 0.1)
    said = {10: 7, 11: 7, 12: 7, 13: 7, 14: 8}
    joined = newest_holder_each(batch, said, np.array([11, 14]), *scene())
    # 11 was judged now and is close to 10 and 12; 13 had no credit to lose.
    np.testing.assert_allclose(joined.credit_weight, np.array([0, 0.2, 0, 0, 0.4]) / 2, rtol=1e-6)
    assert newest_holder_each(batch, {**said, 10: 1, 11: 2, 12: 3}, np.array([11, 14]), *scene()) is batch
