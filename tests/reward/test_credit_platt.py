"""The Platt map of the estimators: its gradient by hand is that of the likelihood it is said to maximise."""

import pytest
import torch
import torch.nn.functional as F

from sae_ray.reward.credit.gates import observed, platt
from sae_ray.reward.evidence import ContextLayout, max_per_context


def by_autograd(score_NV, verdict_NV, weight_NV, rates, steps):
    total_N = weight_NV.sum(1)
    mu_N = (weight_NV * score_NV).sum(1) / total_N
    sd_N = ((weight_NV * (score_NV - mu_N[:, None]) ** 2).sum(1) / total_N).sqrt()
    raw_N, offset_N = torch.ones_like(mu_N).requires_grad_(), torch.zeros_like(mu_N).requires_grad_()
    optimiser = torch.optim.Adam([raw_N, offset_N], lr=0.1)
    for _ in range(steps):
        logit_NV = F.softplus(raw_N)[:, None] * (score_NV - mu_N[:, None]) / sd_N[:, None] + offset_N[:, None]
        p_NV = observed(torch.sigmoid(logit_NV), *rates).clamp(1e-4, 1 - 1e-4)
        bce_NV = F.binary_cross_entropy(p_NV, verdict_NV, reduction="none")
        loss = ((weight_NV * bce_NV).sum(1) / total_N).sum() + 1e-3 * (raw_N - 1).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    slope_N = F.softplus(raw_N.detach()) / sd_N
    return slope_N, offset_N.detach() - slope_N * mu_N


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.1, 0.1), (0.3, 0.05), (0.5, 0.5)])
def test_the_fit_is_the_one_that_autograd_finds(rates):
    g = torch.Generator().manual_seed(0)
    score_NV = torch.randn(6, 80, generator=g, dtype=torch.float64) * 3
    score_NV[0] *= 100  # saturated: clamped probabilities have no gradient
    shows_NV = score_NV + torch.randn(6, 80, generator=g, dtype=torch.float64) > 2
    flip_NV = torch.rand(6, 80, generator=g) < 0.1
    weight_NV = torch.rand(6, 80, generator=g, dtype=torch.float64) * 50
    weight_NV[3, 40:] = 0  # fewer rows than others
    verdict_NV = (shows_NV ^ flip_NV).double()
    found = platt(score_NV, verdict_NV, weight_NV, rates)
    wanted = by_autograd(score_NV, verdict_NV, weight_NV, rates, 200)
    for a_N, b_N in zip(found, wanted, strict=True):
        assert torch.allclose(a_N, b_N, rtol=1e-6, atol=1e-8)


def test_a_fit_leaves_no_graph_and_no_gradient_on_its_inputs():
    score_NV = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope_N, offset_N = platt(score_NV, (score_NV > 0).float(), torch.ones(2, 30), (0.1, 0.1))
    assert not slope_N.requires_grad
    assert not offset_N.requires_grad
    assert score_NV.grad is None
    assert (slope_N > 0).all()


def test_contexts_of_one_token_have_its_value_as_any_other_maximum_would():
    g = torch.Generator().manual_seed(0)
    value_TN = torch.randn(5, 3, generator=g)
    context_T = torch.tensor([4, 0, 6, 2, 1])
    layout = ContextLayout(context_T, torch.zeros(5, dtype=torch.int64), 8, 1)
    found = max_per_context(value_TN, layout)
    assert torch.equal(found, max_per_context(value_TN, ContextLayout(context_T, layout.offset_T, 8, 2)))
    assert torch.isinf(found[3]).all()
