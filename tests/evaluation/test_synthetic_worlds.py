"""Synthetic worlds: who fires with whom, how often and how strongly, against the definition taken literally."""

from dataclasses import replace

import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.evaluation.synthetic import World, spread_directions
from sae_ray.evaluation.synthetic_worlds import PRESETS, WorldSpec, compensated, grow, preset, wanted_probabilities

SPEC = WorldSpec(
    n_features=30, d_in=16, roots=3, branching=3, depth=2, d_sae=12, orthogonal_steps=50, correlation_scale=0.25
)
SAMPLES = 40_000


@pytest.fixture(scope="module")
def drawn():
    world = World(SPEC, seed=3)
    x_BD, a_BF = world.sample(SAMPLES, torch.Generator().manual_seed(1))
    return world, x_BD, a_BF


def literal_sample(world: World, n: int, seed: int) -> torch.Tensor:
    """Every feature is drawn in every sample, then parents silence and siblings exclude, level by level."""
    spec, forest = world.spec, world.forest
    torch.manual_seed(seed)
    threshold_F = torch.distributions.Normal(0, 1).icdf(1 - world.given_F).float()
    common_BR = torch.randn(n, spec.correlation_rank)
    drive_BF = common_BR @ world.factor_FR.T + world.own_F * torch.randn(n, spec.n_features)
    a_BF = (2.0 + 0.5 * torch.randn(n, spec.n_features)).clamp(min=0) * (drive_BF > threshold_F)
    for parent in range(spec.n_features):
        first, count = int(forest.first_child_F[parent]), int(forest.n_children_F[parent])
        if not count:
            continue
        children = a_BF[:, first : first + count]
        lot = torch.rand(children.shape) * (children > 0)
        winner = torch.nn.functional.one_hot(lot.argmax(1), count)
        a_BF[:, first : first + count] = children * winner * (a_BF[:, parent] / 2.0)[:, None]
    return a_BF


def test_features_are_numbered_breadth_first_until_they_run_out():
    forest = grow(replace(SPEC, n_features=14, branching=3, roots=3))
    assert forest.parent_F.tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert forest.level_F.tolist() == [0] * 3 + [1] * 9 + [2] * 2
    assert (int(forest.first_child_F[3]), int(forest.n_children_F[3])) == (12, 2)
    assert int(forest.n_children_F[4]) == 0


def test_features_without_a_place_in_the_forest_are_independent():
    forest = grow(replace(SPEC, n_features=20, depth=1))
    assert forest.parent_F[12:].tolist() == [-1] * 8
    assert forest.n_children_F[12:].sum() == 0


def test_firing_probabilities_follow_zipfs_law_between_their_bounds():
    spec = PRESETS["research"]
    wanted_F = wanted_probabilities(spec, grow(spec))
    assert float(wanted_F[0]) == pytest.approx(0.4)
    assert float(wanted_F[-1]) == pytest.approx(5e-4)
    # p = a + b / sqrt(rank), by hand for rank 4 of 1024
    b = (0.4 - 5e-4) / (1 - 1 / 32)
    assert float(wanted_F[3]) == pytest.approx(5e-4 + b * (1 / 2 - 1 / 32))


def test_children_compensate_for_their_parent_and_for_their_siblings():
    forest = grow(replace(SPEC, n_features=3, roots=1, branching=2, depth=1))
    wanted_F = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    assert compensated(wanted_F, forest, True).tolist() == pytest.approx([0.5, 0.4 * 1.2, 0.2 * 1.4])
    assert compensated(wanted_F, forest, False).tolist() == pytest.approx([0.5, 0.4, 0.2])
    rare = torch.tensor([0.01, 0.2, 0.1], dtype=torch.float64)
    assert compensated(rare, forest, True)[1:].tolist() == [1.0, 1.0]


def test_an_activation_is_the_bias_and_the_sum_of_its_features(drawn):
    world, x_BD, a_BF = drawn
    torch.testing.assert_close(x_BD, world.bias_D + a_BF @ world.directions_FD, atol=1e-5, rtol=1e-5)
    assert float(world.bias_D.norm()) == pytest.approx(1.0)


def test_no_child_shows_without_its_parent_and_no_two_siblings_together(drawn):
    world, _, a_BF = drawn
    on_BF = a_BF > 0
    child = torch.nonzero(world.forest.parent_F >= 0).flatten()
    assert not bool((on_BF[:, child] & ~on_BF[:, world.forest.parent_F[child]]).any())
    for parent in torch.nonzero(world.forest.n_children_F).flatten().tolist():
        first, count = int(world.forest.first_child_F[parent]), int(world.forest.n_children_F[parent])
        assert int(on_BF[:, first : first + count].sum(1).max()) == 1


def test_sampling_only_where_parents_fire_is_the_same_distribution_as_sampling_everywhere(drawn):
    world, _, a_BF = drawn
    other_BF = literal_sample(world, SAMPLES, seed=5)
    on, other_on = (a_BF > 0).double(), (other_BF > 0).double()
    joint_FF, other_joint_FF = on.T @ on / SAMPLES, other_on.T @ other_on / SAMPLES
    error_FF = (2 * joint_FF.clamp(min=2 / SAMPLES) / SAMPLES).sqrt()
    assert float(((joint_FF - other_joint_FF).abs() / error_FF).max()) < 5
    for level in range(3):
        at = world.forest.level_F == level
        ours, other = a_BF[:, at][a_BF[:, at] > 0], other_BF[:, at][other_BF[:, at] > 0]
        assert float(ours.mean()) == pytest.approx(float(other.mean()), abs=0.03)
        assert float(ours.std()) == pytest.approx(float(other.std()), abs=0.03)


def test_children_are_scaled_by_their_parents_only_if_asked(drawn):
    world, _, a_BF = drawn
    shown = a_BF[:, 3] > 0
    assert float(torch.corrcoef(torch.stack([a_BF[shown, 0], a_BF[shown, 3]]))[0, 1]) > 0.4
    free = World(replace(SPEC, scale_by_parent=False), seed=3)
    _, free_BF = free.sample(SAMPLES, torch.Generator().manual_seed(1))
    shown = free_BF[:, 3] > 0
    assert abs(float(torch.corrcoef(torch.stack([free_BF[shown, 0], free_BF[shown, 3]]))[0, 1])) < 0.05


def test_directions_are_pushed_apart_by_descent_on_the_sum_of_squared_cosines():
    def overlap(steps: int) -> float:
        rows_FD = spread_directions(replace(SPEC, orthogonal_steps=steps), torch.Generator().manual_seed(0))
        torch.testing.assert_close(rows_FD.norm(dim=1), torch.ones(30))
        return float((rows_FD @ rows_FD.T).fill_diagonal_(0).square().sum())

    # 30 unit vectors in 16 dimensions cannot do better than 30^2 / 16 - 30 = 26.25 (the Welch bound).
    assert 26.2 < overlap(200) < 0.75 * overlap(0)


def test_the_descent_follows_the_gradient_of_the_loss_it_names():
    """One Adam step moves every entry by lr against the sign of autograd's gradient of the literal loss."""
    spec = replace(SPEC, n_features=6, roots=6, depth=0, d_in=5, orthogonal_steps=1)
    start_FD = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    E_FD = (start_FD / start_FD.norm(dim=1, keepdim=True)).double().requires_grad_()
    gram_FF = E_FD @ E_FD.T
    pairs = gram_FF[~torch.eye(6, dtype=torch.bool)].square().sum()
    (pairs + 6 * (gram_FF.diagonal() - 1).square().sum()).backward()
    moved_FD = E_FD.detach() - 0.01 * E_FD.grad.sign()
    expected_FD = moved_FD / moved_FD.norm(dim=1, keepdim=True)
    found_FD = spread_directions(spec, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found_FD.double(), expected_FD, atol=1e-5, rtol=1e-5)


def test_a_seed_decides_the_world_and_a_generator_the_samples():
    one, same, other = World(SPEC, 3), World(SPEC, 3), World(SPEC, 4)
    assert torch.equal(one.directions_FD, same.directions_FD)
    assert not torch.equal(one.directions_FD, other.directions_FD)
    first = one.sample(50, torch.Generator().manual_seed(2))
    torch.rand(3)  # the global generator is not used
    again = same.sample(50, torch.Generator().manual_seed(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_the_parent_child_world_has_room_for_all_directions_and_children_imply_parents():
    spec = PRESETS["parent_child"]
    assert spec.d_in >= spec.n_features
    world = World(spec, 0)
    on_BF = world.shown(world.fire(20_000, torch.Generator().manual_seed(0)))
    rate_F = on_BF.double().mean(0)
    assert float(rate_F[:40].mean()) == pytest.approx(0.1, rel=0.03)
    assert float(rate_F[40:].mean()) == pytest.approx(0.02, rel=0.1)
    cosines = (world.directions_FD @ world.directions_FD.T).fill_diagonal_(0)
    assert float(cosines.abs().max()) < 0.1


def test_the_large_world_is_the_research_world_ten_times():
    research, large = PRESETS["research"], PRESETS["large"]
    assert (large.n_features, large.roots, large.d_sae) == tuple(
        10 * n for n in (research.n_features, research.roots, research.d_sae)
    )


def test_the_small_world_is_half_the_research_world_in_all_that_counts_features():
    research, small = PRESETS["research"], PRESETS["small"]
    sizes = ("n_features", "d_in", "roots", "d_sae")
    assert replace(small, **{name: getattr(research, name) for name in sizes}) == research
    assert [2 * getattr(small, name) for name in sizes] == [getattr(research, name) for name in sizes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roots": 40}, "roots 40"),
        ({"min_probability": 0.5}, "min_probability 0.5"),
        ({"level_probabilities": (0.1,)}, "depth \\+ 1 = 3"),
        ({"correlation_rank": 200}, "correlation_rank"),
    ],
)
def test_a_world_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(SPEC, **change)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'tiny' is unknown; known: research, large, parent_child, small"):
        preset("tiny")
