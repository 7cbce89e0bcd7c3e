"""Evolution strategies in a low-rank subspace per latent. RESEARCH.md section 1, candidate (a)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sae_ray.reward.credit.base import CreditEstimator, CreditSettings, Deltas, LatentState, RewardBatch, on_device
from sae_ray.reward.credit.cuts import cut_at, implied_cuts, marked_share
from sae_ray.reward.credit.rows import context_state, presence_of_rows, row_order, row_state
from sae_ray.reward.credit.trust import common_state, effective_verdicts, freshness, rate_bound, within_turn
from sae_ray.reward.credit.whitening import projections, subspaces
from sae_ray.reward.evidence import ContextLayout, max_per_context

if TYPE_CHECKING:
    from sae_ray.trainer.sharded_sae import CreditParams

PAIRS, GENERATIONS, SIGMA, RATE = 8, 40, 0.15, 0.15
TEMPERATURE = 0.5  # of a comparison, in standard deviations of the latent's score
PRIOR = 1.0  # pull to the own direction, in verdicts
MIN_GAIN = 0.005  # of the AUROC on verdicts that the search has not seen
ROWS_PER_GENERATION = 96

Fitness = Callable[[torch.Tensor], torch.Tensor]


class Evolution(CreditEstimator):
    """Searches each latent's direction for the best AUROC on its verdicts, and turns it there once.

    A direction is `z` in the latent's whitened subspace (own direction, judged mean difference, local principal
    components), |z| = 1; verdicts do not depend on it, so a population is scored offline. The fitness is the soft AUROC
    between contexts that show the concept and those that do not,

        f(z) = sum_ab h_ab sigmoid((s_a(z) - s_b(z)) / T) / sum_ab h_ab - |z - own|^2 / n,  h_ab = w_a p_a w_b (1 - p_b)

    with s the largest projection in a context, w inverse propensities, p the probability that the concept is there
    given its verdict, n the effective verdicts. A ranking is blind to the threshold. Each generation draws antithetic
    pairs e_k, -e_k, and moves by the advantages in the group A = (f - mean f) / std f:

        z <- unit(z + rate * sum_k A_k e_k / K)

    an estimate of the smoothed fitness's gradient. The search runs on either half of the rows; the mean of both results
    is used where they are better than the latent's own direction on the half not seen, by MIN_GAIN on average. The turn
    is cut to what the evidence allows, the projection keeps its variance, and the bias makes the latent mark the share
    of contexts that the verdicts imply, at most a factor of MAX_RATE_CHANGE ^ (n / (n + 32)) from what it marked.
    """

    @classmethod
    def fit(
        cls,
        settings: CreditSettings,
        batch: RewardBatch,
        latent: LatentState,
        x_TD: torch.Tensor,
        layout: ContextLayout,
    ) -> Evolution:
        layout = on_device(layout, latent.W_enc_ND.device)
        x_TD = x_TD.to(latent.W_enc_ND)
        mean_D, basis_NRD = subspaces(batch, latent, x_TD)
        order = row_order(batch)
        rows = row_state(batch, order, latent.W_enc_ND) | context_state(batch, order, latent, x_TD, layout)
        presence_V = presence_of_rows(batch, latent.W_enc_ND)[torch.tensor(order, device=x_TD.device)]
        n_N = effective_verdicts(batch)
        state = common_state(settings, batch, latent)
        found_ND, found = [], []
        for j, basis_RD in enumerate(basis_NRD):
            own_V = torch.nonzero(rows["row_latent"] == j).view(-1)
            contexts = rows["row_context"][own_V]
            at_VSR = (rows["x_CSD"][contexts] - mean_D) @ basis_RD.T
            bank = _Bank(at_VSR, rows["mask_CS"][contexts], presence_V[own_V], rows["row_weight"][own_V])
            generator = torch.Generator().manual_seed(1_000_003 * batch.round + int(batch.latents[j]))
            z_R = _search(bank, PRIOR / max(float(n_N[j]), 1.0), generator)
            # Its own direction is the first of the basis: keep its share of the variance.
            size = torch.linalg.vector_norm(latent.W_enc_ND[j]) / torch.linalg.vector_norm(basis_RD[0]).clamp(min=1e-12)
            found_ND.append(latent.W_enc_ND[j] if z_R is None else size * (z_R @ basis_RD))
            found.append(z_R is not None)
        turned_ND = within_turn(state["W_judged_ND"], torch.stack(found_ND), state["turn_N"])
        old_CN, new_CN = (
            max_per_context(projections(x_TD, latent.b_dec_D, W_ND), layout) for W_ND in (latent.W_enc_ND, turned_ND)
        )
        finite_CN = old_CN[torch.isfinite(old_CN).all(1)]
        cut_N = cut_at(finite_CN, torch.tensor(marked_share(batch)).to(finite_CN) * len(finite_CN))
        shift_N = cut_N - implied_cuts(new_CN, batch, rate_bound(batch))
        # Where the search found nothing, nothing moves.
        shift_N = shift_N * torch.tensor(found, device=shift_N.device)
        move = {"move_ND": turned_ND - latent.W_enc_ND, "shift_N": shift_N, "given": torch.tensor(False)}
        return cls(settings, state | move)

    def deltas(self, params: CreditParams, threshold: torch.Tensor) -> Deltas | None:
        state = self._state
        if bool(state["given"]):
            return None
        state["given"] = torch.tensor(True)
        rows_N = state["latents"] - params.first_latent
        fresh_N = freshness(self._settings, state, params.W_enc_mD[rows_N], params.step)
        return Deltas(rows_N, state["move_ND"] * fresh_N[:, None], state["shift_N"] * fresh_N)


class _Bank:
    """One latent's judged contexts, projected on its subspace."""

    def __init__(self, at_VSR: torch.Tensor, mask_VS: torch.Tensor, presence_V: torch.Tensor, weight_V: torch.Tensor):
        self.at_VSR, self.mask_VS, self.presence_V, self.weight_V = at_VSR, mask_VS, presence_V, weight_V

    def __len__(self) -> int:
        return len(self.weight_V)

    def part(self, index: torch.Tensor) -> _Bank:
        return _Bank(self.at_VSR[index], self.mask_VS[index], self.presence_V[index], self.weight_V[index])

    def auroc(self, z_PR: torch.Tensor) -> torch.Tensor:
        """[P]: soft AUROC of some directions."""
        score_VSP = self.at_VSR @ F.normalize(z_PR, dim=1).T
        score_VP = score_VSP.masked_fill(~self.mask_VS[..., None], -torch.inf).amax(1)
        return soft_auroc(score_VP, self.presence_V, self.weight_V)


def soft_auroc(score_VP: torch.Tensor, presence_V: torch.Tensor, weight_V: torch.Tensor) -> torch.Tensor:
    """[P]: of P scorings of the same rows; 0.5 where there is nothing to compare."""
    pair_VV = (weight_V * presence_V)[:, None] * (weight_V * (1 - presence_V))[None, :]
    pair_VV = pair_VV - torch.diag(pair_VV.diagonal())
    wins_VVP = torch.sigmoid((score_VP[:, None] - score_VP[None]) / TEMPERATURE)
    total = pair_VV.sum()
    return (
        (pair_VV[..., None] * wins_VVP).sum((0, 1)) / total
        if float(total) > 0
        else score_VP.new_full((score_VP.shape[1],), 0.5)
    )


def es_step(fitness: Fitness, z_R: torch.Tensor, noise_KR: torch.Tensor, sigma: float) -> torch.Tensor:
    """`sum_k A_k e_k / K` over antithetic pairs, A normalised in the group: along the smoothed fitness's gradient."""
    value_2K = fitness(torch.cat([z_R + sigma * noise_KR, z_R - sigma * noise_KR]))
    advantage_2K = (value_2K - value_2K.mean()) / value_2K.std().clamp(min=1e-8)
    plus_K, minus_K = advantage_2K.chunk(2)
    return ((plus_K - minus_K)[:, None] * noise_KR).mean(0) / 2


def _search(bank: _Bank, prior: float, generator: torch.Generator) -> torch.Tensor | None:
    """The unit direction [R] that both halves of the bank lead to, or None where neither helps the other."""
    own_R = torch.zeros(bank.at_VSR.shape[2], dtype=bank.at_VSR.dtype, device=bank.at_VSR.device)
    own_R[0] = 1
    index = torch.arange(len(bank), device=own_R.device)
    halves = bank.part(index[::2]), bank.part(index[1::2])
    found, gains = [], []
    for seen, unseen in (halves, halves[::-1]):
        z_R = _evolve(seen, own_R, prior, generator)
        before, after = unseen.auroc(torch.stack([own_R, z_R])).tolist()
        found.append(z_R)
        gains.append(after - before)
    return F.normalize(found[0] + found[1], dim=0) if sum(gains) / 2 > MIN_GAIN else None


def _evolve(bank: _Bank, own_R: torch.Tensor, prior: float, generator: torch.Generator) -> torch.Tensor:
    z_R = own_R
    for generation in range(GENERATIONS):
        # Members of a group are compared on the same rows, other ones in each generation.
        part = bank
        if len(bank) > ROWS_PER_GENERATION:
            part = bank.part(torch.randperm(len(bank), generator=generator)[:ROWS_PER_GENERATION].to(own_R.device))

        def fitness(z_PR: torch.Tensor, part: _Bank = part) -> torch.Tensor:
            return part.auroc(z_PR) - prior * (F.normalize(z_PR, dim=1) - own_R).square().sum(1)

        noise_KR = torch.randn(PAIRS, len(own_R), generator=generator, dtype=torch.float64).to(own_R)
        rate = RATE * (1 - generation / GENERATIONS)
        z_R = F.normalize(z_R + rate * es_step(fitness, z_R, noise_KR, SIGMA), dim=0)
    return z_R
