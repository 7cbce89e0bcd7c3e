"""What a round sends to the ranks, and the control that deals its verdicts anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from sae_ray.reward.composition import LatentReward
from sae_ray.reward.round_batch import reward_batch

KINDS = ("positive", "near_miss", "sibling", "random")


def reward(latent: int) -> LatentReward:
    return LatentReward(latent, f"explanation {latent}", "llm", 0.9, 0.05, 0.5, 0.4, 40)


def rows(n_latents: int = 6, each: int = 20) -> list[dict[str, Any]]:
    """Verdicts that are right of positives; a losing candidate and a null whose verdicts are all the other way."""
    out = []
    for latent in range(n_latents):
        for purpose, told in (
            ("select", "explanation"),
            ("score", "explanation"),
            ("select", "loser"),
            ("shuffled", "x"),
        ):
            for index in range(each):
                kind = KINDS[index % 4]
                yes = ((latent + index // 4) % 5 < (3 if kind == "positive" else 1)) == (told == "explanation")
                out.append({
                    "latent": latent, "explanation": f"{told} {latent}", "purpose": purpose, "kind": kind,
                    "active": kind == "positive", "score": 1.0, "probability": 0.9 if yes else 0.1,
                    "context": len(out), "weight": 1.0 + index, "token": 3 * len(out), "margin": 0.5,
                })  # fmt: skip
    return out


def batch(**about: Any):
    return reward_batch(0, 7, [reward(latent) for latent in range(6)], rows(), (0.1, 0.2), **about)


def test_only_verdicts_on_the_explanation_that_won_teach():
    made = batch()
    assert len(made.row_verdict) == 6 * 40
    wanted = {row["context"]: row["probability"] >= 0.5 for row in rows()}
    assert made.row_verdict.astype(bool).tolist() == [wanted[context] for context in made.row_context.tolist()]


def test_verdicts_dealt_anew_keep_each_kinds_rate_and_everything_else():
    plain, dealt = batch(), batch(deal=np.random.default_rng(3))
    kind_of = {row["context"]: row["kind"] for row in rows()}
    kinds = [kind_of[context] for context in plain.row_context.tolist()]
    assert Counter(zip(kinds, plain.row_verdict.tolist(), strict=True)) == Counter(
        zip(kinds, dealt.row_verdict.tolist(), strict=True)
    )
    changed = plain.row_verdict != dealt.row_verdict
    assert 0.05 < changed.mean() < 0.6
    for name in ("latents", "credit_weight", "row_latent", "row_context", "row_active", "row_weight", "row_token"):
        assert np.array_equal(getattr(plain, name), getattr(dealt, name)), name
    # What a latent is told no longer has to do with it: a verdict comes from any of the latents.
    of_first = dealt.row_verdict[(dealt.row_latent == 0) & dealt.row_active]
    assert not np.array_equal(of_first, plain.row_verdict[(plain.row_latent == 0) & plain.row_active])


def test_latents_that_teach_keep_the_rates_of_their_own_verdicts():
    """Those that nobody trusts are said yes to less often: their verdicts among the others' would be another null."""
    rewards = [reward(latent) if latent < 3 else replace(reward(latent), auroc=0.5) for latent in range(6)]
    told = [
        {**row, "probability": 0.1} if row["latent"] >= 3 and row["explanation"].startswith("expl") else row
        for row in rows()
    ]
    plain, dealt = (reward_batch(0, 7, rewards, told, (0.1, 0.2), deal) for deal in (None, np.random.default_rng(3)))
    teaches = dealt.row_latent < 3
    assert dealt.row_verdict[teaches].sum() == plain.row_verdict[teaches].sum() > 0
    assert dealt.row_verdict[~teaches].sum() == 0
    assert (dealt.row_verdict != plain.row_verdict)[teaches].mean() > 0.05


def test_a_deal_is_a_function_of_its_seed():
    first, again, other = (batch(deal=np.random.default_rng(seed)).row_verdict for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
