"""What a round sends to the ranks, from its rewards and the rows of its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sae_ray.reward.composition import LatentReward
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.verdict_cut import at_own_cuts


def reward_batch(
    number: int,
    step: int,
    rewards: list[LatentReward],
    rows: list[dict[str, Any]],
    rates: Sequence[float],
    deal: np.random.Generator | None = None,
    own_cuts: bool = False,
) -> RewardBatch:
    """What the ranks need of a round: the verdicts on each latent's winning explanation, and how far to trust them.

    Args:
        rates: (false positive, false negative) of a verdict at probability 1/2.
        deal: deals the verdicts of each kind of text anew, over all latents that teach and over all that do not: a
            control that keeps their rates. Explanations that are not trusted are said yes to less often.
        own_cuts: a verdict is yes where its explanation's own scores say, see `verdict_cut`.
    """
    ordered = sorted(rewards, key=lambda reward: reward.latent)
    trust = np.array([reward.credit_weight for reward in ordered])
    winning = {(reward.latent, reward.explanation) for reward in rewards}
    known = [
        row
        for row in rows
        if row["purpose"] != "shuffled" and row["score"] is not None and (row["latent"], row["explanation"]) in winning
    ]

    def column(key: str, dtype: Any) -> np.ndarray:
        return np.array([row[key] for row in known], dtype=dtype)

    trusted = {reward.latent for reward in rewards if reward.credit_weight > 0}
    verdict = (column("probability", np.float32) >= 0.5).astype(np.float32)
    if own_cuts:
        verdict, *rates = at_own_cuts(known, trusted, rates)
    if deal is not None:
        teaches = np.isin(column("latent", np.int64), sorted(trusted))
        kind = np.char.add(column("kind", str), np.where(teaches, " of the trusted", ""))
        for which in sorted(set(kind)):
            verdict[kind == which] = deal.permutation(verdict[kind == which])
    return RewardBatch(
        round=number,
        sae_step=step,
        latents=np.array([reward.latent for reward in ordered], dtype=np.int64),
        # Divided here and summed by the ranks, so that the loss does not depend on how latents are sharded.
        credit_weight=(trust / max(1, (trust > 0).sum())).astype(np.float32),
        row_latent=column("latent", np.int64),
        row_context=column("context", np.int64),
        row_verdict=verdict,
        row_active=column("active", bool),
        row_weight=column("weight", np.float32),
        row_token=column("token", np.int64),
        row_margin=column("margin", np.float32),
        false_positive_rate=rates[0],
        false_negative_rate=rates[1],
    )
