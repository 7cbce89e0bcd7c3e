"""The loop's model against what queueing theory says in closed form, and what must hold whatever the rates are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from benchmark_scripts import load

from sae_ray.config_file import parse_config
from sae_ray.errors import UserError

model = load("loop_model")
simulate_script = load("simulate")
paper = load("simulate_paper")
Loop, Rates, simulate = model.Loop, model.Rates, model.simulate


def loop(**changes) -> Loop:
    return replace(Loop(producers=4, steps=800, mix_blocks=2, window_blocks=16, steps_per_window=4), **changes)


def judged_loop(**changes) -> Loop:
    settings = {"rlaif_steps": 80, "rounds": 4, "latents": 32, "evidence_blocks": 8, "max_staleness_steps": 20}
    return loop(**{**settings, **changes})


def test_producers_that_are_too_slow_decide_the_rate():
    run = simulate(loop(), Rates(block_s=2.0, step_s=0.01))
    # 200 windows of 2 blocks, 4 producers; then the last two windows, which come at once, are trained.
    assert run.seconds == pytest.approx(400 * 2.0 / 4 + 2 * 4 * 0.01, rel=1e-9)
    assert run.bottleneck == "producers"
    assert run.producer_busy == pytest.approx(1, abs=0.001)
    assert run.share(model.TRAIN) == pytest.approx(800 * 0.01 / run.seconds)


def test_a_trainer_that_is_too_slow_decides_the_rate_and_producers_stand_still():
    run = simulate(loop(), Rates(block_s=0.1, step_s=0.5, window_s=0.2))
    assert run.seconds == pytest.approx(0.1 + 800 * 0.5 + 200 * 0.2, rel=1e-9)  # only the first window is waited for
    assert run.bottleneck == "trainer"
    assert run.producer_busy == pytest.approx((400 + 16) * 0.1 / 4 / run.seconds, rel=0.01)


def test_judges_that_are_too_slow_decide_the_rate():
    loop_ = judged_loop(rlaif_steps=40, max_staleness_steps=0, max_replicas=2, initial_replicas=2, min_replicas=2)
    run = simulate(loop_, Rates(block_s=0.001, step_s=0.001, latent_s=3.0))
    assert run.rounds == pytest.approx([32 * 3.0 / 2] * 4, rel=1e-6)
    assert run.bottleneck == "judges"
    assert run.share(model.REWARDS, "RLAIF") > 0.99
    assert model.bounds(loop_, Rates(1, 1, latent_s=3.0))["judges"] == 4 * 48


@pytest.mark.parametrize(("rho", "slots"), [(0.5, 2), (1.0, 4), (1.5, 3), (0.9, 12)])
def test_one_producer_and_one_trainer_with_random_times_are_a_cyclic_queue(rho, slots):
    """Two exponential stations with `slots` customers: X = mu (1 - pi_0), pi_n proportional to rho^n."""
    cyclic = Loop(producers=1, steps=60_000, mix_blocks=1, window_blocks=slots, steps_per_window=1)
    run = simulate(cyclic, Rates(block_s=1 / rho, step_s=1.0, block_cv=1, step_cv=1), seed=3)
    weights = [rho**n for n in range(slots + 1)]
    assert run.steps_per_s == pytest.approx(1 - weights[0] / sum(weights), rel=0.02)


def test_a_window_that_holds_fewer_blocks_than_there_are_producers_leaves_the_others_idle():
    narrow = loop(producers=16, window_blocks=4, steps=400)
    few = simulate(narrow, Rates(block_s=1.0, step_s=1e-6))
    assert few.producer_busy < 4 / 16 + 0.01
    assert few.most_held <= 4
    assert simulate(replace(narrow, window_blocks=64), Rates(block_s=1.0, step_s=1e-6)).seconds < few.seconds / 3


def test_work_that_shares_cores_takes_as_long_as_there_is_work():
    rates = Rates(block_s=1.0, step_s=0.5, cores=2, producer_threads=1, trainer_threads=2)
    run = simulate(loop(), rates)
    work = run.produced * 1.0 + 800 * 0.5 * 2
    # Blocks that were under way at the end count in part; the cores are never idle.
    assert work <= run.seconds * 2 + 1e-6
    assert run.seconds * 2 - work < 4 * 1.0
    alone = simulate(loop(), replace(rates, cores=None))
    assert alone.seconds == pytest.approx(0.5 + 800 * 0.5, rel=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_no_block_is_lost_or_trained_twice_and_all_time_is_accounted_for(seed):
    settings = judged_loop(checkpoint_every=52, max_replicas=3, min_replicas=0, initial_replicas=0, upscale_delay_s=2)
    rates = Rates(0.7, 0.2, 1.5, 0.5, 2.0, 0.05, 0.3, 0.4, 3.0, 4.0, 6.0, 0.5, 0.3, 0.9, cores=3 if seed % 2 else None)
    run = simulate(settings, rates, seed)
    assert run.steps == 880
    assert run.trained == 880 // 4 * 2
    assert run.produced == run.trained + run.held
    assert run.most_held <= settings.window_blocks
    assert sum(run.time.values()) == pytest.approx(run.seconds)
    assert sum(run.phases.values()) == pytest.approx(run.seconds)
    assert sum(run.blame.values()) == pytest.approx(1)
    least = model.bounds(settings, rates)
    assert run.seconds >= max(least.values()) * (0.8 if rates.block_cv else 1)


def test_the_same_seed_is_the_same_run_and_another_is_not():
    rates = Rates(0.7, 0.2, 1.5, block_cv=0.5, latent_cv=0.5)
    assert simulate(judged_loop(), rates, 1) == simulate(judged_loop(), rates, 1)
    assert simulate(judged_loop(), rates, 1).seconds != simulate(judged_loop(), rates, 2).seconds


def test_running_ahead_hides_the_judges_up_to_the_staleness_that_is_allowed():
    rates = Rates(block_s=0.01, step_s=1.0, latent_s=0.5)
    waits = [
        simulate(judged_loop(max_staleness_steps=ahead), rates).share(model.REWARDS, "RLAIF") for ahead in (0, 8, 20)
    ]
    # A round takes 16 s, 20 steps lie between two rounds.
    assert waits[0] == pytest.approx(16 / 36, abs=0.01)
    assert waits[1] == pytest.approx(8 / 28, abs=0.01)
    assert waits[2] == 0


def test_replicas_come_with_the_backlog_and_go_without_it():
    scaled = judged_loop(
        min_replicas=0, initial_replicas=0, max_replicas=4, target_latents=2, upscale_delay_s=1, downscale_delay_s=5,
        rounds=2, rlaif_steps=400, max_staleness_steps=200,
    )  # fmt: skip
    rates = Rates(block_s=0.01, step_s=1.0, latent_s=4.0, replica_start_s=10, calibration_s=5)
    run = simulate(scaled, rates)
    assert run.most_replicas == 4
    # Two rounds of 32 latents x 4 s on 4 replicas: up for some 32 s of work, the start and the delay, not for 1,200 s.
    judging = 2 * 32 * 4.0 + 5
    assert judging < run.replica_seconds < judging + 3 * 4 * (10 + 5 + 4)
    assert run.rounds[0] > 32.0 + 10  # the pool had gone to 0 and is waited for
    assert simulate(replace(scaled, open_latents=2), rates).most_replicas == 1  # nobody sees the backlog


def test_a_window_smaller_than_a_mix_is_a_loop_that_cannot_go_on():
    with pytest.raises(RuntimeError, match="waits for what nobody does"):
        simulate(loop(mix_blocks=8, window_blocks=4), Rates(1, 1))


def test_checkpoints_cost_their_snapshot_and_the_drained_pipeline():
    rates = Rates(block_s=0.001, step_s=1.0, save_s=3.0)
    run = simulate(loop(steps=400, checkpoint_every=100), rates)
    assert run.seconds == pytest.approx(400 + 4 * 3.0, abs=0.1)  # after 100, 200, 300, and the last one
    assert run.blame["checkpoints"] == pytest.approx(12 / run.seconds)


def write_run(folder, config, outcome, rows_every=4):
    """The files of a run that went as a simulated one did."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    clock, events = 1000.0 + outcome.phases["start"], []
    for name in ("reconstruction", "evidence", "calibration", "RLAIF"):
        began, clock = clock, clock + outcome.phases.get(name, 0.0)
        events.append({"time": clock, "event": "phase", "name": name, "seconds": outcome.phases.get(name, 0.0)})
        if name == "reconstruction":
            events.append({"time": began + outcome.calibrated_at, "event": "calibration"})
    at, step = clock - outcome.phases["RLAIF"], config["trainer"]["steps"]
    for seconds, (steps, after) in zip(outcome.rounds, outcome.segments, strict=True):
        events.append({"time": at, "event": "round_requested", "step": step})
        ahead = config["rlaif"]["max_staleness_steps"]
        events.append({"time": at + seconds, "event": "rewards_applied", "at_step": step + ahead})
        at, step = at + seconds + after, step + ahead + steps
    events.append({"time": at, "event": "commit", "step": step, "snapshot_seconds": 0.0})
    trained = outcome.share(model.TRAIN, "reconstruction") * outcome.phases["reconstruction"]
    steps = config["trainer"]["steps"]
    rows = [{"step": step, "step_seconds": trained / steps} for step in range(rows_every, steps + 1, rows_every)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rates_are_found_again_in_the_files_of_a_run_that_had_them(tmp_path):
    config = parse_config(
        {
            "name": "run", "hook": {"layer": 3}, "ray": {"local_cpus": 8},
            "corpus": {"context_length": 128}, "trainer": {"steps": 160, "batch_tokens": 1016},
            "rlaif": {"steps": 80, "rounds": 2, "latents": 16, "max_staleness_steps": 20},
        },
        "test",
    ).model_dump(mode="json")  # fmt: skip
    described = simulate_script.loop_of(config)
    assert (described.steps_per_window, described.mix_blocks, described.producers) == (8, 4, 2)
    true = Rates(
        1.2, 0.09, 2.5, 1.5, calibration_s=30, cores=2, producer_threads=1, trainer_threads=2, replica_threads=2
    )
    run = write_run(tmp_path / "run", config, simulate(described, true))
    found = simulate_script.measured(run)
    rates = simulate_script.fit(config, found, cores=2)
    for name in ("block_s", "step_s", "latent_s", "later_latent_s", "calibration_s"):
        assert getattr(rates, name) == pytest.approx(getattr(true, name), rel=0.05), name
    for name, real, said, _ in simulate_script.compare(simulate(described, rates), found, fitted=True):
        assert said == pytest.approx(real, rel=0.05), name


def test_an_interrupted_run_and_an_unknown_field_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 1}\n')
    (tmp_path / "events.jsonl").write_text('{"time": 1, "event": "resume"}\n')
    with pytest.raises(UserError, match="was interrupted"):
        simulate_script.measured(tmp_path)
    with pytest.raises(UserError, match="nothing-here: holds no finished run"):
        simulate_script.measured(tmp_path / "nothing-here")
    with pytest.raises(UserError, match="'producer' is unknown; known: producers"):
        simulate_script.changed(loop(), Rates(1, 1), ["producer=4"])
    assert simulate_script.changed(loop(), Rates(1, 1), ["producers=9", "step_s=.5"]) == (
        loop(producers=9),
        Rates(1, 0.5),
    )


def test_the_paper_exercise_counts_as_one_does_by_hand():
    plan, hardware = paper.Plan(), paper.Hardware()
    # Llama-3.1-70B: 80 layers of 855.6M parameters; 41 of them are run.
    assert paper.lm_flops(plan) == pytest.approx(41 * (2 * 855.6e6 + 2 * 1024 * 8192), rel=1e-3)
    assert paper.lm_bytes(plan) == pytest.approx(72.3e9, rel=0.01)
    assert paper.sae_params(plan) == 2 * 8192 * 2**20 + 2**20 + 8192
    parts = paper.step_parts(plan, hardware, 1, 8)
    assert parts["encoder GEMM"] == pytest.approx(2 * 8192 * 2**20 * 65472 / (8 * 989e12 * 0.5))
    assert parts["dp exchange"] == 0
    # Twice the ranks: half of what is sharded, none of what every rank does for itself.
    wider = paper.step_parts(plan, hardware, 1, 16)
    assert wider["optimiser"] == parts["optimiser"] / 2
    assert wider["host: window"] == parts["host: window"]
    least, best = paper.splits(plan, hardware)[0]
    assert best.producers + best.trainers + best.judges == 64
    modelled = simulate(*paper.model_of(paper.Plan(tokens=1e8), hardware, best))
    assert modelled.seconds > least / 20  # a twentieth of the tokens, and all the judging
