"""The stand-in for a steered language model, against float64 references that know nothing of its code."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import numpy as np
import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.evaluation.proving_ground import Cell
from sae_ray.evaluation.proving_ground_base import Base
from sae_ray.evaluation.proving_ground_rollouts import SteeredWriter, steered_rollouts
from sae_ray.evaluation.synthetic import World
from sae_ray.evaluation.synthetic_judge import JudgeErrors, OracleJudge
from sae_ray.evaluation.synthetic_worlds import WorldSpec
from sae_ray.reward.credit import ESTIMATORS
from sae_ray.reward.credit.policy_gradient import rloo_gradient

SPEC = WorldSpec(n_features=7, d_in=5, roots=2, branching=2, depth=1, d_sae=4, orthogonal_steps=20, max_probability=0.3)
MIXED = torch.tensor([[1.0, 0.4, 0.0, -0.3, 0.2], [0.1, 0.9, -0.5, 0.2, 0.0], [0.3, 0.0, 1.0, 0.5, -0.4]])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SPEC, 3)


@pytest.fixture(scope="module")
def x_PD(world) -> torch.Tensor:
    return world.sample(6, torch.Generator().manual_seed(1))[0]


def token_logprobs(
    world: World, x_BD: torch.Tensor, sharpness: float, readers_FD: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, F], float64, as the module's docstring says."""
    reader_FD = (world.directions_FD if readers_FD is None else readers_FD).double()
    logit_BF = sharpness * (x_BD.double() - world.bias_D.double()) @ reader_FD.T + world.wanted_F.double().log()
    return logit_BF.log_softmax(1)


def test_strengths_are_those_at_which_the_next_token_has_moved_by_the_target(world, x_PD):
    writer = SteeredWriter(world, target_kl=0.3)
    unit_MD = torch.nn.functional.normalize(MIXED, dim=1)
    found = writer.strengths(x_PD, unit_MD)
    for unit_D, alpha in zip(unit_MD, found.alpha_N, strict=True):
        clean, moved = (token_logprobs(world, x, 3.0) for x in (x_PD, x_PD + alpha * unit_D))
        assert float((moved.exp() * (moved - clean)).sum(1).mean()) == pytest.approx(0.3, rel=0.06)
    none = writer.strengths(x_PD, torch.zeros(1, 5))
    assert torch.isnan(none.alpha_N).all()


@pytest.mark.parametrize("cosine", [1.0, 0.4])
def test_readers_are_unit_vectors_at_the_asked_cosine_with_their_features(world, cosine):
    readers_FD = SteeredWriter(world, reader_cosine=cosine).readers_FD
    torch.testing.assert_close(torch.linalg.vector_norm(readers_FD, dim=1), torch.ones(7))
    torch.testing.assert_close((readers_FD * world.directions_FD).sum(1), torch.full((7,), cosine))


@pytest.mark.parametrize("cosine", [1.0, 0.4])
def test_the_gradient_of_a_texts_log_probability_is_its_finite_difference(world, x_PD, cosine):
    writer = SteeredWriter(world, sharpness=1.5, tokens=3, reader_cosine=cosine)
    unit_D = torch.nn.functional.normalize(MIXED[0], dim=0)
    token_KT, gradient_KD = writer.write(x_PD, unit_D, 0.8, 11, torch.Generator().manual_seed(0))
    assert token_KT.shape == (11, 3)
    assert gradient_KD.shape == (11, 5)

    def log_probability(direction_D: torch.Tensor) -> torch.Tensor:
        of_prompt = token_logprobs(world, x_PD.double() + 0.8 * direction_D, 1.5, writer.readers_FD)[
            torch.arange(11) % 6
        ]
        return of_prompt.gather(1, token_KT).sum(1)

    for axis in torch.eye(5, dtype=torch.float64):
        slope_K = (log_probability(unit_D + 1e-5 * axis) - log_probability(unit_D - 1e-5 * axis)) / 2e-5
        torch.testing.assert_close(gradient_KD.double() @ axis, slope_K, rtol=1e-4, atol=1e-5)


def test_texts_are_drawn_as_often_as_they_are_likely(world, x_PD):
    writer = SteeredWriter(world, sharpness=1.0, tokens=2)
    unit_D = torch.nn.functional.normalize(MIXED[1], dim=0)
    token_KT, _ = writer.write(x_PD[:1], unit_D, 1.0, 40_000, torch.Generator().manual_seed(0))
    share_F = torch.bincount(token_KT.flatten(), minlength=7).double() / token_KT.numel()
    expected_F = token_logprobs(world, x_PD[:1] + unit_D, 1.0)[0].exp()
    torch.testing.assert_close(share_F, expected_F, rtol=0, atol=0.008)


def test_a_text_shows_its_features_and_their_parents_and_nothing_else(world):
    shown = SteeredWriter(world).shown(torch.tensor([[2, 2, 6], [0, 0, 0], [5, 1, 1]]))
    # Roots 0 and 1 have the children 2, 3 and 4, 5; 6 is alone.
    assert [torch.nonzero(row).flatten().tolist() for row in shown] == [[0, 2, 6], [0], [1, 5]]


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_estimator_expects_the_exact_gradient_of_the_expected_verdict(world, x_PD, noise):
    """Summed over all texts of two tokens; flips shrink it by 1 - 2 noise."""
    writer, feature, n = SteeredWriter(world, sharpness=0.7, tokens=2, prompts=3, target_kl=0.02), 4, 60_000
    judge = OracleJudge(world.forest, JudgeErrors(verdict=noise), seed=0)
    W_dec_MD, wanted_M = 3 * MIXED, torch.tensor([feature] * 3)
    found = steered_rollouts(writer, judge, W_dec_MD, wanted_M, np.array([1]), n, x_PD[:3], np.random.default_rng(0))
    assert judge.verdicts_spent == n
    unit_D = torch.nn.functional.normalize(MIXED[1].double(), dim=0).requires_grad_()
    log_PF = token_logprobs(world, x_PD[:3].double() + float(found.strength[0]) * unit_D, 0.7)
    expected = torch.zeros(3, dtype=torch.float64)
    for text in itertools.product(range(7), repeat=2):
        if feature in text:  # it has no children, so nothing else shows it
            expected = expected + log_PF[:, list(text)].sum(1).exp()
    verdict = (noise + (1 - 2 * noise) * expected).mean()
    assert float(found.reward.mean()) == pytest.approx(verdict.item(), abs=0.01)
    (exact_D,) = torch.autograd.grad(verdict, unit_D)
    estimate_D = rloo_gradient(found, 1, torch.zeros(1, 5, dtype=torch.float64))
    assert 0.05 < float(exact_D.norm()) < 1, "neither lost in the noise nor clipped"
    assert float((estimate_D - exact_D).norm() / exact_D.norm()) < 0.1


def test_shuffled_verdicts_keep_their_rate_and_lose_the_gradient(world, x_PD):
    writer, latents = SteeredWriter(world, prompts=6), np.array([0, 2])
    found = {}
    for shuffled in (False, True):
        judge = OracleJudge(world.forest, JudgeErrors(), seed=0)
        found[shuffled] = steered_rollouts(
            writer, judge, MIXED, torch.tensor([2, 0, 4]), latents, 40_000, x_PD, np.random.default_rng(0), shuffled
        )
    plain, dealt = found[False], found[True]
    np.testing.assert_array_equal(plain.log_prob_grad, dealt.log_prob_grad)
    assert plain.reward.sum() == dealt.reward.sum()
    assert (plain.reward != dealt.reward).mean() > 0.1
    for latent in latents:
        of_latent = {key: rloo_norm(each, int(latent)) for key, each in found.items()}
        assert of_latent[True] < 0.3 * of_latent[False]


def rloo_norm(rollouts, latent: int) -> float:
    """Of the estimate before it is clipped."""
    rows = rollouts.latent == latent
    reward = rollouts.reward[rows].astype(float)
    return float(np.linalg.norm(((reward - reward.mean())[:, None] * rollouts.log_prob_grad[rows]).mean(0)))


def test_a_latent_that_cannot_be_steered_has_no_rollouts(world, x_PD):
    W_dec_MD = torch.cat([MIXED[:1], torch.zeros(1, 5)])
    judge = OracleJudge(world.forest, JudgeErrors(), seed=0)
    found = steered_rollouts(
        SteeredWriter(world), judge, W_dec_MD, torch.tensor([2, 2]), np.array([0, 1]), 8, x_PD, np.random.default_rng(0)
    )
    assert found.latent.tolist() == [0] * 8
    assert found.log_prob_grad.shape == (8, 5)


# ---------------------------------------------------------------------- cells


def test_cells_that_were_run_before_there_were_rollouts_keep_their_keys():
    base = Base("research", 0, "batchtopk", 8)
    assert Cell(base, "base", k=8).key == "cb24f4ab20e9"
    cell = Cell(base, "teacher_gate", k=8)
    assert cell.key == Cell.read({k: v for k, v in asdict(cell).items() if not k.startswith("rollout_")}).key
    assert cell.key != Cell(base, "teacher_gate", k=8, rollout_gamma=0.1).key


def test_generations_are_part_of_the_verdicts():
    base, budget = Base(), {"verdicts": 100, "rounds": 2}
    counts = {name: Cell(base, name, **budget).rollouts for name in ("base", *ESTIMATORS)}
    assert {name: n for name, n in counts.items() if n} == {
        "policy_gradient": 50,
        "teacher_gate+policy_gradient": 25,
    }
    assert Cell(base, "teacher_gate+policy_gradient", rollout_share=0.2, **budget).rollouts == 10
    with pytest.raises(UserError, match="keep_rounds keeps verdicts on samples, and policy_gradient asks for none"):
        Cell(base, "policy_gradient", keep_rounds=1)
