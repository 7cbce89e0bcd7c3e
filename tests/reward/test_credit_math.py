"""Parts of the estimators against plain float64 references."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from credit_world import SETTINGS, SIZE, D, fit, make_world, params_of, two_latents, with_rollouts

from sae_ray.reward.credit.evolution import es_step, soft_auroc
from sae_ray.reward.credit.gates import posterior
from sae_ray.reward.credit.policy_gradient import rloo_gradient
from sae_ray.reward.credit.reward_model import _laplace
from sae_ray.reward.credit.rows import presence_of_rows
from sae_ray.reward.credit.threshold import rate_factors


def test_the_bank_loss_over_all_rows_is_the_formula():
    world = make_world(0.1)
    credit = fit("bank_gate", world)
    credit.ROWS_PER_STEP = 1000
    found = float(credit.loss(world.x_TD, params_of(world), world.threshold).detach())
    total = active = 0.0
    pre_CS = (world.x_TD @ world.latent.W_enc_ND[0]).view(-1, SIZE)
    for context, verdict, weight, on in zip(
        world.batch.row_context, world.batch.row_verdict, world.batch.row_weight, world.batch.row_active, strict=True
    ):
        gate = SETTINGS.slope * (float(pre_CS[context].max()) - 0.7) / 0.7
        p = min(max(0.1 + 0.8 / (1 + math.exp(-gate)), 1e-4), 1 - 1e-4)
        total -= float(weight) * (verdict * math.log(p) + (1 - verdict) * math.log(1 - p))
        active += float(weight) * on
    assert found == pytest.approx(total / active, rel=1e-6)


def test_rows_taken_in_turn_sum_to_the_loss_over_all_rows():
    world = two_latents(0.1)
    credit = fit("bank_gate", world)
    n = [int((world.batch.row_latent == latent).sum()) for latent in world.batch.latents]
    steps = math.lcm(*n) // math.gcd(4, math.lcm(*n))
    in_turn = np.mean(
        [float(credit.loss(world.x_TD, params_of(world, step=s), world.threshold).detach()) * 2 ** ((s - 100) / 400)
         for s in range(100, 100 + min(steps, 100))]
    )  # fmt: skip
    credit.ROWS_PER_STEP = 10_000
    assert in_turn == pytest.approx(
        float(credit.loss(world.x_TD, params_of(world), world.threshold).detach()), rel=0.02
    )


def test_preference_pairs_are_drawn_with_their_weights():
    world = make_world(0.1)
    credit = fit("preference", world)
    credit.PAIRS_PER_STEP = 20_000
    found = float(credit.loss(world.x_TD, params_of(world), world.threshold).detach())
    p = presence_of_rows(world.batch, world.latent.W_enc_ND)
    w = torch.tensor(world.batch.row_weight).double()
    best_C = (world.x_TD @ world.latent.W_enc_ND[0]).view(-1, SIZE).amax(1)
    g = SETTINGS.slope * best_C[torch.tensor(world.batch.row_context)] / 0.7
    pair = (w * p)[:, None] * (w * (1 - p))[None, :]
    expected = (pair * torch.nn.functional.softplus(g[None, :] - g[:, None])).sum() / pair.sum()
    assert found == pytest.approx(float(expected), rel=5e-3)


def test_the_posterior_is_bayes_rule():
    said, prior = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.03, 0.5]).double()
    expected = [0.03 * 0.8 / (0.03 * 0.8 + 0.97 * 0.1), 0.5 * 0.2 / (0.5 * 0.2 + 0.5 * 0.9)]
    assert posterior(said, prior, (0.1, 0.2)).tolist() == pytest.approx(expected)


def test_soft_auroc_and_its_evolution_gradient():
    g = torch.Generator().manual_seed(0)
    at_VR = torch.randn(40, 3, generator=g).double()
    presence_V, weight_V = torch.rand(40, generator=g).double(), torch.rand(40, generator=g).double()
    z_R = torch.tensor([1.0, 0.3, -0.2]).double().requires_grad_()
    score_V = at_VR @ z_R
    wins = total = 0.0
    for a, b in itertools.permutations(range(40), 2):
        h = weight_V[a] * presence_V[a] * weight_V[b] * (1 - presence_V[b])
        wins, total = wins + h * torch.sigmoid((score_V[a] - score_V[b]) / 0.5), total + h
    value = wins / total

    def fitness(z_PR):
        return soft_auroc(at_VR @ z_PR.T, presence_V, weight_V)

    assert float(fitness(z_R.detach()[None])[0]) == pytest.approx(float(value.detach()), rel=1e-12)
    (gradient_R,) = torch.autograd.grad(value, z_R)
    noise_KR = torch.randn(4000, 3, generator=g).double()
    step_R = es_step(fitness, z_R.detach(), noise_KR, 1e-3)
    assert float(torch.cosine_similarity(step_R, gradient_R, dim=0)) > 0.995


def test_the_reward_model_is_at_the_mode_of_its_posterior_with_laplaces_covariance():
    g = torch.Generator().manual_seed(0)
    phi = torch.cat([torch.ones(60, 1), torch.randn(60, 3, generator=g)], dim=1).double()
    yes = (torch.rand(60, generator=g) < torch.sigmoid(2 * phi[:, 1])).double()
    rows = {"row_latent": torch.zeros(60).long(), "row_verdict": yes, "row_weight": torch.ones(60).double()}
    a_NR, chol_NRR = _laplace(phi, rows, (0.1, 0.05), torch.tensor([60.0]))
    precision = torch.tensor([0.01, 0.01, 1.0, 1.0]).double()

    def negative_log_posterior(a):
        p = 0.1 + 0.85 * torch.sigmoid(phi @ a)
        return -(yes * p.log() + (1 - yes) * (1 - p).log()).sum() + 0.5 * (precision * a * a).sum()

    a = a_NR[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(negative_log_posterior(a), a)
    assert gradient.abs().max() < 1e-6
    s = torch.sigmoid(phi @ a.detach())
    p = 0.1 + 0.85 * s
    fisher = (phi * ((0.85 * s * (1 - s)) ** 2 / (p * (1 - p)))[:, None]).T @ phi + torch.diag(precision)
    torch.testing.assert_close(chol_NRR[0] @ chol_NRR[0].T, torch.linalg.inv(fisher), rtol=1e-6, atol=1e-9)


def test_rate_factors_keep_the_sum_and_are_the_best_that_do():
    world = two_latents()
    batch = world.batch
    factor = rate_factors(batch, batch.row_margin.astype(float))
    share = [
        batch.row_weight[rows & batch.row_active].sum() / batch.row_weight[rows].sum()
        for rows in (batch.row_latent == latent for latent in batch.latents)
    ]
    assert float(np.dot(share, factor)) == pytest.approx(float(np.sum(share)), rel=1e-5)
    assert factor[0] > 1 > factor[1]  # the one that fires too little gains what the other gives
    unrelated = dataclasses.replace(batch, row_verdict=(np.arange(len(batch.row_verdict)) % 2).astype(np.float32))
    assert rate_factors(unrelated, batch.row_margin.astype(float)).tolist() == pytest.approx([1, 1])


def test_the_rollout_gradient_is_leave_one_out_and_points_up():
    world = with_rollouts(make_world(), n=8)
    rollouts = world.batch.rollouts
    found_D = rloo_gradient(rollouts, 7, world.latent.W_enc_ND)
    expected_D = np.zeros(D)
    for k in range(8):
        others = np.delete(rollouts.reward.astype(float), k).mean()
        expected_D += (float(rollouts.reward[k]) - others) * rollouts.perturbation[k] * D / 0.5 / 8
    expected_D /= max(1.0, np.linalg.norm(expected_D))
    np.testing.assert_allclose(found_D.numpy(), expected_D, rtol=1e-6)
    grad = np.eye(8, D, dtype=np.float32) * 0.1
    by_model = rloo_gradient(dataclasses.replace(rollouts, log_prob_grad=grad), 7, world.latent.W_enc_ND)
    centred = rollouts.reward.astype(float) - rollouts.reward.astype(float).mean()
    np.testing.assert_allclose(by_model.numpy()[:8], centred * 8 / 7 * 0.1 / 8, rtol=1e-4)
    many = with_rollouts(make_world(), n=4000).batch.rollouts
    W = world.latent.W_dec_ND  # what is steered
    w = W[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(w[0] / w.norm(), w)
    assert float(torch.cosine_similarity(rloo_gradient(many, 7, W), slope, dim=0)) > 0.9
    plain = dataclasses.replace(rollouts, perturbation=None, log_prob_grad=grad)
    assert torch.equal(rloo_gradient(plain, 7, world.latent.W_enc_ND), by_model)
    with pytest.raises(ValueError, match="perturbed directions or gradients"):
        rloo_gradient(dataclasses.replace(rollouts, perturbation=None), 7, world.latent.W_enc_ND)
    missing = dataclasses.replace(rollouts, reward=np.full(8, np.nan, dtype=np.float32))
    assert not rloo_gradient(missing, 7, W).any()
