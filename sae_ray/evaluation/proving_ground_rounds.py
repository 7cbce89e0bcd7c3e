"""The rounds of a cell: each asks about fresh samples; verdicts of earlier ones may be kept.

Samples of all rounds are numbered on, so that a kept verdict still says which sample it is about. Their activations
are the world's and do not age; whether a latent is active on them is read anew in every round.

Suffixes: T samples of the pools so far, M latents.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sae_ray.evaluation.proving_ground_base import Ground
from sae_ray.evaluation.proving_ground_evidence import Asking, Pool, ask, explained
from sae_ray.evaluation.proving_ground_rollouts import SteeredWriter, steered_rollouts
from sae_ray.evaluation.proving_ground_simplicity import SimplicityRewards
from sae_ray.evaluation.synthetic_judge import OracleJudge
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.verdict_memory import VerdictMemory
from sae_ray.trainer.sharded_sae import ShardedTrainer


class Rounds:
    """One per cell.

    Args:
        samples: of a round's own pool.
        memory: what keeps verdicts; None: each round stands alone. Rollouts are always the newest round's.
        rollouts: judged generations per latent and round, besides the verdicts of `asking`.
        reader_cosine: of the model that writes them.
        simplicity: what rewards latents; None: their verdicts do.
    """

    def __init__(
        self,
        ground: Ground,
        samples: int,
        judge: OracleJudge,
        asking: Asking,
        rng: np.random.Generator,
        memory: VerdictMemory | None,
        rollouts: int = 0,
        reader_cosine: float = 1.0,
        simplicity: SimplicityRewards | None = None,
    ):
        self._ground, self._samples, self._judge, self._asking, self._rng = ground, samples, judge, asking, rng
        self._memory, self._rollouts, self._simplicity = memory, rollouts, simplicity
        self._writer = SteeredWriter(ground.world, reader_cosine=reader_cosine)
        self._pools: list[Pool] = []

    def judged(self, trainer: ShardedTrainer, step: int, index: int) -> tuple[RewardBatch, Pool]:
        """Round `index`, of the SAE as it is after `step` steps, and the samples that its rows refer to."""
        pool = self._ground.pool(self._samples, index)
        margin_TM = margin(trainer, pool)
        feature_M = explained(self._judge, self._asking, margin_TM, pool)
        rows = ask(self._judge, self._asking, margin_TM, pool, step, index, self._rng, feature_M)
        if self._simplicity is not None:
            reward_N = self._simplicity.rewards(trainer.W_dec_mD, margin_TM >= 0, feature_M, rows.latents)
            rows = replace(rows, reward=self._rng.permutation(reward_N) if self._asking.shuffled else reward_N)
        if not self._rollouts:
            return self._remembered(trainer, rows, pool, margin_TM, feature_M)
        rollouts = steered_rollouts(
            self._writer, self._judge, trainer.W_dec_mD, feature_M, rows.latents, self._rollouts, pool.x_TD, self._rng,
            self._asking.shuffled,
        )  # fmt: skip
        rows, pool = self._remembered(trainer, rows, pool, margin_TM, feature_M)
        return replace(rows, rollouts=rollouts), pool

    def _remembered(
        self,
        trainer: ShardedTrainer,
        rows: RewardBatch,
        pool: Pool,
        margin_TM: torch.Tensor,
        feature_M: torch.Tensor,
    ) -> tuple[RewardBatch, Pool]:
        """With the verdicts of earlier rounds that still stand."""
        if self._memory is None:
            return rows, pool
        start = sum(len(earlier.x_TD) for earlier in self._pools)
        rows = replace(rows, row_context=rows.row_context + start, row_token=rows.row_token + start)
        margin_TM = torch.cat([*(margin(trainer, earlier) for earlier in self._pools), margin_TM])
        self._pools.append(pool)
        scan = ContextScan(
            np.arange(margin_TM.shape[1]),
            (margin_TM >= 0).numpy(),
            margin_TM.numpy(),
            np.broadcast_to(np.arange(len(margin_TM))[:, None], margin_TM.shape),
        )
        explanation = {latent: int(feature_M[latent]) for latent in rows.latents.tolist()}
        whole = Pool(*(torch.cat(parts) for parts in zip(*self._pools, strict=True)))
        return self._memory.join(rows, explanation, scan, {}), whole


def margin(trainer: ShardedTrainer, pool: Pool) -> torch.Tensor:
    """[T, M]: pre-activations less thresholds; active from 0 on."""
    return trainer.pre_activations(pool.x_TD) - trainer.thresholds_m()
