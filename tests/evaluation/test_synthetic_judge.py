"""The oracle judge errs as often as it is told to, toward whom it is told to, and counts what it gave."""

import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.evaluation.synthetic_judge import JudgeErrors, OracleJudge
from sae_ray.evaluation.synthetic_worlds import WorldSpec, grow

FOREST = grow(WorldSpec(n_features=12, d_in=8, roots=3, branching=3, depth=1, d_sae=4))
N = 6000


def shown(seed: int = 0) -> torch.Tensor:
    """Children 3..5 of root 0 are exclusive and imply it; so on."""
    g = torch.Generator().manual_seed(seed)
    on_NF = torch.zeros(N, 12, dtype=torch.bool)
    for root in range(3):
        on_NF[:, root] = torch.rand(N, generator=g) < 0.3
        kid_N = torch.randint(0, 4, (N,), generator=g)
        for kid in range(3):
            on_NF[:, 3 + 3 * root + kid] = on_NF[:, root] & (kid_N == kid)
    return on_NF


def rate(judge: OracleJudge, rows: torch.Tensor, feature: int, on_NF: torch.Tensor) -> float:
    return float(judge.verdicts(rows, torch.full_like(rows, feature), on_NF).mean())


def test_a_perfect_judge_says_what_is_there_and_counts_its_verdicts():
    on_NF = shown()
    judge = OracleJudge(FOREST, JudgeErrors(), seed=1)
    rows, features = torch.arange(1000), torch.arange(1000) % 12
    assert torch.equal(judge.verdicts(rows, features, on_NF), on_NF[rows, features].float())
    judge.verdicts(rows[:7], features[:7], on_NF)
    assert judge.verdicts_spent == 1007


def test_verdicts_are_flipped_as_often_either_way_as_told():
    on_NF = shown()
    judge = OracleJudge(FOREST, JudgeErrors(verdict=0.2), seed=1)
    there, absent = (torch.nonzero(on_NF[:, 0] == value).flatten() for value in (True, False))
    assert rate(judge, there, 0, on_NF) == pytest.approx(0.8, abs=0.04)
    assert rate(judge, absent, 0, on_NF) == pytest.approx(0.2, abs=0.04)


def test_leniency_is_only_toward_siblings_and_parents():
    on_NF = shown()
    judge = OracleJudge(FOREST, JudgeErrors(leniency=0.5), seed=1)
    parent_shows = torch.nonzero(on_NF[:, 0] & ~on_NF[:, 3]).flatten()
    stranger = torch.nonzero(~on_NF[:, 0] & on_NF[:, 1]).flatten()
    assert rate(judge, parent_shows, 3, on_NF) == pytest.approx(0.5, abs=0.05)
    assert rate(judge, stranger, 3, on_NF) == 0
    assert rate(judge, torch.nonzero(on_NF[:, 3]).flatten(), 3, on_NF) == 1


def test_an_explanation_by_f1_is_the_best_of_all_features():
    on_NF = shown()
    fires_NM = on_NF[:, [4, 0, 8]].clone()
    fires_NM[::10] = False
    judge = OracleJudge(FOREST, JudgeErrors(), seed=1)
    assert judge.explain(fires_NM, on_NF).tolist() == [4, 0, 8]
    assert judge.texts_read == N


def test_explained_against_random_negatives_a_rare_childs_parent_can_win():
    """A latent of two of three children is best described by none of them there, and by its parent."""
    on_NF = shown()
    fires_NM = (on_NF[:, 3] | (on_NF[:, 4] & (torch.arange(N) % 3 == 0)))[:, None].repeat(1, 40)
    by_f1 = OracleJudge(FOREST, JudgeErrors(), seed=1).explain(fires_NM, on_NF)
    naive = OracleJudge(FOREST, JudgeErrors(), seed=1).explain(fires_NM, on_NF, "random_negatives")
    assert set(by_f1.tolist()) == {3}
    assert (naive == 0).float().mean() > 0.5


def test_wrong_explanations_name_a_relative_as_often_as_told():
    on_NF = shown()
    fires_NM = on_NF[:, [4]].repeat(1, 400)
    judge = OracleJudge(FOREST, JudgeErrors(explanation=0.3), seed=1)
    found = judge.explain(fires_NM, on_NF)
    wrong = found[found != 4]
    assert len(wrong) / 400 == pytest.approx(0.3, abs=0.08)
    assert set(wrong.tolist()) == {0, 3, 5}  # its parent and its siblings


def test_a_seed_decides_every_error():
    on_NF, rows = shown(), torch.arange(500)
    first, again, other = (
        OracleJudge(FOREST, JudgeErrors(verdict=0.3), seed).verdicts(rows, rows % 12, on_NF) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_error_rate_that_is_no_probability_is_refused():
    with pytest.raises(UserError, match=r"leniency 1\.5"):
        JudgeErrors(leniency=1.5)
