"""Rewards for simple features: planted decoders, and what a cell makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.evaluation import proving_ground_base, synthetic_worlds
from sae_ray.evaluation.proving_ground import Cell, fine_tune
from sae_ray.evaluation.proving_ground_base import Base, Ground, pretrain
from sae_ray.evaluation.proving_ground_evidence import Asking
from sae_ray.evaluation.proving_ground_rounds import Rounds
from sae_ray.evaluation.proving_ground_simplicity import PARTS, SimplicityRewards
from sae_ray.evaluation.synthetic_judge import JudgeErrors, OracleJudge
from sae_ray.evaluation.synthetic_metrics import composed

TINY = synthetic_worlds.WorldSpec(
    n_features=48, d_in=16, roots=6, branching=3, depth=1, d_sae=24, orthogonal_steps=50, max_probability=0.3
)
BASE = Base("tiny", 0, k=2, steps=60)
SMALL = {"k": 2, "steps": 40, "pool": 2000, "verdicts": 64}
COPIES, SUMS, ATOMS = 160, 40, 10  # as many atoms as a run fits to so many rows


@pytest.fixture(scope="module")
def ground():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic_worlds.PRESETS, "tiny", TINY)
        patch.setattr(proving_ground_base, "BATCH", 256)
        patch.setattr(proving_ground_base, "POOL_BYTES", 2**18)
        patch.setattr(proving_ground_base, "MIN_BATCHES", 8)
        patch.setattr("sae_ray.evaluation.proving_ground.BATCH", 256)
        yield Ground("tiny", 0, samples=1000)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(ground):
    return pretrain(BASE, ground)


def rewards_of(rewarding, W_dec_MD, fires_TM=None, feature_M=None):
    n = len(W_dec_MD)
    fires_TM = torch.rand(400, n, generator=torch.Generator().manual_seed(5)) < 0.1 if fires_TM is None else fires_TM
    feature_M = torch.arange(n) if feature_M is None else feature_M
    return SimplicityRewards(rewarding, 0).rewards(W_dec_MD, fires_TM, feature_M, np.arange(n))


def planted_sums() -> torch.Tensor:
    """Near copies of orthogonal atoms, and behind them sums of two."""
    atoms_KD = torch.eye(64)[:ATOMS]
    rng = np.random.default_rng(0)
    pairs = torch.from_numpy(np.stack([rng.choice(ATOMS, 2, replace=False) for _ in range(SUMS)]))
    noise_MD = 0.02 * torch.randn(COPIES + SUMS, 64, generator=torch.Generator().manual_seed(1))
    return torch.cat([atoms_KD.repeat(COPIES // ATOMS, 1), atoms_KD[pairs].sum(1)]) + noise_MD


def test_latents_that_are_sums_of_shared_directions_have_the_lower_reward():
    reward_M = rewards_of("atomicity", planted_sums())
    assert reward_M[:COPIES].min() > reward_M[COPIES:].max() + 0.25  # a standard deviation
    assert abs(reward_M.mean()) < 1e-6  # centred in its first round


def test_duplicates_split_latents_and_shared_explanations_have_the_lower_reward():
    W_dec_MD = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0][:40].clone()
    W_dec_MD[1], W_dec_MD[3] = W_dec_MD[0], W_dec_MD[2]
    fires_TM = torch.rand(400, 40, generator=torch.Generator().manual_seed(5)) < 0.2
    fires_TM[:, 1] = fires_TM[:, 0]  # the same latent twice
    fires_TM[:, 3] &= ~fires_TM[:, 2]  # one that is shared out between two
    feature_M = torch.arange(40)
    feature_M[5] = feature_M[4]
    reward_M = rewards_of("splitting", W_dec_MD, fires_TM, feature_M)
    assert reward_M[:6].max() < 0 < reward_M[6:].min()
    assert np.ptp(reward_M[6:]) == 0
    assert reward_M[4] == pytest.approx(reward_M[5])
    assert reward_M[:4].max() < reward_M[4]  # half a penalty


def test_both_parts_count_alike_and_a_latent_that_is_not_judged_has_no_say():
    W_dec_MD = planted_sums()
    both_M, atomic_M, split_M = (rewards_of(name, W_dec_MD) for name in ("simplicity", "atomicity", "splitting"))
    np.testing.assert_allclose(both_M, (atomic_M + split_M) / 2**0.5, atol=1e-6)
    fires_TM = torch.zeros(1, len(W_dec_MD), dtype=torch.bool)
    some = np.array([3, 50, COPIES + 1])
    some_N = SimplicityRewards("atomicity", 0).rewards(W_dec_MD, fires_TM, torch.arange(len(W_dec_MD)), some)
    assert some_N.shape == (3,)
    assert some_N.mean() == pytest.approx(0, abs=1e-6)
    assert some_N.argmin() == 2


def judged(ground, base, **asking):
    simplicity = SimplicityRewards("simplicity", 0)
    judge = OracleJudge(ground.world.forest, JudgeErrors(), seed=0)
    rng = np.random.default_rng(0)
    rounds = Rounds(ground, 1500, judge, Asking(64, **asking), rng, None, simplicity=simplicity)
    return rounds.judged(base, 0, 0)[0]


def test_a_rounds_rewards_are_the_decoders_and_shuffling_deals_the_same_ones_anew(ground, base):
    plain, shuffled = judged(ground, base), judged(ground, base, shuffled=True)
    assert np.isfinite(plain.reward).all()
    assert np.ptp(plain.reward) > 0.1
    assert not np.array_equal(plain.reward, shuffled.reward)
    assert np.array_equal(np.sort(plain.reward), np.sort(shuffled.reward))
    assert np.array_equal(plain.latents, shuffled.latents)


def test_rewards_reach_the_sae_and_no_more_strength_is_no_change(ground, base):
    continued, _ = fine_tune(Cell(BASE, "continued", **SMALL), base, ground)
    cell = Cell(BASE, "selection_bonus", rewards="simplicity", bonus=2.0, **SMALL)
    asked, none, other = (
        fine_tune(each, base, ground)[0]
        for each in (cell, replace(cell, bonus=0.0), replace(cell, rewards="atomicity"))
    )
    assert torch.equal(none.W_dec_mD, continued.W_dec_mD)
    assert not torch.equal(asked.W_dec_mD, continued.W_dec_mD)
    assert not torch.equal(asked.W_dec_mD, other.W_dec_mD)


def test_settings_of_rewards_leave_older_keys_alone_and_are_refused_where_nothing_reads_them():
    cell = Cell(Base(k=8), "selection_bonus", k=8)
    assert cell.key == "f4e05f7db0c3"
    assert len({cell.key, replace(cell, bonus=1.0).key, *(replace(cell, rewards=name).key for name in PARTS)}) == 5
    with pytest.raises(UserError, match="teacher_gate uses no reward; estimators that do: selection_bonus"):
        Cell(BASE, "teacher_gate", rewards="atomicity")
    with pytest.raises(UserError, match="uses no reward"):
        Cell(BASE, "continued", rewards="splitting")
    with pytest.raises(UserError, match=r"'short' are unknown; known: verdicts, atomicity"):
        Cell(BASE, "selection_bonus", rewards="short")


def test_a_row_of_one_feature_is_not_composed_and_a_row_of_two_is_by_half():
    e_FD = torch.eye(12)
    assert composed(3 * e_FD[:5], e_FD) == pytest.approx(0, abs=1e-6)
    assert composed(e_FD[:4] + e_FD[4:8], e_FD) == pytest.approx(0.5, abs=1e-5)
    assert composed(torch.stack([e_FD[0], e_FD[1] + e_FD[2]]), e_FD) == pytest.approx(0.25, abs=1e-5)
    assert composed(torch.stack([torch.zeros(12), e_FD[1] + e_FD[2]]), e_FD) == pytest.approx(0.5, abs=1e-5)
