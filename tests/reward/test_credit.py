"""What all credit estimators have in common: gradients, fading, state, shards, dp ranks and the trust region."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from credit_world import (
    SETTINGS,
    SIZE,
    World,
    fit,
    make_world,
    params_of,
    two_latents,
    with_rollouts,
)

from sae_ray.reward.credit import ESTIMATORS, debias, observed, restore_credit
from sae_ray.reward.credit.trust import MAX_RATE_CHANGE, effective_verdicts, within_turn
from sae_ray.trainer.credit_state import reshard

BOTH = "teacher_gate+policy_gradient"
LOSSES = ["bank_gate", "policy_gradient", "preference", "reward_model", "teacher_gate", BOTH]


def test_every_estimator_is_a_loss_or_gives_deltas_or_discounts():
    assert sorted(ESTIMATORS) == sorted([*LOSSES, "evolution", "selection_bonus", "threshold"])


def value(loss: torch.Tensor) -> float:
    return float(loss.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_derivative_of_the_loss(name):
    world = with_rollouts(make_world(0.1))
    credit = fit(name, world)
    params = params_of(world)
    credit.loss(world.x_TD[:500], params, world.threshold).backward()
    # The drift weight is held constant in the gradient and is level where nothing has moved.
    generator = torch.Generator().manual_seed(1)
    for field in ("W_enc_mD", "b_enc_m", "W_dec_mO"):
        tensor = getattr(params, field)
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        taught = name != "policy_gradient" if field == "b_enc_m" else field == "W_enc_mD" or credit.of_decoder
        assert (tensor.grad is not None and bool(tensor.grad.any())) == taught
        if not taught:
            continue
        numbers = []
        for sign in (1, -1):
            there = params._replace(**{field: (tensor + sign * 1e-6 * direction).detach()})
            numbers.append(value(credit.loss(world.x_TD[:500], there, world.threshold)))
        slope = (numbers[0] - numbers[1]) / 2e-6
        assert slope == pytest.approx(float((tensor.grad * direction).sum()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_old_rewards_and_moved_latents_count_less(name):
    world = with_rollouts(make_world())
    x = world.x_TD[:500]
    aged = dataclasses.replace(world, batch=dataclasses.replace(world.batch, sae_step=-300))
    now, late = (value(fit(name, w).loss(x, params_of(world), world.threshold)) for w in (world, aged))
    assert late == pytest.approx(now / 2)
    away = torch.zeros_like(world.latent.W_enc_ND)
    away[0, 5] = 1.0
    assert value(fit(name, world).loss(x, params_of(world, W_ND=away, W_dec_ND=away), world.threshold)) == 0.0


def test_two_estimators_add_up_each_with_its_own_gamma():
    world = with_rollouts(make_world(0.1))
    x, params = world.x_TD[:500], params_of(world, step=110)
    teacher, policy = (value(fit(n, world).loss(x, params, world.threshold)) for n in BOTH.split("+"))
    assert abs(policy) > 1e-3
    both = value(fit(BOTH, world).loss(x, params, world.threshold))
    assert both == pytest.approx(teacher + policy, rel=1e-12)
    settings = dataclasses.replace(SETTINGS, gamma=0.5, rollout_gamma=3.0)
    weighed = value(fit(BOTH, world, settings).loss(x, params, world.threshold))
    assert weighed == pytest.approx(0.5 * teacher + 3 * policy, rel=1e-12)
    alone = value(fit("policy_gradient", world, settings).loss(x, params, world.threshold))
    assert alone == pytest.approx(3 * policy, rel=1e-12)
    without = fit(BOTH, make_world(0.1)).loss(x, params, world.threshold)
    assert value(without) == pytest.approx(teacher, rel=1e-12)


def test_the_evidence_of_a_policy_gradient_is_its_judged_generations():
    """32 of a perfect judge allow half of a turn; verdicts on texts allow none, and missing ones do not count."""
    world = with_rollouts(two_latents(), n=40)
    rollouts = world.batch.rollouts
    reward = np.where(np.arange(40) < 8, np.nan, rollouts.reward).astype(np.float32)
    batch = dataclasses.replace(world.batch, rollouts=dataclasses.replace(rollouts, reward=reward))
    turn_N = fit("policy_gradient", dataclasses.replace(world, batch=batch)).state_dict()["turn_N"]
    assert turn_N.tolist() == pytest.approx([SETTINGS.max_turn / 2, 0])


def test_discounts_fade_with_age():
    world = two_latents()
    credit = fit("selection_bonus", world)
    now, late = (credit.selection(params_of(world, step=step)) for step in (100, 500))
    assert torch.allclose(late, now / 2)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_restored_estimator_does_the_same(name):
    world = with_rollouts(two_latents(0.1))
    credit = fit(name, world)
    state = {key: tensor.clone() for key, tensor in credit.state_dict().items()}
    again = restore_credit(name, SETTINGS, reshard([state], 0, 100))
    x, params = world.x_TD[:500], params_of(world, step=103)
    for made in (
        lambda it: it.loss(x, params, world.threshold),
        lambda it: it.deltas(params, world.threshold),
        lambda it: it.selection(params),
    ):
        first, second = made(credit), made(again)
        for one, other in zip(*(t if isinstance(t, tuple) else (t,) for t in (first, second)), strict=True):
            assert one is other is None or torch.equal(one, other)
    after = restore_credit(name, SETTINGS, {key: tensor.clone() for key, tensor in credit.state_dict().items()})
    assert after.deltas(params, world.threshold) is None  # what was given stays given


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_splitting_the_latents_over_shards_changes_nothing(name):
    """Fitted per shard, or fitted together and re-sharded: the same credit for each latent."""
    world = with_rollouts(two_latents(0.1))
    x, params, threshold = world.x_TD[:500], params_of(world, step=103), world.threshold
    whole = fit(name, world)
    state = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    for resharded in (False, True):
        parts = []
        for low, high, place in ((0, 8, 0), (8, 16, 1)):
            if resharded:
                parts.append(restore_credit(name, SETTINGS, reshard([state], low, high)))
                continue
            rows = {field: getattr(world.latent, field)[place, None] for field in ("W_enc_ND", "b_enc_N", "W_dec_ND")}
            latent = dataclasses.replace(world.latent, **rows)
            batch = world.batch.for_shard(low, high)
            parts.append(fit(name, dataclasses.replace(world, batch=batch, latent=latent)))
        losses = [part.loss(x, params, threshold) for part in parts]
        if name in LOSSES:
            total = sum(value(loss) for loss in losses if loss is not None)
            assert total == pytest.approx(value(whole.loss(x, params, threshold)), rel=1e-12)
        discounts = [part.selection(params) for part in parts]
        if discounts[0] is not None:
            torch.testing.assert_close(sum(discounts), whole.selection(params))
        deltas = [part.deltas(params, threshold) for part in parts]
        expected = restore_credit(name, SETTINGS, {k: t.clone() for k, t in state.items()}).deltas(params, threshold)
        if expected is not None:
            assert [int(part.rows_n[0]) for part in deltas] == [0, 2]
            for field in ("W_enc_nD", "b_enc_n"):
                if getattr(expected, field) is not None:
                    joined = torch.cat([getattr(part, field) for part in deltas])
                    torch.testing.assert_close(joined, getattr(expected, field), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_dp_ranks_average_to_the_global_batch_exactly_however_positives_are_spread(name):
    """All positives on one rank, and shares that are not equal: normalising per rank would differ."""
    world = with_rollouts(make_world(0.1))
    credit = fit(name, world)
    order_T = torch.argsort(world.on_TN[:, 0].double(), descending=True, stable=True)
    x = world.x_TD[order_T][torch.cat([torch.arange(40), torch.arange(4000, 4161)])]
    params = params_of(world)._replace(global_tokens=len(x))
    together = value(credit.loss(x, params, world.threshold))
    parts = [x[:61], x[61:]]
    averaged = sum(len(part) / len(x) * value(credit.loss(part, params, world.threshold)) for part in parts)
    assert averaged == pytest.approx(together, rel=1e-12)


def test_turning_back_keeps_the_norm_and_the_plane():
    old, new = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    turned = within_turn(old, new, torch.tensor([math.pi / 6]))
    torch.testing.assert_close(turned, 3 * torch.tensor([[math.cos(math.pi / 6), 0.5, 0.0]]))
    torch.testing.assert_close(within_turn(old, new, torch.tensor([2.0])), new)
    torch.testing.assert_close(within_turn(old, old, torch.tensor([0.5])), old)


def test_latents_of_other_shards_and_untrusted_latents_are_left_out():
    world = with_rollouts(make_world())
    assert list(world.batch.for_shard(0, 7).latents) == []
    assert list(world.batch.for_shard(0, 8).latents) == [7]
    assert len(world.batch.for_shard(0, 7).rollouts.reward) == 0
    assert world.batch.for_shard(0, 7).for_shard(0, 3).whole is world.batch
    untrusted = dataclasses.replace(world.batch, credit_weight=np.zeros(1, dtype=np.float32))
    assert len(untrusted.for_shard(0, 8).row_latent) == 0


def test_debiasing_inverts_the_judges_error_rates():
    presence = torch.tensor([0.0, 0.3, 1.0])
    assert torch.allclose(debias(observed(presence, 0.1, 0.2), 0.1, 0.2), presence)


def judged_less(world: World, every: int, says: float) -> World:
    """Every so many rows, each with the same verdict; the rows that are left stand for the others."""
    batch, keep = world.batch, slice(None, None, every)
    columns = {name: value[keep] for name, value in vars(batch).items() if name.startswith("row_")}
    columns |= {"row_verdict": np.full_like(columns["row_verdict"], says), "row_weight": columns["row_weight"] * every}
    return dataclasses.replace(world, batch=dataclasses.replace(batch, **columns))


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("says", [0.0, 1.0])
def test_a_teacher_changes_a_latents_rate_by_no_more_than_its_evidence_allows(says, every):
    """60 verdicts on active contexts allow a factor of 1.57, 6 one of 1.12."""
    world = judged_less(make_world(), every, says)
    n = float(effective_verdicts(world.batch)[0])
    assert n == pytest.approx(60 / every)
    allowed = MAX_RATE_CHANGE ** (n / (n + 32))
    state = fit("teacher_gate", world).state_dict()
    score_T = world.x_TD @ state["W_ND"][0] + state["b_N"][0]
    marked = (score_T.view(-1, SIZE).amax(1) > 0).double().mean()
    own = ((world.x_TD @ world.latent.W_enc_ND[0]).view(-1, SIZE).amax(1) > world.threshold).double().mean()
    assert 0.9 * own / allowed < marked < 1.1 * own * allowed


def test_a_latent_that_left_what_was_judged_before_its_reward_came_earns_no_gradient():
    """Verdicts are about the direction at the scan: the turn is counted from there, not from where they arrive."""
    world = make_world()
    x, params = world.x_TD[:500], params_of(world)
    own_ND = world.latent.W_enc_ND
    apart_ND = torch.zeros_like(own_ND)
    apart_ND[0, 5] = 1.0
    values = {}
    for what, rows_ND in (("none", None), ("same", own_ND), ("apart", apart_ND)):
        judged_ND = None if rows_ND is None else torch.nn.functional.normalize(rows_ND, dim=1).half().numpy()
        told = dataclasses.replace(world, batch=dataclasses.replace(world.batch, judged_ND=judged_ND))
        values[what] = value(fit("teacher_gate", told).loss(x, params, world.threshold))
    assert values["none"] != 0
    assert values["same"] == pytest.approx(values["none"], rel=2e-3)
    assert values["apart"] == 0


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("name", ["policy_gradient", BOTH])
def test_each_row_of_a_policy_gradient_stops_at_its_own_turn(name, told):
    """The decoder's term at the decoder's angle from the row that was steered, the encoder's at the encoder's."""
    world = with_rollouts(make_world())
    world.batch = dataclasses.replace(world.batch, credit_weight=np.ones(1, dtype=np.float32))
    own, apart_ND = {"W_ND": world.latent.W_enc_ND, "W_dec_ND": world.latent.W_dec_ND}, torch.zeros(1, 16).double()
    apart_ND[0, 5] = 1.0
    for left in ("W_ND", "W_dec_ND"):
        rows = own | {left: apart_ND}
        moved, judged = (rows, own) if not told else (own, rows)
        unit = {key: torch.nn.functional.normalize(rows_ND, dim=1).half().numpy() for key, rows_ND in judged.items()}
        batch = dataclasses.replace(world.batch, judged_ND=unit["W_ND"], judged_decoder_ND=unit["W_dec_ND"])
        credit = fit(name, dataclasses.replace(world, batch=batch))
        params = params_of(world, **moved)
        credit.loss(world.x_TD[:500], params, world.threshold).backward()
        slopes = {"W_ND": params.W_enc_mD.grad, "W_dec_ND": params.W_dec_mO.grad}
        assert not slopes.pop(left).any()
        assert all(slope.any() for slope in slopes.values())
