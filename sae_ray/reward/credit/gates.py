"""The gate of a latent as a probability, and the judge's errors on the way from a presence to a verdict."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MIN_INFORMATION = 0.05  # floor of 1 - fpr - fnr: a judge at chance tells nothing, and dividing by it explodes


def debias(verdict: torch.Tensor, fpr: float, fnr: float) -> torch.Tensor:
    """Unbiased estimate of a concept's presence from a verdict with known error rates; below 0 for a no."""
    return (verdict - fpr) / max(1 - fpr - fnr, MIN_INFORMATION)


def observed(presence: torch.Tensor, fpr: float, fnr: float) -> torch.Tensor:
    """Probability that a judge with these error rates says yes when the concept is present with `presence`."""
    return fpr + max(1 - fpr - fnr, MIN_INFORMATION) * presence


def gate_logit(
    pre: torch.Tensor, threshold: torch.Tensor, slope: float, unit: torch.Tensor | None = None
) -> torch.Tensor:
    """How far a pre-activation is above its threshold, in units of `unit` (the threshold itself if None), times slope.

    A unit that is fixed when rewards arrive keeps a BatchTopK from running away: gates that close leave fewer than k
    positive pre-activations a token, its threshold falls toward 0, and in units of itself every logit would explode.
    """
    return slope * (pre - threshold) / (threshold if unit is None else unit).clamp(min=1e-3)


def gate_units(threshold: torch.Tensor, pre_TN: torch.Tensor) -> torch.Tensor:
    """[N]: what gate logits are counted in, when rewards arrive: a latent's threshold, or its mean positive
    pre-activation where its gate lies at 0 (ReLU, gated, some imported JumpReLUs).

    Args:
        threshold: 0-dim or [N].
        pre_TN: the latents' pre-activations on the evidence.
    """
    threshold_N = threshold.to(pre_TN.dtype).expand(pre_TN.shape[1])
    active_TN = pre_TN > 0
    mean_N = (pre_TN * active_TN).sum(0) / active_TN.sum(0).clamp(min=1)
    return torch.where(threshold_N > 0, threshold_N, mean_N)


def platt(
    score_NV: torch.Tensor,
    verdict_NV: torch.Tensor,
    weight_NV: torch.Tensor,
    rates: tuple[float, float],
    steps: int = 200,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per latent (slope, offset) of P(concept | context) = sigmoid(slope * score + offset), judged noise removed.

    Fitted by weighted likelihood of the verdicts under their error rates; a weak pull of the slope toward 1
    keeps latents with few verdicts finite.

    Args:
        weight_NV: inverse propensities, 0 where a latent has fewer rows than others.
        rates: (false positive, false negative) of the judge.
    """
    total_N = weight_NV.sum(1).clamp(min=1e-9)
    mu_N = (weight_NV * score_NV).sum(1) / total_N
    sd_N = ((weight_NV * (score_NV - mu_N[:, None]) ** 2).sum(1) / total_N).sqrt().clamp(min=1e-3)
    z_NV = (score_NV - mu_N[:, None]) / sd_N[:, None]
    share_NV = weight_NV / total_N[:, None] * max(1 - sum(rates), MIN_INFORMATION)  # times d yes / d presence
    raw_N, offset_N = torch.ones_like(mu_N), torch.zeros_like(mu_N)
    optimiser = torch.optim.Adam([raw_N, offset_N], lr=0.1)
    for _ in range(steps):
        # The gradient by hand: a fit takes thousands of these steps, and autograd visits the rows twice as often.
        presence_NV = torch.addcmul(offset_N[:, None], F.softplus(raw_N)[:, None], z_NV).sigmoid_()
        yes_NV = observed(presence_NV, *rates)
        p_NV = yes_NV.clamp(1e-4, 1 - 1e-4)
        slope_NV = (p_NV - verdict_NV).div_(p_NV - p_NV * p_NV).mul_(share_NV)
        slope_NV.mul_(presence_NV - presence_NV * presence_NV).mul_(p_NV == yes_NV)
        raw_N.grad = (slope_NV * z_NV).sum(1) * torch.sigmoid(raw_N) + 2e-3 * (raw_N - 1)
        offset_N.grad = slope_NV.sum(1)
        optimiser.step()
    slope_N = F.softplus(raw_N) / sd_N
    return slope_N, offset_N - slope_N * mu_N


def posterior(said_yes: torch.Tensor, prior: torch.Tensor, rates: tuple[float, float]) -> torch.Tensor:
    """P(concept present | verdict) for a presence of `prior` before the verdict (Bayes)."""
    fpr, fnr = rates
    if_present = torch.where(said_yes > 0.5, 1 - fnr, fnr)
    if_absent = torch.where(said_yes > 0.5, fpr, 1 - fpr)
    joint = prior * if_present
    return joint / (joint + (1 - prior) * if_absent).clamp(min=1e-12)
