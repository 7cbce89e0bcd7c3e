"""The bake-off's grids, how a run goes on where it was stopped, and its report's numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from benchmark_scripts import load

from sae_ray.evaluation.proving_ground import Cell
from sae_ray.evaluation.proving_ground_base import Base

credit = load("credit")
grid, rows, report, targets = (sys.modules[f"credit_{part}"] for part in ("grid", "rows", "report", "targets"))

B8, M8, FAMILIES = (rows.start_name(start) for start in (grid.BATCHTOPK, grid.MATRYOSHKA, grid.FAMILIES))


# ---------------------------------------------------------------------- grids


@pytest.mark.parametrize("name", ["deciding", "sweep", "full"])
def test_a_grid_repeats_no_cell_and_every_stage_has_all_its_seeds_with_bases_first(name):
    stages = grid.by_stage(name, [0, 1], {})
    keys = [cell.key for cells in stages.values() for cell in cells]
    assert len(set(keys)) == len(keys)
    for cells in stages.values():
        assert {cell.base.seed for cell in cells} == {0, 1}
        trained = {cell.base for cell in cells if cell.method == "base"}
        first = [cell.base for cell in cells[: len(trained)]]
        assert not trained or set(first) == trained


def test_the_full_grid_crosses_every_estimator_with_verdicts_noise_and_staleness():
    asked = {
        (cell.method, cell.verdicts, cell.noise, cell.delay_steps)
        for cells in grid.by_stage("full", [0], {}).values()
        for cell in cells
    }
    for method in grid.COMPARED:
        for verdicts in (32, 128, 256, 1024):
            for noise in (0.0, 0.1, 0.2):
                assert {(method, verdicts, noise, delay) for delay in grid.DELAYS} <= asked
                assert ("verdict_probes", verdicts, noise, 0) in asked


def test_the_deciding_grid_has_every_control_of_the_issue():
    cells = [cell for cells in grid.by_stage("deciding", [0], {}).values() for cell in cells]
    for start in (grid.BATCHTOPK, grid.MATRYOSHKA):
        own = [cell for cell in cells if rows.start_of(asdict(cell)) == rows.start_name(start)]
        methods = {cell.method for cell in own}
        assert methods >= {"base", "continued", "true_labels", "probes", "verdict_probes", grid.DEFAULT}
        default = [cell for cell in own if cell.method == grid.DEFAULT]
        assert any(cell.shuffled for cell in default)
        assert any(cell.frozen_decoder for cell in default)
        assert any(cell.explain == "random_negatives" for cell in default)
        assert any(cell.verdicts == 2048 for cell in default)
        assert len({cell.gamma for cell in default if not cell.shuffled}) >= 3
    assert {cell.method for cell in cells} >= set(grid.COMPARED)
    assert {cell.base.world for cell in cells} == {"research", "parent_child"}


def test_settings_are_changed_in_all_cells_and_a_smoke_grid_has_one_seed():
    stages = grid.by_stage("smoke", [0, 1], {"gamma": 0.7})
    assert {(cell.gamma, cell.base.seed) for cell in stages["smoke"]} == {(0.7, 0)}
    assert all(name in report.LEFT_OUT for name in grid.GRIDS)


def test_a_stage_that_is_run_alone_has_the_cells_it_shares_and_simplicity_has_its_controls():
    whole, alone = (grid.by_stage("deciding", [0], {}, only) for only in (None, ["simplicity"]))
    assert list(alone) == ["simplicity"]
    before = {cell.key for stage, cells in whole.items() if stage != "simplicity" for cell in cells}
    shared = [cell for cell in alone["simplicity"] if cell.key in before]
    assert {(cell.method, cell.base.world) for cell in shared} == {
        (method, world) for method in ("base", "continued") for world in ("research", "parent_child")
    }
    asked = [cell for cell in alone["simplicity"] if cell not in shared]
    assert asked == whole["simplicity"]
    assert {cell.rewards for cell in asked} == {"atomicity", "splitting", "simplicity"}
    assert len({cell.bonus for cell in asked}) >= 3
    for cell in asked:
        assert not cell.shuffled or replace(cell, shuffled=False) in asked


# ---------------------------------------------------------------------- running


def test_finished_cells_are_read_and_a_torn_line_is_not(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c", "ce')
    assert list(credit.finished(tmp_path)) == ["a", "b"]
    assert "not whole" in capsys.readouterr().err
    assert credit.finished(tmp_path / "none") == {}


def test_a_line_after_a_torn_one_is_whole(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": "a"}\n{"key": "c", "ce')
    with credit._appended(file) as lines:
        lines.write('{"key": "d"}\n')
    with credit._appended(file) as lines:
        lines.write('{"key": "e"}\n')
    assert list(credit.finished(tmp_path)) == ["a", "d", "e"]


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch, capsys):
    cell = Cell(Base(), "continued")
    (tmp_path / "results.jsonl").write_text(json.dumps({"key": cell.key}) + "\n")
    monkeypatch.setattr(credit, "_work", None)  # cannot be sent to a worker
    assert credit.run([cell], tmp_path, minutes=1, workers=1) == 0
    assert "left" not in capsys.readouterr().out


def test_a_worker_ends_with_the_process_that_started_it():
    code = "import sys; sys.path[:0] = sys.argv[2:]; import credit; print('here', flush=True); "
    code += "credit._end_with(int(sys.argv[1]))"
    worker = subprocess.Popen([sys.executable, "-c", code, str(os.getpid() + 1), *sys.path], stdout=subprocess.PIPE)
    try:
        assert worker.wait(timeout=180) == 1
        assert worker.stdout.read() == b"here\n"
    finally:
        worker.kill()


# ---------------------------------------------------------------------- rows and report


def record(start, method: str, seed: int, f1: float, ev: float = 0.7, mcc: float = 0.8, **changes) -> dict:
    cell = start.cell(seed, method, **changes)
    at = {**dict.fromkeys(rows.METRICS, 0.5), "l0": 8.0, "f1": f1, "ev": ev, "mcc": mcc, "absorption": math.nan}
    return {
        "key": cell.key,
        "cell": asdict(cell),
        "matched": {"4": {**at, "l0": 4.0}, "8": at},
        "deployed": at,
        "frontier": [{"l0": 8.0, "ev": ev, "f1": f1}],
        "collapsed": 0.0,
        "cpu_seconds": 3600.0,
        "run": {"commit": "abc1234", "command": "benchmarks/credit.py --seeds 0 1"},
    }


def both_seeds() -> list[dict]:
    found = []
    for s in (0, 1):
        found += [
            record(grid.BATCHTOPK, "continued", s, 0.60 + 0.1 * s, 0.75),
            record(grid.BATCHTOPK, "teacher_gate", s, 0.70 + 0.1 * s, 0.72, gamma=0.01),
            record(grid.BATCHTOPK, "teacher_gate", s, 0.90 + 0.1 * s, 0.68, mcc=0.9, gamma=0.03),
            record(grid.BATCHTOPK, "teacher_gate", s, 0.62 + 0.1 * s, 0.65, gamma=0.03, shuffled=True),
            record(grid.BATCHTOPK, "probes", s, 0.99),
        ]
        found[-1]["matched"] = {}
        del found[-1]["collapsed"]
    return found


def test_a_method_is_taken_where_its_cells_over_gamma_cross_the_level():
    results = rows.Results(both_seeds())
    assert results.gammas(B8, "teacher_gate") == [0.01, 0.03]
    at = results.at(B8, "teacher_gate", 8, 0.70)
    assert [at[seed]["f1"] for seed in (0, 1)] == pytest.approx([0.8, 0.9])
    assert [at[seed]["gamma"] for seed in (0, 1)] == pytest.approx([0.02, 0.02])
    # continued training is the first point of every path: halfway from .75 to .65
    level = results.below_continued(B8, 8, 0.05)
    assert level == pytest.approx({0: 0.70, 1: 0.70})
    null = results.at(B8, "teacher_gate, shuffled verdicts", 8, level)
    assert null[0]["f1"] == pytest.approx(0.61)
    assert results.shuffled(B8, "teacher_gate") == "teacher_gate, shuffled verdicts"
    assert results.at(B8, "probes", 8, level) == {}


def test_what_is_unusual_of_a_cell_is_in_its_label_and_its_seed_and_gamma_are_not():
    cell = asdict(grid.BATCHTOPK.cell(3, "teacher_gate", gamma=0.3, verdicts=128, explain="random_negatives"))
    assert rows.label(cell) == "teacher_gate, 128 verdicts, explained against random negatives"
    assert rows.start_of(cell) == "research, batchtopk k 8"
    assert rows.start_of({**cell, "k": 4}) == "research, batchtopk k 8 tuned at k 4"
    asked = asdict(grid.BATCHTOPK.cell(0, "selection_bonus", rewards="atomicity", bonus=2.0, shuffled=True))
    assert rows.label(asked) == "selection_bonus, shuffled rewards, rewarded for atomicity, bonus 2"
    assert rows.label({**asked, "rewards": "verdicts", "bonus": 0.1}) == "selection_bonus, shuffled verdicts"


def test_records_of_before_a_metric_or_a_setting_was_there_are_still_read():
    old = both_seeds()
    for each in old:
        del each["cell"]["rewards"], each["cell"]["bonus"]
        for at in each["matched"].values():
            del at["composed"]
    results = rows.Results(old)
    assert results.rows(B8, "continued", 0.0, 8)[0]["f1"] == 0.60
    assert math.isnan(results.rows(B8, "continued", 0.0, 8)[0]["composed"])
    assert "| composed |" in report.report("deciding", grid.by_stage("deciding", [0, 1], {}), old)


def test_a_report_of_some_stages_names_the_others_and_no_targets_that_nobody_ran():
    cells = [record(grid.BATCHTOPK, "continued", s, 0.6) for s in (0, 1)]
    cells += [record(grid.BATCHTOPK, "selection_bonus", s, 0.6, rewards="simplicity") for s in (0, 1)]
    text = report.report("deciding", grid.by_stage("deciding", [0, 1], {}, ["simplicity"]), cells)
    assert "## Targets" not in text
    assert "the stages `teacher`, `parents`" in text
    assert "| selection_bonus, rewarded for simplicity |" in text


def test_an_interval_is_students_and_missing_values_are_left_out_and_never_zero():
    # two seeds: half width 12.71 * sd / sqrt(2) = 12.71 * .0707 / 1.414
    assert rows.interval([0.65, 0.75]) == "0.700 ± 0.635"
    assert rows.interval([0.2, math.nan]) == "0.200"
    assert rows.interval([math.nan]) == ""
    assert rows.interval([0.05, 0.05], signed=True) == "+0.050 ± 0.000"
    assert rows.interval([0.0, 1.0] * 6) == "0.500 ± 0.332"  # t of 11 degrees of freedom is 2.201
    assert rows.differences({0: {"f1": 0.7}, 2: {"f1": 0.9}}, {0: {"f1": 0.6}, 1: {"f1": 0.1}}, "f1") == pytest.approx(
        [0.1]
    )


def test_the_report_names_its_commands_and_what_is_missing_and_its_tables_are_whole():
    stages = grid.by_stage("deciding", [0, 1], {})
    text = report.report("deciding", stages, both_seeds())
    assert "10 cells at commit abc1234: `benchmarks/credit.py --seeds 0 1`" in text
    assert "cells of stage `parents`" in text
    assert "The large world." in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
    row = next(line for line in text.splitlines() if line.startswith("| teacher_gate | 0.03 | 2 |"))
    assert "| +0.300 ± 0.000 |" in row  # F1 - continued, paired: no spread
    at_level = text.split("less 0.05")[1]
    row = next(line for line in at_level.splitlines() if line.startswith("| teacher_gate | 0.01, 0.03 | 2 |"))
    assert row.endswith("| +0.200 ± 0.000 | +0.050 ± 0.000 | +0.190 ± 0.000 |")
    assert "| probes of true labels (no SAE, own L0) |" in text


def test_a_target_is_met_by_means_missed_by_one_of_them_and_open_where_nothing_was_run():
    found = {finding.target: finding for finding in targets.targets(rows.Results(both_seeds()))}
    first = next(finding for target, finding in found.items() if "at least 0.80" in target)
    assert first.met
    assert first.measured.startswith("F1 0.850 ± 0.635, MCC 0.850")
    assert all(finding.met is None for target, finding in found.items() if "2048" in target)
    low = both_seeds()
    for each in low:
        each["matched"].get("8", {})["mcc"] = 0.79
    missed = targets.targets(rows.Results(low))[0]
    assert missed.met is False
    assert targets.verdict(missed) == "**missed**"
    gain = next(finding for target, finding in found.items() if target.startswith(B8) and "gain at most" in target)
    assert gain.met  # .002 at .01 below .75
    assert gain.shuffled == "F1 +0.002 ± 0.000"


def test_the_combination_is_held_against_its_own_shuffled_verdicts_and_with_more_of_them_at_its_own_ev():
    chosen, more = {**grid.KEPT, **grid.ROLLOUTS}, {**grid.KEPT, "rollout_gamma": 0.2, "rollout_share": 0.25}
    cells = []
    for s in (0, 1, 2):
        cells += [
            record(grid.BATCHTOPK, "continued", s, 0.72, 0.75, **grid.LONGER),
            record(grid.BATCHTOPK, grid.BOTH, s, 0.82, 0.70, mcc=0.81, gamma=0.02, **chosen),
            record(grid.BATCHTOPK, grid.BOTH, s, 0.74, 0.70, mcc=0.75, gamma=0.02, **chosen, shuffled=True),
            record(grid.BATCHTOPK, grid.BOTH, s, 0.84, 0.60, mcc=0.83, gamma=0.05, **more, verdicts=2048),
        ]
    found = targets.targets(rows.Results(cells))
    assert (found[1].met, found[3].met) == (True, True)
    assert found[1].measured == "F1 0.820 ± 0.000, MCC 0.810 ± 0.000 (3 seeds)"
    assert found[1].shuffled == "F1 0.740 ± 0.000, MCC 0.750 ± 0.000 (3 seeds)"
    assert found[3].measured == "F1 0.840 ± 0.000, MCC 0.830 ± 0.000 at EV 0.600 ± 0.000 (3 seeds)"
    assert found[0].met is found[2].met is None
    assert found[3].shuffled == "", "other verdicts' null is not its own"
    for cell in cells:
        if cell["cell"]["verdicts"] == 2048:
            cell["matched"]["8"]["l0"] = 7.2
    short = targets.targets(rows.Results(cells))[3]
    assert short.met is False
    assert "and only L0 7.200" in short.measured


def test_matryoshka_is_beaten_only_at_an_ev_within_a_hundredth():
    cells = []
    for s in (0, 1, 2):
        cells += [
            record(grid.MATRYOSHKA, "continued", s, 0.80, 0.72, mcc=0.83),
            record(grid.MATRYOSHKA, "teacher_gate", s, 0.862, 0.70, mcc=0.85, gamma=0.1),
        ]
    over, moon = targets.targets(rows.Results(cells))[4:6]
    assert over.met  # half of the way: + .031
    assert over.measured.startswith("F1 +0.031")
    assert moon.measured == "1.0 of 1 points left (3 seeds)"
    assert moon.met is False
    for each in cells:
        each["frontier"][0]["ev"] = 0.72
    assert targets.targets(rows.Results(cells))[5].met


def test_absorption_is_held_against_the_bases_at_equal_ev_and_collapse_against_continued_training():
    cells = []
    for start in (grid.BATCHTOPK, grid.MATRYOSHKA, grid.FAMILIES):
        cells += [
            record(start, "base", 0, 0.8, 0.75),
            record(start, "continued", 0, 0.8, 0.76),
            record(start, "teacher_gate", 0, 0.8, 0.72, gamma=0.1),
            record(start, "teacher_gate", 0, 0.8, 0.72, gamma=0.1, explain="random_negatives"),
        ]
        for each, absorbed, share in zip(cells[-4:], (0.4, 0.4, 0.1, 0.5), (0.0, 0.0, 0.005, 0.5), strict=True):
            each["matched"]["4"]["absorption"] = absorbed
            each["collapsed"] = share
    *_, absorption, at_8, _, _, _, collapse = targets.targets(rows.Results(cells))
    # .74 is halfway between .76 (.4) and .72 (.1): .25 of .4
    assert absorption.measured == "0.625 of 0.400"
    assert absorption.met is False
    assert at_8.met is None  # nothing was tuned at k 8
    assert collapse.met
    assert "against random negatives 50.0%" in collapse.measured


def test_the_plot_has_a_line_for_each_credit_that_ran(tmp_path):
    plots = load("credit_plot")
    cells = [record(grid.BATCHTOPK, "continued", s, 0.72, 0.75) for s in (0, 1)]
    with pytest.raises(SystemExit, match="continued training"):
        plots.plot(rows.Results([]), tmp_path / "none.svg")
    cells += [record(grid.BATCHTOPK, "teacher_gate", s, 0.8, 0.70, gamma=0.03) for s in (0, 1)]
    plots.plot(rows.Results(cells), tmp_path / "frontier.svg")
    drawn = (tmp_path / "frontier.svg").read_text()
    assert "research, batchtopk k 8" in drawn
    assert drawn.count("teacher_gate") >= 1
    assert "shuffled" not in drawn


def test_the_sweep_has_tables_of_its_own_with_gains_paired_by_seed():
    def swept(method: str, seed: int, f1: float, ev: float = 0.7, **changes) -> dict:
        found = record(grid.SMALL, method, seed, f1, ev, **grid.HALF, **changes)
        return {**found, "matched": {str(grid.SMALL.k): found["matched"]["8"]}}

    asked = {"gamma": 0.03, "verdicts": 1024, "noise": 0.2}
    records = [swept("continued", seed, f1, 0.75) for seed, f1 in ((0, 0.5), (1, 0.9), (2, 0.1))]
    records += [swept("teacher_gate", 0, 0.6, mcc=0.83, **asked), swept("teacher_gate", 1, 0.9, mcc=0.83, **asked)]
    text = report.report("sweep", grid.by_stage("sweep", [0, 1, 2], {}), records)
    assert "## Targets" not in text
    row = next(line for line in text.split("20% flipped:")[1].splitlines() if line.startswith("| teacher_gate |"))
    assert row == "| teacher_gate | - | - | - | +0.050 ± 0.635 / +0.030 ± 0.000 / -0.050 ± 0.000 (2) |"
    assert "F1 - continued" not in text
