"""What a teacher is made of: how far it leaves the SAE's direction, and where its gate is."""

import numpy as np
import pytest
import torch
from credit_world import D, judged_world

from sae_ray.reward.credit.cuts import f1_cuts, marked_share
from sae_ray.reward.credit.mixing import Directions
from sae_ray.reward.credit.whitening import unit, whitener
from sae_ray.reward.evidence import max_per_context


def directions(world) -> tuple[Directions, torch.Tensor, torch.Tensor]:
    mean_D, cov_DD, inverse_DD = whitener(world.x_TD)
    own_ND = torch.stack([unit(w_D, cov_DD) for w_D in world.latent.W_enc_ND])
    return Directions(own_ND, world.x_TD, world.layout, mean_D, cov_DD, inverse_DD), own_ND, mean_D


def encoder(*weights: float) -> torch.Tensor:
    return torch.tensor([weights + (0.0,) * (D - len(weights))], dtype=torch.float64)


def cosine_to_concept(direction_ND: torch.Tensor) -> float:
    return float(direction_ND[0, 0] / direction_ND[0].norm())


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_direction_that_is_right_is_kept(noise):
    world = judged_world(encoder(1.0), torch.zeros(1, dtype=torch.float64), [7], [0], noise, seed=1)
    found, own_ND, _ = directions(world)
    assert torch.allclose(found.best(world.batch), own_ND)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_direction_between_two_concepts_is_left_for_the_judged_one(noise):
    world = judged_world(encoder(0.8, 0.6), torch.zeros(1, dtype=torch.float64), [7], [0], noise, seed=1)
    found, own_ND, _ = directions(world)
    assert cosine_to_concept(found.best(world.batch)) > cosine_to_concept(own_ND) + 0.1


def test_what_else_is_on_the_shard_does_not_change_a_latents_direction():
    W_ND = torch.cat([encoder(0.8, 0.6), encoder(0.2, 0.9)])
    world = judged_world(W_ND, torch.zeros(2, dtype=torch.float64), [7, 9], [0, 1], 0.1, seed=2)
    both = directions(world)[0].best(world.batch)
    alone = judged_world(W_ND[:1], torch.zeros(1, dtype=torch.float64), [7], [0], 0.1, seed=2)
    alone.batch = world.batch.for_shard(0, 8)
    assert torch.allclose(directions(alone)[0].best(alone.batch), both[:1])


def test_a_gate_is_put_near_where_f1_is_largest():
    # Not active enough on its concept: the best cut marks more contexts than the latent does.
    world = judged_world(encoder(1.0), torch.tensor([-1.35], dtype=torch.float64), [7], [0], 0.1, seed=3)
    mean_D = world.x_TD.mean(0)
    best_CN = max_per_context((world.x_TD - mean_D) @ world.latent.W_enc_ND.T, world.layout)
    truth_C = world.on_TN[:, 0].view(len(best_CN), -1).any(1)

    def f1(cut: float) -> float:
        marked_C = best_CN[:, 0] > cut
        return float(2 * (marked_C & truth_C).sum() / (marked_C.sum() + truth_C.sum()))

    cut = float(f1_cuts(best_CN, world.batch, np.array([4.0]))[0])
    best = max(f1(float(value)) for value in np.quantile(best_CN[:, 0].numpy(), np.linspace(0.5, 0.999, 200)))
    own = float(best_CN[:, 0].sort(descending=True).values[int(marked_share(world.batch)[0] * len(best_CN))])
    assert f1(cut) > f1(own)
    assert f1(cut) > best - 0.1


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_gate_marks_no_more_than_the_factor_allows(factor):
    world = judged_world(encoder(1.0), torch.tensor([-1.35], dtype=torch.float64), [7], [0], 0.0, seed=3)
    best_CN = max_per_context(world.x_TD @ world.latent.W_enc_ND.T, world.layout)
    marked = float((best_CN > f1_cuts(best_CN, world.batch, np.array([factor]))).double().mean())
    own = float(marked_share(world.batch)[0])
    assert own / factor - 0.01 <= marked <= own * factor + 0.01
