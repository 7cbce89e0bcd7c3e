"""How far a latent's teacher may leave its own direction: chosen for each latent by verdicts that did not shape it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import RewardBatch
from sae_ray.reward.credit.gates import observed, platt
from sae_ray.reward.credit.rows import padded, rows_of
from sae_ray.reward.credit.whitening import judged_means, projections, unit
from sae_ray.reward.evidence import ContextLayout, max_per_context

OWN_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
# Nats of held-out verdicts that leaving the own direction must gain: chance alone makes one of four a little better.
MIN_GAIN = 0.5


class Directions:
    """Teacher directions [N, D] of unit variance for any share of the latent's own one.

    Args:
        own_ND: the encoders' directions, of unit variance.
        mean_D, cov_DD, inverse_DD: of unlabelled activations `x_TD` (`whitening.whitener`).
    """

    def __init__(
        self,
        own_ND: torch.Tensor,
        x_TD: torch.Tensor,
        layout: ContextLayout,
        mean_D: torch.Tensor,
        cov_DD: torch.Tensor,
        inverse_DD: torch.Tensor,
    ):
        self._own_ND, self._x_TD, self._layout = own_ND, x_TD, layout
        self._mean_D, self._cov_DD, self._inverse_DD = mean_D, cov_DD, inverse_DD

    def mixed(self, batch: RewardBatch, own_share: float) -> torch.Tensor:
        """own_share of the own direction, the rest of the whitened mean difference that the batch's verdicts give."""
        return self._mixed(self._judged(batch), own_share)

    def best(self, batch: RewardBatch) -> torch.Tensor:
        """Each latent's share of OWN_SHARES by cross-fitting: the mean difference of one half of its rows, the
        likelihood of the other half's verdicts through a Platt map and the judge's errors, both ways round.

        Rows count alike in the likelihood: weighted to the natural prior, the few random ones would decide alone.
        The directions are then those of all rows.
        """
        rates = (batch.false_positive_rate, batch.false_negative_rate)
        halves = [_part(batch, fold) for fold in (0, 1)]
        total_KN = torch.zeros(len(OWN_SHARES), len(batch.latents)).to(self._own_ND)
        for shaped_by, tested_on in (halves, halves[::-1]):
            judged_ND = self._judged(shaped_by)
            for number, share in enumerate(OWN_SHARES):
                score_V, rows = self._scores(self._mixed(judged_ND, share), tested_on)
                verdict_V = torch.tensor(tested_on.row_verdict).to(score_V)
                score_NV, verdict_NV, there_NV = padded([score_V, verdict_V, torch.ones_like(score_V)], rows)
                slope_N, offset_N = platt(score_NV, verdict_NV, there_NV, rates)
                p_NV = observed(torch.sigmoid(slope_N[:, None] * score_NV + offset_N[:, None]), *rates)
                surprise_NV = F.binary_cross_entropy(p_NV.clamp(1e-4, 1 - 1e-4), verdict_NV, reduction="none")
                total_KN[number] += (there_NV * surprise_NV).sum(1)
        total_KN[0] -= MIN_GAIN
        judged_ND = self._judged(batch)
        mixes_KND = torch.stack([self._mixed(judged_ND, share) for share in OWN_SHARES])
        return mixes_KND[total_KN.argmin(0), torch.arange(len(self._own_ND), device=self._own_ND.device)]

    def _judged(self, batch: RewardBatch) -> torch.Tensor:
        """The whitened mean difference; a latent's own direction where too few of its texts were confirmed."""
        found = zip(self._own_ND, judged_means(batch, self._x_TD), strict=True)
        return torch.stack(
            [
                own_D if judged_D is None else unit(self._inverse_DD @ (judged_D - self._mean_D), self._cov_DD)
                for own_D, judged_D in found
            ]
        )

    def _mixed(self, judged_ND: torch.Tensor, own_share: float) -> torch.Tensor:
        mixed_ND = own_share * self._own_ND + (1 - own_share) * judged_ND
        return torch.stack([unit(mixed_D, self._cov_DD) for mixed_D in mixed_ND])

    def _scores(self, teacher_ND: torch.Tensor, batch: RewardBatch) -> tuple[torch.Tensor, list[np.ndarray]]:
        best_CN = max_per_context(projections(self._x_TD, self._mean_D, teacher_ND), self._layout)
        latent_V = torch.tensor(np.searchsorted(batch.latents, batch.row_latent), device=best_CN.device)
        return best_CN[torch.tensor(batch.row_context, device=best_CN.device), latent_V], rows_of(batch)


def _part(batch: RewardBatch, fold: int) -> RewardBatch:
    """Every other row of each latent, by context: what else is on the shard does not change a latent's halves."""
    keep = np.zeros(len(batch.row_latent), dtype=bool)
    for rows in rows_of(batch):
        by_context = rows[np.argsort(batch.row_context[rows], kind="stable")]
        keep[by_context[fold::2]] = True
    return dataclasses.replace(
        batch,
        row_latent=batch.row_latent[keep],
        row_context=batch.row_context[keep],
        row_verdict=batch.row_verdict[keep],
        row_active=batch.row_active[keep],
        row_weight=batch.row_weight[keep],
        row_token=batch.row_token[keep],
        row_margin=None if batch.row_margin is None else batch.row_margin[keep],
    )
