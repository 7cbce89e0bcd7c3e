"""Several SAEs on one pass of the language model: each trains as it would alone, whatever trains beside it.

The numbers are compared on ranks without a cluster, on blocks of the real language model; one run through the
command line shows that every SAE is trained, committed, evaluated, exported and reported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import TINY, train, write_config

from sae_ray.activations.block import Block
from sae_ray.activations.producer import ActivationProducer
from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.errors import UserError
from sae_ray.evaluation.evaluator import find_variants
from sae_ray.sae.formats import import_sae
from sae_ray.telemetry import read_jsonl
from sae_ray.trainer import checkpoint
from sae_ray.trainer.rank import TrainerRank

pytestmark = pytest.mark.timeout(300)

WIDTH, WINDOWS = 576, 6
VARIANTS: list[dict[str, Any]] = [
    {"name": "early", "hook": {"layer": 1}, "sae": {"d_sae": 384, "k": 4}, "trainer": {"lr": 1e-3}},
    {"name": "mlp", "hook": {"site": "mlp_out"}, "sae": {"architecture": "topk", "k": 16}},
    {
        "name": "across",
        "hook": {"site": "mlp_in"},
        "hook_out": {"layer": 2, "site": "mlp_out"},
        "sae": {"d_sae": 320, "k": 16},
        "trainer": {"lr": 5e-3},
    },
]


def run_config(saes: list[dict[str, Any]], **sections: Any) -> RunConfig:
    tree = {**TINY, "trainer": {**TINY["trainer"], "tp": 1}, "saes": saes}
    for key, value in sections.items():
        tree[key] = {**tree.get(key, {}), **value}
    return RunConfig.model_validate(tree)


def blocks_of(config: RunConfig) -> list[dict[str, Any]]:
    producer = ActivationProducer(config.model_dump_json())
    return [producer.produce("train", block_id)[1] for block_id in range(2 * WINDOWS)]


@pytest.fixture(scope="module")
def blocks() -> list[dict[str, Any]]:
    """The first windows of the sweep: all hook points side by side."""
    return blocks_of(run_config(VARIANTS))


def rank_of(config: RunConfig) -> TrainerRank:
    rank = TrainerRank(config.model_dump_json(), {hook.name: WIDTH for hook in config.hooks})
    rank.join("127.0.0.1", 0, 0, 1, 0)
    return rank


def metrics(rank: TrainerRank, blocks: list[dict[str, Any]], windows: range) -> list[dict[str, float]]:
    rows = [row for w in windows for row in rank.train_window(w, 0, blocks[2 * w : 2 * w + 2]).metrics]
    return [{k: v for k, v in row.items() if not k.endswith("step_seconds")} for row in rows]


def trained(config: RunConfig, blocks: list[dict[str, Any]]) -> list[dict[str, float]]:
    rank = rank_of(config)
    rank.build(blocks[:2])
    return metrics(rank, blocks, range(WINDOWS))


def of_main(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if "/" not in key} for row in rows]


def of_variant(rows: list[dict[str, float]], name: str) -> list[dict[str, float]]:
    return [{k.removeprefix(f"{name}/"): v for k, v in row.items() if k.startswith(f"{name}/")} for row in rows]


@pytest.fixture(scope="module")
def sweep(blocks) -> list[dict[str, float]]:
    rows = trained(run_config(VARIANTS), blocks)
    assert len(rows) >= 3 * WINDOWS
    return rows


def test_variants_change_no_bit_of_the_main_sae(sweep):
    alone = run_config([])
    assert trained(alone, blocks_of(alone)) == of_main(sweep)


@pytest.mark.parametrize("variant", VARIANTS, ids=[variant["name"] for variant in VARIANTS])
def test_a_variant_trains_as_the_run_that_has_it_as_main(variant, blocks, sweep):
    own = {key: value for key, value in variant.items() if key != "name"}
    own.setdefault("hook_out", None)
    hook_out = own.pop("hook_out")
    config = run_config([], **own)
    if hook_out is not None:
        config = RunConfig.model_validate(config.model_dump() | {"hook_out": hook_out})
    alone = [{k: v for k, v in row.items() if k != "step"} for row in trained(config, blocks)]
    assert alone == of_variant(sweep, variant["name"])


def test_a_transcoder_learns_its_target(sweep):
    fvu = [row["across/fvu"] for row in sweep]
    assert np.mean(fvu[-6:]) < 0.7 * min(1, np.mean(fvu[:3]))  # 1: as good as the mean


def test_a_resumed_sweep_gives_the_same_losses_of_every_sae(blocks, sweep, tmp_path):
    config = run_config(VARIANTS)
    first = rank_of(config)
    first.build(blocks[:2])
    half = WINDOWS // 2
    begun = metrics(first, blocks, range(half))
    path = commit(config, first, tmp_path, half)

    second = rank_of(config)
    second.load(str(path))
    assert begun + metrics(second, blocks, range(half, WINDOWS)) == sweep

    tensors, about = checkpoint.load_full(path, which="early")
    assert tensors["W_enc"].shape == (384, WIDTH)
    assert (about["d_sae"], about["hook"], about["hook_out"]) == (384, "blocks.1.hook_resid_post", None)
    other = run_config([VARIANTS[0], {**VARIANTS[1], "sae": {"d_sae": 128, "k": 4}}, VARIANTS[2]])
    with pytest.raises(UserError, match=r"d_sae of mlp is 256, this run's is 128"):
        rank_of(other).load(str(path))
    with pytest.raises(UserError, match=r"holds the SAEs across, early, main, mlp, this run trains early, main"):
        rank_of(run_config(VARIANTS[:1])).load(str(path))


def commit(config: RunConfig, rank: TrainerRank, folder: Path, window: int) -> Path:
    """A checkpoint of a group of one."""
    path = folder / f"step-{window}"
    checkpoint.begin(path)
    report = rank.save(str(path))
    written = rank.written(60)
    assert written is not None
    about = {"step": window, "cursor": [window, 0], "pin": None, "extra": {}}
    checkpoint.commit(path, checkpoint.manifest_of(config, WIDTH, [{**report, **written}], about))
    return path


def test_a_number_that_is_not_finite_names_block_and_hook_point_and_trains_no_sae(blocks):
    rank = rank_of(run_config(VARIANTS))
    rank.build(blocks[:2])
    before = {name: trainer.W_enc_mD.clone() for name, trainer in rank.copies.items()}
    bad = dict(blocks[3], acts=blocks[3]["acts"].copy())
    first, _ = Block.from_numpy_dict(bad).columns["blocks.2.hook_mlp_out"]
    bad["acts"][5, first + 7] = np.nan
    with pytest.raises(UserError, match=r"block 3: 1 of \d+ tokens have activations at blocks\.2\.hook_mlp_out"):
        rank.train_window(1, 0, [blocks[2], bad])
    for name, trainer in rank.copies.items():
        assert trainer.steps_done == 0
        assert torch.equal(trainer.W_enc_mD, before[name])


def test_a_sweep_commits_evaluates_exports_and_reports_every_sae(tmp_path):
    one = {"activations": {"producers": 1}, "evaluation": {"blocks": 1}}
    config = write_config(tmp_path, name="sweep", trainer={"steps": 16}, saes=VARIANTS, **one)
    printed = train(config)
    folder = tmp_path / "runs" / "sweep"
    rows = read_jsonl(folder / "metrics.jsonl")
    names = ["early", "mlp", "across"]
    assert [row["step"] for row in rows] == list(range(1, 17))
    core = json.loads((folder / "evaluation.json").read_text())["core"]
    assert list(core) == ["before", *names]
    for name in names:
        assert all(row[f"{name}/loss"] > 0 for row in rows)
        assert name in printed
        assert 0 < core[name]["fvu"] < 1.5
        assert core[name]["ce_clean"] == core["before"]["ce_clean"] < core[name]["ce_mean_ablation"] + 1
    assert core["across"]["hook_out"] == core["mlp"]["hook"] == "blocks.2.hook_mlp_out"
    assert core["across"]["ce_mean_ablation"] == core["mlp"]["ce_mean_ablation"] != core["early"]["ce_mean_ablation"]
    # Two shards each, of different sizes, joined to what was exported.
    found = find_variants(load_config(config))
    assert {name: sae.d_sae for name, sae in found.items()} == {"early": 384, "mlp": 256, "across": 320}
    x_TD = torch.randn(9, WIDTH)
    for name, sae in found.items():
        exported = import_sae(folder / f"saelens-{name}")
        torch.testing.assert_close(exported.reconstruct(x_TD), sae.reconstruct(x_TD), rtol=1e-4, atol=1e-4)
    page = (folder / "report.html").read_text()
    assert "FVU of every SAE" in page
    assert "blocks.2.mlp.hook_in → blocks.2.hook_mlp_out" in page
