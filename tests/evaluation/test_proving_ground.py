"""The bake-off's cells on a world that is small enough for a unit test: real trainer, real estimators."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from sae_ray.errors import UserError
from sae_ray.evaluation import proving_ground_base, proving_ground_controls, synthetic_worlds
from sae_ray.evaluation.proving_ground import Cell, fine_tune, run_cell
from sae_ray.evaluation.proving_ground_base import Base, Ground, pretrained
from sae_ray.evaluation.proving_ground_choice import choose
from sae_ray.evaluation.proving_ground_controls import Probes, TruthGate
from sae_ray.evaluation.proving_ground_evidence import ACTIVE, NEAR, RANDOM, Asking, ask, draw_rows
from sae_ray.evaluation.proving_ground_readout import full_metrics, main_metrics, readout
from sae_ray.evaluation.proving_ground_rounds import Rounds, margin
from sae_ray.evaluation.synthetic_judge import JudgeErrors, OracleJudge
from sae_ray.evaluation.synthetic_matching import best_by_f1, best_features
from sae_ray.reward.credit import ESTIMATORS, RewardBatch
from sae_ray.reward.verdict_memory import VerdictMemory
from sae_ray.trainer.sharded_sae import CreditParams

TINY = synthetic_worlds.WorldSpec(
    n_features=48, d_in=16, roots=6, branching=3, depth=1, d_sae=24, orthogonal_steps=50, max_probability=0.3
)
BASE = Base("tiny", 0, k=2, steps=120)
SMALL = {"k": 2, "steps": 40, "pool": 2000, "verdicts": 64}


@pytest.fixture(scope="module")
def ground():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its matrices are too small to share, and threads that wait would burn the other core
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic_worlds.PRESETS, "tiny", TINY)
        patch.setattr(proving_ground_base, "BATCH", 256)
        patch.setattr(proving_ground_base, "POOL_BYTES", 2**18)
        patch.setattr(proving_ground_base, "MIN_BATCHES", 8)
        patch.setattr("sae_ray.evaluation.proving_ground.BATCH", 256)
        patch.setattr("sae_ray.evaluation.proving_ground.PROBE_STEPS", 200)
        patch.setattr("sae_ray.evaluation.proving_ground.PROBE_BATCHES", 20)
        yield Ground("tiny", 0, samples=3000)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def base(ground, cache):
    return pretrained(BASE, ground, cache)


def test_a_base_is_trained_once_and_read_back_the_same(ground, cache, base, monkeypatch):
    monkeypatch.setattr(proving_ground_base, "pretrain", lambda *_: pytest.fail("trained again"))
    again = pretrained(BASE, ground, cache)
    assert torch.equal(again.W_enc_mD, base.W_enc_mD)
    x_ND = ground.truth.x_ND
    assert torch.equal(readout(again, x_ND).margin_NM, readout(base, x_ND).margin_NM)


@pytest.mark.parametrize("l0", [1, 2, 4])
def test_metrics_are_at_the_l0_that_was_asked_for(ground, base, l0):
    found = full_metrics(readout(base, ground.truth.x_ND), ground.truth, l0)
    assert found["l0"] == pytest.approx(l0, abs=1e-3)


def test_deployed_metrics_are_those_of_the_codes_that_the_trainer_gives(ground, base):
    found = full_metrics(readout(base, ground.truth.x_ND), ground.truth, None)
    codes = base.encode(ground.truth.x_ND)
    assert found["l0"] == pytest.approx(len(codes.vals_N) / len(ground.truth.x_ND), rel=1e-3)


def test_true_labels_beat_continued_training_at_the_same_l0(ground, cache):
    runs = {
        method: run_cell(Cell(BASE, method, k=2, steps=300, gamma=0.3), ground, cache)
        for method in ("continued", "true_labels")
    }
    f1 = {method: run["curve"][-1]["f1"] for method, run in runs.items()}
    assert f1["true_labels"] > f1["continued"] + 0.02
    assert all(step["l0"] == pytest.approx(2, abs=1e-3) for run in runs.values() for step in run["curve"])


@pytest.mark.parametrize("method", sorted(ESTIMATORS))
def test_every_estimator_runs_and_spends_no_more_than_its_verdicts(ground, cache, method):
    record = run_cell(Cell(BASE, method, **SMALL), ground, cache)
    assert 0 < record["verdicts_per_latent"] <= 64
    assert record["matched"]["4"]["l0"] == pytest.approx(4, abs=1e-2)
    assert math.isfinite(record["matched"]["4"]["f1"])
    assert set(record["matched"]) == {"2", "4", "8"}  # the two of every table, and the cell's own
    assert 0 <= record["collapsed"] < 0.5
    assert Cell.read(json.loads(json.dumps(record))["cell"]) == Cell(BASE, method, **SMALL)


@pytest.mark.parametrize("method", ["probes", "verdict_probes", "base"])
def test_controls_without_training_run(ground, cache, method):
    record = run_cell(Cell(BASE, method, **SMALL), ground, cache)
    assert 0 < record["deployed"]["f1"] < 1
    assert record["curve"] == []


def test_the_base_itself_has_collapsed_nowhere_and_its_numbers_are_the_same_by_either_way(ground, cache, base):
    record = run_cell(Cell(BASE, "base", **SMALL), ground, cache)
    assert record["collapsed"] == 0
    at = readout(base, ground.truth.x_ND)
    assert record["matched"]["4"] == full_metrics(at, ground.truth, 4)
    assert record["frontier"][2] == main_metrics(at, ground.truth, 4)


def test_probes_of_verdicts_do_not_depend_on_how_many_are_fitted_at_once(ground, base, monkeypatch):
    rows = rows_of(ground, base)
    pool = ground.pool(2000, 0)
    together, apart = Probes(pool.x_TD, 24), Probes(pool.x_TD, 24)
    together.train_on_verdicts(pool.x_TD, rows, steps=30)
    monkeypatch.setattr(proving_ground_controls, "GATHERED_BYTES", 5 * 64 * 16 * 4)
    apart.train_on_verdicts(pool.x_TD, rows, steps=30)
    assert torch.allclose(together.margin(pool.x_TD), apart.margin(pool.x_TD), atol=1e-4)
    assert set(torch.nonzero(apart.b_M > -1e3).flatten().tolist()) == set(rows.latents.tolist())


def test_a_pool_is_drawn_once_while_it_fits_and_the_same_when_it_does_not(ground, monkeypatch):
    one = ground.pool(500, 7)
    assert ground.pool(500, 7) is one
    monkeypatch.setattr(proving_ground_base, "EVIDENCE_BYTES", 0)
    other = ground.pool(501, 7)
    assert ground.pool(501, 7) is not other
    assert torch.equal(ground.pool(501, 7).x_TD, other.x_TD)


def test_supervised_probes_are_better_detectors_than_the_base(ground, cache, base):
    probes = run_cell(Cell(BASE, "probes"), ground, cache)["deployed"]["f1"]
    assert probes > full_metrics(readout(base, ground.truth.x_ND), ground.truth, None)["f1"]


def test_a_frozen_decoder_stays_and_its_encoder_moves(ground, base):
    tuned, _ = fine_tune(Cell(BASE, "true_labels", frozen_decoder=True, **SMALL), base, ground)
    assert torch.equal(tuned.W_dec_mD, base.W_dec_mD)
    assert torch.equal(tuned.b_dec_D, base.b_dec_D)
    assert not torch.equal(tuned.W_enc_mD, base.W_enc_mD)


def test_rewards_that_arrive_after_the_end_change_nothing(ground, base):
    plain, _ = fine_tune(Cell(BASE, "continued", **SMALL), base, ground)
    late, judge = fine_tune(Cell(BASE, "teacher_gate", delay_steps=1000, **SMALL), base, ground)
    assert torch.equal(plain.W_enc_mD, late.W_enc_mD)
    assert judge.verdicts_spent > 0
    in_time, _ = fine_tune(Cell(BASE, "teacher_gate", delay_steps=10, **SMALL), base, ground)
    assert not torch.equal(plain.W_enc_mD, in_time.W_enc_mD)


def test_a_cell_is_repeatable(ground, base):
    cell = Cell(BASE, "teacher_gate", **SMALL)
    one, two = (fine_tune(cell, base, ground)[0] for _ in range(2))
    assert torch.equal(one.W_enc_mD, two.W_enc_mD)


def test_rows_of_a_latent_stand_for_the_whole_pool():
    margin_T = np.random.default_rng(0).normal(-1, 1, 4000)
    sample, kind, weight = draw_rows(margin_T, 64, np.random.default_rng(1))
    assert [int((kind == which).sum()) for which in (ACTIVE, NEAR, RANDOM)] == [32, 16, 16]
    assert len(set(sample.tolist())) == 64
    assert weight.sum() == pytest.approx(4000)
    assert (margin_T[sample[kind == ACTIVE]] >= 0).all()
    assert (margin_T[sample[kind == NEAR]] < 0).all()
    assert margin_T[sample[kind == RANDOM]].max() < margin_T[sample[kind == NEAR]].min()


def rows_of(ground, base, **asking) -> RewardBatch:
    pool = ground.pool(2000, 0)
    margin_TM = base.pre_activations(pool.x_TD) - base.thresholds_m()
    judge = OracleJudge(ground.world.forest, JudgeErrors(), seed=0)
    return ask(judge, Asking(64, **asking), margin_TM, pool, 5, 0, np.random.default_rng(0))


def test_shuffling_deals_verdicts_anew_but_keeps_each_kinds_share(ground, base):
    plain, shuffled = rows_of(ground, base), rows_of(ground, base, shuffled=True)
    assert np.array_equal(plain.row_context, shuffled.row_context)
    assert not np.array_equal(plain.row_verdict, shuffled.row_verdict)
    for active in (True, False):
        a, b = (rows.row_verdict[rows.row_active == active] for rows in (plain, shuffled))
        assert a.sum() == b.sum()


def test_a_batch_trusts_all_judged_latents_alike_and_names_its_step(ground, base):
    rows = rows_of(ground, base)
    assert rows.credit_weight.sum() == pytest.approx(1)
    assert rows.sae_step == 5
    assert set(rows.row_latent.tolist()) == set(rows.latents.tolist())


def test_the_gate_with_true_labels_is_a_cross_entropy_with_their_gradient():
    g = torch.Generator().manual_seed(0)
    W_mD, b_m = torch.randn(3, 4, generator=g, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    x_BD = torch.randn(20, 4, generator=g, dtype=torch.float64)
    truth = TruthGate(gamma=0.5, slope=4.0)
    truth.labels_BM = torch.rand(20, 3, generator=g) < 0.4
    thr = torch.tensor(0.7, dtype=torch.float64)

    def loss(W: torch.Tensor) -> torch.Tensor:
        return truth.loss(x_BD, CreditParams(W, b_m, torch.zeros(4, dtype=torch.float64), 0, 0), thr)

    expected = 0.0
    for j in range(3):
        total = 0.0
        for x, y in zip(x_BD, truth.labels_BM[:, j], strict=True):
            logit = 4.0 * (float(x @ W_mD[j]) - 0.7) / 0.7
            total += math.log1p(math.exp(-logit if y else logit))
        expected += 0.5 * total / max(1, int(truth.labels_BM[:, j].sum())) / 3
    assert float(loss(W_mD)) == pytest.approx(expected)
    assert torch.autograd.gradcheck(loss, (W_mD.clone().requires_grad_(),))


def test_a_probes_threshold_is_the_best_of_all_cuts():
    g = torch.Generator().manual_seed(0)
    x_TD = torch.randn(200, 3, generator=g)
    label_TM = (x_TD[:, :1] + 0.5 * torch.randn(200, 1, generator=g)) > 1
    probes = Probes(x_TD, 1)
    probes.W_MD[0, 0] = 1.0
    probes.choose_thresholds(x_TD, label_TM)

    def f1(fires: torch.Tensor) -> float:
        return float(2 * (fires & label_TM[:, 0]).sum() / (fires.sum() + label_TM.sum()))

    score_T = probes.standard(x_TD)[:, 0]
    best = max(f1(score_T >= cut) for cut in score_T)
    assert f1(probes.margin(x_TD)[:, 0] >= 0) == pytest.approx(best)


def test_matched_features_are_those_of_the_decoder(ground, base):
    assert len(best_features(base.W_dec_mD, ground.truth.directions_FD)) == TINY.d_sae


def test_cells_that_differ_have_different_keys_and_an_unknown_method_is_refused():
    cell = Cell(BASE, "continued")
    assert cell.key == Cell.read(asdict(cell)).key
    assert cell.key != replace(cell, noise=0.2).key
    assert replace(BASE, seed=1).key != BASE.key
    with pytest.raises(UserError, match=r"'magic' is unknown; known: base, continued, .*teacher_gate"):
        Cell(BASE, "magic")


def test_kept_verdicts_still_say_which_sample_they_are_about(ground, base):
    judge = OracleJudge(ground.world.forest, JudgeErrors(), seed=0)
    rounds = Rounds(ground, 1500, judge, Asking(64), np.random.default_rng(0), VerdictMemory(2, 1e6))
    sizes = []
    for number in range(3):
        rows, pool = rounds.judged(base, 10 * number, number)
        sizes.append(len(rows.row_latent))
        active_V = (base.pre_activations(pool.x_TD) >= base.thresholds_m()).numpy()[rows.row_context, rows.row_latent]
        assert np.array_equal(rows.row_active, active_V)
        for latent in rows.latents.tolist():
            mine = rows.row_latent == latent
            says_VF = pool.on_TF[rows.row_context[mine]].numpy()
            # A judge without errors: some feature explains every verdict on a latent, of whichever round.
            assert (says_VF == (rows.row_verdict[mine, None] > 0.5)).all(0).any()
    assert len(pool.x_TD) == 4500
    assert sizes[2] > 2 * sizes[0]


def test_cells_with_kept_verdicts_or_a_held_fvu_run(ground, cache):
    kept = run_cell(Cell(BASE, "teacher_gate", keep_rounds=1, **SMALL), ground, cache)
    plain = run_cell(Cell(BASE, "teacher_gate", **SMALL), ground, cache)
    assert kept["verdicts_spent"] == pytest.approx(plain["verdicts_spent"], rel=0.05)
    assert kept["curve"][0] == plain["curve"][0]  # there is nothing to keep in the first round
    assert kept["curve"][1] != plain["curve"][1]
    later = {"delay_steps": 5, **SMALL}
    free = run_cell(Cell(BASE, "teacher_gate", **later), ground, cache)
    held = run_cell(Cell(BASE, "teacher_gate", max_fvu_rise=0.5, **later), ground, cache)  # FVU falls here
    assert held["curve"][-1] == {**free["curve"][-1], "gamma_weight": 1.0}
    with pytest.raises(UserError, match="need an estimator and delay_steps above 0"):
        Cell(BASE, "teacher_gate", max_fvu_rise=0.01)


def test_settings_that_came_later_leave_the_keys_of_finished_cells_as_they_were():
    cell = Cell(Base(k=8), "teacher_gate", k=8, gamma=0.03)
    assert cell.key == "af0036b57e6e"
    assert replace(cell, keep_rounds=1).key != cell.key


def test_candidates_that_compete_on_verdicts_name_the_right_feature_and_stay_within_the_budget(ground, base):
    """Without errors they find what the oracle of all labels does, for most latents; with errors for fewer."""
    pool = ground.pool(2000, 0)
    margin_TM = margin(base, pool)
    fires_TM = margin_TM >= 0
    best_M = best_by_f1(fires_TM, pool.on_TF)
    explained_M = (fires_TM.sum(0) >= 20).numpy()
    agree = []
    for flipped in (0.0, 0.3):
        judge = OracleJudge(ground.world.forest, JudgeErrors(verdict=flipped), seed=1)
        found_M = choose(judge, margin_TM, pool.on_TF, verdicts=256)
        assert judge.verdicts_spent <= 256 * len(best_M)
        assert judge.verdicts_spent > 128 * explained_M.sum()
        agree.append(float((found_M == best_M).numpy()[explained_M].mean()))
    assert agree[0] > 0.8
    assert agree[1] < agree[0]


def test_half_of_the_verdicts_choose_where_candidates_compete(ground, base):
    pool = ground.pool(2000, 0)
    judge = OracleJudge(ground.world.forest, JudgeErrors(), seed=1)
    rows = ask(judge, Asking(128, "specific"), margin(base, pool), pool, 0, 0, np.random.default_rng(0))
    assert np.bincount(rows.row_latent).max() == 64
    assert judge.verdicts_spent <= 128 * len(base.b_enc_m)
