"""From an SAE and a pool of synthetic samples to what a reward desk would send: explained, judged, weighted rows.

A context is one sample, so contexts, kept tokens and samples have the same numbers.

Suffixes: T samples of the pool, N judged latents, M latents, F features, D d_in, V verdict rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sae_ray.evaluation.proving_ground_choice import choose
from sae_ray.evaluation.synthetic_judge import Explaining, OracleJudge
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.evidence import ContextLayout

MIN_ACTIVE = 8  # active samples in the pool that a latent must have to be judged
NEAR_SHARE = 0.05  # of the inactive samples, those with the largest pre-activations count as near misses
ACTIVE, NEAR, RANDOM = 0, 1, 2


class Pool(NamedTuple):
    """Samples that evidence is drawn from."""

    x_TD: torch.Tensor
    on_TF: torch.Tensor  # bool

    @property
    def nbytes(self) -> int:
        return self.x_TD.nbytes + self.on_TF.nbytes

    @property
    def layout(self) -> ContextLayout:
        contexts = torch.arange(len(self.x_TD))
        return ContextLayout(contexts, torch.zeros_like(contexts), len(contexts), 1)


@dataclass(frozen=True)
class Asking:
    """How a round asks.

    Attributes:
        verdicts: per latent; half of those that teach are on active samples, a quarter on near misses, a quarter on
            other inactive ones.
        explain: see `OracleJudge.explain` and, for "specific", `proving_ground_choice.choose`: half of the verdicts.
        explain_texts: samples of the pool that explanations are chosen on.
        shuffled: deal the verdicts of each kind of row anew over all latents: a null that keeps their rates.
    """

    verdicts: int
    explain: Explaining = "f1"
    explain_texts: int = 2000
    shuffled: bool = False

    @property
    def choosing(self) -> int:
        """Verdicts per latent that choose its explanation."""
        return self.verdicts // 2 if self.explain == "specific" else 0


def explained(judge: OracleJudge, asking: Asking, margin_TM: torch.Tensor, pool: Pool) -> torch.Tensor:
    """The feature that each latent is taken for, int64 [M]."""
    if asking.explain == "specific":
        return choose(judge, margin_TM, pool.on_TF, asking.choosing)
    n_texts = asking.explain_texts
    return judge.explain(margin_TM[:n_texts] >= 0, pool.on_TF[:n_texts], asking.explain)


def ask(
    judge: OracleJudge,
    asking: Asking,
    margin_TM: torch.Tensor,
    pool: Pool,
    step: int,
    round_index: int,
    rng: np.random.Generator,
    feature_M: torch.Tensor | None = None,
) -> RewardBatch:
    """One round: explains every latent that is active often enough, has it judged, and packs the verdicts.

    Args:
        feature_M: what `explained` says of these margins; None: it is asked here.
        margin_TM: pre-activations less thresholds; a latent is active where it is at least 0.
    """
    active_TM = margin_TM >= 0
    if feature_M is None:
        feature_M = explained(judge, asking, margin_TM, pool)
    count_M = active_TM.sum(0)
    judged = torch.nonzero((count_M >= MIN_ACTIVE) & (count_M <= len(active_TM) - MIN_ACTIVE)).flatten().numpy()
    margin_MT = margin_TM.T.contiguous().numpy()  # columns would be read a number per cache line
    drawn = [draw_rows(margin_MT[latent], asking.verdicts - asking.choosing, rng) for latent in judged]
    sample, kind, weight = (np.concatenate([rows[i] for rows in drawn]) for i in range(3))
    row_latent = np.repeat(judged, [len(rows[0]) for rows in drawn])
    sample_V = torch.from_numpy(sample)
    verdict = judge.verdicts(sample_V, feature_M[torch.from_numpy(row_latent)], pool.on_TF).numpy()
    if asking.shuffled:
        for which in (ACTIVE, NEAR, RANDOM):
            verdict[kind == which] = rng.permutation(verdict[kind == which])
    errors = judge.errors
    return RewardBatch(
        round=round_index,
        sae_step=step,
        latents=judged.astype(np.int64),
        credit_weight=np.full(len(judged), 1 / max(1, len(judged)), dtype=np.float32),
        row_latent=row_latent.astype(np.int64),
        row_context=sample.astype(np.int64),
        row_verdict=verdict.astype(np.float32),
        row_active=kind == ACTIVE,
        row_weight=weight.astype(np.float32),
        row_token=sample.astype(np.int64),
        # What calibration on planted items would have measured: flips, but not leniency toward relatives.
        false_positive_rate=errors.verdict,
        false_negative_rate=errors.verdict,
    )


def draw_rows(
    margin_T: np.ndarray, verdicts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples, kinds, weights) that one latent is judged on; a weight is how many samples of its kind a row stands
    for. Where a kind has too few samples all of them are taken."""
    active = np.flatnonzero(margin_T >= 0)
    inactive = np.flatnonzero(margin_T < 0)
    n_near = min(len(inactive), max(verdicts, round(NEAR_SHARE * len(inactive))))
    order = np.argpartition(-margin_T[inactive], n_near - 1) if n_near else np.empty(0, dtype=np.int64)
    near, far = inactive[order[:n_near]], inactive[order[n_near:]]
    quota = {ACTIVE: verdicts // 2, NEAR: verdicts // 4, RANDOM: verdicts - verdicts // 2 - verdicts // 4}
    nothing = np.empty(0, dtype=np.int64)  # where no verdicts are to be given
    samples, kinds, weights = [nothing], [nothing], [np.empty(0)]
    for kind, population in ((ACTIVE, active), (NEAR, near), (RANDOM, far)):
        take = min(quota[kind], len(population))
        if take:
            samples.append(rng.choice(population, take, replace=False))
            kinds.append(np.full(take, kind))
            weights.append(np.full(take, len(population) / take))
    return np.concatenate(samples), np.concatenate(kinds), np.concatenate(weights)
