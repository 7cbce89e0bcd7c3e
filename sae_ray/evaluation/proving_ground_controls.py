"""What a credit estimator has to be compared with: labels that nobody has, and probes instead of an SAE.

Suffixes: B samples of a batch, T samples of a pool, V rows per latent, M latents, D d_in, Q places in padded rows.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from sae_ray.reward.credit import RewardBatch, gate_logit, observed
from sae_ray.trainer.sharded_sae import CreditParams

GATHERED_BYTES = 2**28  # of activations that probes of verdicts are fitted on at once


class TruthGate:
    """The gate BCE of the estimators, with the true labels of every sample in the place of a judge.

        loss = gamma * mean_j sum_B BCE(slope * (pre - thr) / thr, y) / max(1, sum_B y)

    `labels_BM` must be set before every step: whether each sample shows the feature that each latent is to detect.
    """

    def __init__(self, gamma: float, slope: float):
        self._gamma, self._slope = gamma, slope
        self.labels_BM = torch.empty(0)
        self._unit: torch.Tensor | None = None  # the threshold of the first step, as the estimators' at their fit

    def loss(self, x_BD: torch.Tensor, params: CreditParams, threshold: torch.Tensor) -> torch.Tensor:
        pre_BM = torch.addmm(params.b_enc_m, x_BD - params.b_dec_D, params.W_enc_mD.T)
        if self._unit is None:
            self._unit = threshold.detach().to(pre_BM.dtype).clone()
        logit_BM = gate_logit(pre_BM, threshold.to(pre_BM.dtype).expand_as(params.b_enc_m), self._slope, self._unit)
        y_BM = self.labels_BM.to(x_BD.dtype)
        bce_M = F.binary_cross_entropy_with_logits(logit_BM, y_BM, reduction="none").sum(0)
        return self._gamma * (bce_M / y_BM.sum(0).clamp(min=1)).mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class Probes:
    """A logistic probe per latent, on standardised activations.

    `margin` is the probes' logit less a threshold of each.
    """

    def __init__(self, x_TD: torch.Tensor, n_probes: int):
        self._mean_D, self._scale_D = x_TD.mean(0), 1 / x_TD.std(0).clamp(min=1e-6)
        self.W_MD = torch.zeros(n_probes, x_TD.shape[1])
        self.b_M = torch.zeros(n_probes)
        self.threshold_M = torch.zeros(n_probes)

    def standard(self, x_TD: torch.Tensor) -> torch.Tensor:
        return (x_TD - self._mean_D) * self._scale_D

    def margin(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, M]"""
        return torch.addmm(self.b_M - self.threshold_M, self.standard(x_TD), self.W_MD.T)

    def train_on_labels(self, batches: list[tuple[torch.Tensor, torch.Tensor]], steps: int, lr: float = 0.02) -> None:
        """Plain logistic regression by Adam at the natural prior; the rate falls linearly to 0.

        Args:
            batches: (x [B, D], labels [B, M]), gone through in turn.
        """
        moments = torch.optim.Adam([self.W_MD, self.b_M], lr=lr, betas=(0.9, 0.99))
        for step in range(steps):
            x_BD, label_BM = batches[step % len(batches)]
            z_BD = self.standard(x_BD)
            error_BM = (torch.addmm(self.b_M, z_BD, self.W_MD.T).sigmoid() - label_BM.float()) / len(x_BD)
            self.W_MD.grad, self.b_M.grad = error_BM.T @ z_BD, error_BM.sum(0)
            moments.param_groups[0]["lr"] = lr * (1 - step / steps)
            moments.step()

    def choose_thresholds(self, x_TD: torch.Tensor, label_TM: torch.Tensor) -> None:
        """Each probe's threshold becomes the one with the best F1 on these samples."""
        logit_TM = torch.addmm(self.b_M, self.standard(x_TD), self.W_MD.T)
        order_TM = logit_TM.argsort(0, descending=True)
        hits_TM = label_TM.gather(0, order_TM).double().cumsum(0)
        fired_T1 = torch.arange(1, len(x_TD) + 1, dtype=torch.float64)[:, None]
        best_M = (2 * hits_TM / (fired_T1 + label_TM.sum(0))).argmax(0)
        self.threshold_M = logit_TM.gather(0, order_TM).gather(0, best_M[None])[0]

    def train_on_verdicts(self, x_TD: torch.Tensor, batch: RewardBatch, steps: int = 300, ridge: float = 0.01) -> None:
        """Logistic regression on a round's verdicts, weighted to the natural prior, through the judge's error rates.

        `ridge` is per weight, against a likelihood that is a mean over the population.
        """
        rows = [np.flatnonzero(batch.row_latent == latent) for latent in batch.latents]
        z_TD = self.standard(x_TD)
        self.b_M.fill_(-1e4)  # a latent that was not judged has no probe and stays silent
        # Latents do not depend on each other: as many at once as their rows' activations may take room.
        at_once = max(1, GATHERED_BYTES // (max(len(row) for row in rows) * z_TD.shape[1] * z_TD.element_size()))
        for first in range(0, len(rows), at_once):
            some = slice(first, first + at_once)
            W_ND, b_N = _fit_verdicts(z_TD, batch, rows[some], steps, ridge)
            latents = torch.from_numpy(batch.latents[some])
            self.W_MD[latents], self.b_M[latents] = W_ND, b_N


def _fit_verdicts(
    z_TD: torch.Tensor, batch: RewardBatch, rows: list[np.ndarray], steps: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, D] and biases [N] of the probes of some latents; see `Probes.train_on_verdicts`."""
    width = max(len(row) for row in rows)
    place_NQ, weight_NQ, said_NQ = torch.zeros(len(rows), width).long(), *torch.zeros(2, len(rows), width)
    for index, row in enumerate(rows):
        place_NQ[index, : len(row)] = torch.from_numpy(batch.row_token[row])
        weight_NQ[index, : len(row)] = torch.from_numpy(batch.row_weight[row] / batch.row_weight[row].sum())
        said_NQ[index, : len(row)] = torch.from_numpy(batch.row_verdict[row])
    z_NQD = z_TD[place_NQ]
    W_ND = torch.zeros(len(rows), z_TD.shape[1], requires_grad=True)
    b_N = torch.full((len(rows),), -3.0, requires_grad=True)
    optimiser = torch.optim.Adam([W_ND, b_N], lr=0.05)
    for _ in range(steps):
        presence_NQ = torch.sigmoid(torch.bmm(z_NQD, W_ND[..., None])[..., 0] + b_N[:, None])
        p_NQ = observed(presence_NQ, batch.false_positive_rate, batch.false_negative_rate).clamp(1e-4, 1 - 1e-4)
        bce_NQ = weight_NQ * F.binary_cross_entropy(p_NQ, said_NQ, reduction="none")
        loss = bce_NQ.sum() + ridge * W_ND.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return W_ND.detach(), b_N.detach()
