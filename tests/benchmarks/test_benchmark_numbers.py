"""What the benchmarks compute from what they measured: medians, ratios, verdicts and tables. No peer is needed."""

from __future__ import annotations

import math

import pytest
import torch
from benchmark_scripts import load
from safetensors.torch import save_file

from sae_ray.errors import UserError

batches = load("batches")
trainer = load("trainer")
synthetic = load("synthetic")
peer_envs = load("peer_envs")


def row(*seconds: float, peak: float = 500.0, imports: float = 300.0) -> dict:
    return {"seconds": list(seconds), "peak_mib": peak, "imports_mib": imports, "note": ""}


def rows(**changes) -> dict:
    out = {
        trainer.BASELINE: row(1.0, 9.0, 1.1),
        trainer.WITH_AUX: row(1.2),
        trainer.IN_BF16: row(0.5),
        "sparsify": row(2.2, 2.2, 2.2),
        "saelens": row(4.4, peak=700.0),
        trainer.FLOOR: row(0.55),
    }
    return {**out, **changes}


def test_a_slow_step_among_the_timed_ones_does_not_move_the_figures():
    size = trainer.summary(rows(), batch=4400)
    assert size[trainer.BASELINE]["s_per_step"] == 1.1
    assert size[trainer.BASELINE]["tokens_per_s"] == pytest.approx(4000)
    assert size["sparsify"]["times_ours"] == pytest.approx(2.0)
    assert size["sparsify"]["times_floor"] == pytest.approx(4.0)


def test_memory_is_counted_above_what_the_imports_take():
    size = trainer.summary(rows(), batch=10)
    assert size["saelens"]["step_mib"] == 400
    assert size["saelens"]["peak_mib"] == 700


def test_targets_are_met_or_missed_by_the_bound_they_name():
    met = {label: (value, ok) for label, value, _, ok in trainer.targets(trainer.summary(rows(), batch=10))}
    assert met["sparsify / ours, fp32"] == (pytest.approx(2.0), True)
    assert met["saelens / ours, fp32"] == (pytest.approx(4.0), False)
    assert met["sparsify fp32 / ours bf16"] == (pytest.approx(4.4), True)
    assert met["AuxK and metrics / without"] == (pytest.approx(1.2 / 1.1), True)
    assert met["memory / leanest peer's"] == (pytest.approx(1.0), True)
    hungry = rows(**{trainer.BASELINE: row(1.1, peak=501.0)})
    assert trainer.targets(trainer.summary(hungry, batch=10))[-1][3] is False


def test_a_contender_that_was_left_out_leaves_out_its_targets():
    alone = trainer.summary({trainer.BASELINE: row(1.0)}, batch=10)
    assert trainer.targets(alone) == []
    assert math.isnan(alone[trainer.BASELINE]["times_floor"])


def test_a_markdown_table_has_a_cell_for_every_header():
    size = trainer.summary(rows(), batch=10)
    text = trainer.markdown(trainer.HEADERS, [trainer.cells(name, entry) for name, entry in size.items()])
    counts = {line.count("|") for line in text.splitlines()}
    assert counts == {len(trainer.HEADERS) + 1}
    assert len(text.splitlines()) == 2 + len(size)


def test_stored_activations_are_shuffled_once_and_kept_whole(tmp_path):
    tokens = torch.arange(22, dtype=torch.float32)[:, None].expand(22, 3)
    save_file({"x": tokens[:12].contiguous(), "ids": torch.arange(12)}, tmp_path / "a.safetensors")
    save_file({"x": tokens[12:].to(torch.bfloat16).contiguous()}, tmp_path / "b.safetensors")
    x_NBD = batches.stored_batches(tmp_path, 5)
    assert x_NBD.shape == (4, 5, 3)
    assert x_NBD.dtype == torch.float32
    assert len(x_NBD[..., 0].unique()) == 20
    assert torch.equal(x_NBD, batches.stored_batches(tmp_path, 5))


def test_a_store_gives_the_training_blocks_of_its_first_hook_point(tmp_path):
    acts = torch.arange(40, dtype=torch.float32).view(8, 5).to(torch.bfloat16)
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
        chunk = {"acts": acts.view(torch.uint16).contiguous(), "tokens_SL": torch.zeros(9, 9, dtype=torch.int32)}
        save_file(chunk, tmp_path / split / "00000000.safetensors")
    (tmp_path / "index.json").write_text('{"columns": {"layer 3": [2, 4], "layer 5": [0, 2]}}')
    x_NBD = batches.stored_batches(tmp_path, 4)
    assert x_NBD.shape == (2, 4, 2)
    assert sorted(x_NBD[..., 0].flatten().tolist()) == acts[:, 2].tolist()


def test_a_folder_without_activations_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"--activations .*no safetensors"):
        batches.stored_batches(tmp_path, 5)


def test_generated_activations_do_not_depend_on_who_drew_random_numbers_before():
    first = batches.sparse_mixture(2, 6, 8, features=20, active=3)
    torch.rand(5)
    assert torch.equal(first, batches.sparse_mixture(2, 6, 8, features=20, active=3))
    assert torch.equal(batches.dense_batches(1, 6, 8), batches.dense_batches(1, 6, 8))


def test_the_synthetic_table_names_the_worst_margin_and_whether_it_is_a_miss():
    task = synthetic.TASKS[0]
    good = {**dict.fromkeys(synthetic.METRICS, 0.0), **task.reference, "EV": task.reference["EV"] - 0.009}
    poor = {**good, "F1": task.reference["F1"] - 0.02}
    _, text = synthetic.table_of({f"ours: {task.name}": good, f"saelens: {task.name}": poor}, steps=1, seeds=1)
    lines = text.splitlines()
    assert lines[3].endswith("EV -0.009 |")
    assert lines[4].endswith("F1 -0.020  below |")


def test_the_mean_over_seeds_is_of_each_metric():
    assert synthetic.summarise([{"EV": 0.2, "F1": 1.0}, {"EV": 0.4, "F1": 0.0}]) == pytest.approx(
        {"EV": 0.3, "F1": 0.5}
    )


def test_a_missing_environment_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"peer_envs\.py sparsify --dir"):
        peer_envs.python_of("sparsify", tmp_path)
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / ".ready").write_text("torch==1.0\n")  # made for other versions
    with pytest.raises(UserError, match="no environment"):
        peer_envs.python_of("sparsify", tmp_path)
