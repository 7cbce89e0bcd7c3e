"""`sae-ray export` and `sae-ray import` on a run folder with real checkpoints, and starting from an imported SAE."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_saes import D, M, raw_activations, small_sae

from sae_ray import cli
from sae_ray.config import RunConfig, SAEConfig
from sae_ray.config_file import parse_config
from sae_ray.errors import UserError
from sae_ray.preflight import check_export, check_init_from
from sae_ray.run import export
from sae_ray.sae.formats import FORMATS, Provenance, export_sae, import_sae, read_sae
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer import checkpoint

HOOK = "blocks.2.hook_resid_post"


def commit(config: RunConfig, step: int, saes: dict[str, TrainedSAE]) -> None:
    """A checkpoint of these SAEs, in two shards."""
    path = checkpoint.step_dir(checkpoint.home(config), step)
    checkpoint.begin(path)
    reports = []
    for rank, (low, high) in enumerate([(0, 24), (24, M)]):
        files, copies, latents = {}, {}, {}
        for name, sae in saes.items():
            state = {"W_enc": sae.W_enc_MD, "W_dec": sae.W_dec_MD, "b_enc": sae.b_enc_M, "b_dec": sae.b_dec_D}
            state |= {"threshold": sae.threshold}
            rows = {key: value[low:high] if checkpoint.is_sharded(key) else value for key, value in state.items()}
            files |= checkpoint.write_shard(path, rank, name, rows)
            scales = {"input_scale": sae.input_scale, "output_scale": sae.output_scale, "input_norm": sae.input_norm}
            copies[name] = scales | {"architecture": sae.architecture, "k": sae.k, "subtract_b_dec": True}
            latents[name] = (low, high)
        reports.append({"files": files, "copies": copies, "latents": latents, "tp_rank": rank})
    about = {"step": step, "cursor": [0, 0], "pin": None, "extra": {}}
    checkpoint.commit(path, checkpoint.manifest_of(config, D, reports, about))


@pytest.fixture
def run(tmp_path) -> tuple[Path, dict[int, TrainedSAE]]:
    """A run folder with steps 10 and 20, and a topk beside main."""
    tree = {"name": "loop", "hook": {"layer": 2}, "runs_dir": str(tmp_path), "rlaif": {"enabled": False}}
    tree |= {"sae": {"d_sae": M, "k": 5}, "evaluation": {"latents": 0}}
    tree["saes"] = [{"name": "late", "hook": {"layer": 5}, "sae": {"architecture": "topk"}}]
    config = parse_config(tree, "test")
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    saes = {10: small_sae(), 20: small_sae(input_scale=0.5)}
    for step, sae in saes.items():
        commit(config, step, {"main": sae, "late": small_sae("topk")})
    return config.run_dir, saes


@pytest.fixture
def sae_ray(monkeypatch, capsys):
    """Runs the command line in this process; returns (code, stdout, stderr)."""

    def _run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sae-ray", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return _run


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "gemma_scope"])
def test_a_run_is_exported_and_read_back(format, run, sae_ray, tmp_path):
    folder, saes = run
    code, out, err = sae_ray("export", folder, tmp_path / "out", "--format", format)
    assert (code, err) == (0, "")
    assert f"batchtopk, d_in 12, d_sae 40, k 5, input scale 0.5 ({HOOK} of smollm2" in out
    assert "at step 20" in out
    found = read_sae(tmp_path / "out")
    torch.testing.assert_close(found.sae.encode(raw_activations()), saes[20].encode(raw_activations()))
    assert (found.provenance.hook, found.provenance.context_length) == (HOOK, 128)


def test_an_earlier_step_and_another_sae_of_the_run(run, sae_ray, tmp_path):
    folder, saes = run
    assert sae_ray("export", folder, tmp_path / "early", "--step", 10)[0] == 0
    torch.testing.assert_close(import_sae(tmp_path / "early").W_enc_MD, saes[10].W_enc_MD)
    assert import_sae(tmp_path / "early").input_scale == saes[10].input_scale
    assert sae_ray("export", folder, tmp_path / "late", "--sae", "late", "--format", "sparsify")[0] == 0
    found = read_sae(tmp_path / "late")
    assert (found.sae.architecture, found.provenance.hook) == ("topk", "blocks.5.hook_resid_post")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--step", 15], "has no committed checkpoint of step 15, only of 10, 20"),
        (["--sae", "early"], "has no 'early' copy, only late, main"),
        (["--format", "sparsify"], "sparsify cannot express a batchtopk (it knows topk only)"),
        (["--format", "onnx"], "format 'onnx' is unknown; known: saelens, sparsify"),
    ],
)
def test_an_export_that_cannot_be_is_one_line_and_exit_code_2(options, said, run, sae_ray, tmp_path):
    code, _, err = sae_ray("export", run[0], tmp_path / "out", *options)
    assert code == 2
    assert err.startswith("sae-ray: ")
    assert len(err.strip().splitlines()) == 1
    assert said in err
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_and_what_is_no_sae_is_said(run, sae_ray, tmp_path):
    code, _, err = sae_ray("export", tmp_path / "nothing", tmp_path / "out")
    assert code == 2
    assert "holds no run" in err
    code, _, err = sae_ray("import", tmp_path / "nothing", tmp_path / "out")
    assert code == 2
    assert "nothing: does not exist" in err


def test_import_converts_and_says_what_it_found(sae_ray, tmp_path):
    sae, where = small_sae("topk"), Provenance("gpt2", "blocks.7.hook_resid_pre", 64)
    export_sae(sae, tmp_path / "a", "sparsify", where)
    code, out, err = sae_ray("import", tmp_path / "a", tmp_path / "b", "--to", "dictionary_learning")
    assert (code, err) == (0, "")
    assert "sparsify, topk, d_in 12, d_sae 40, k 5, input scale 0.31 (blocks.7.hook_resid_pre of gpt2)" in out
    found = read_sae(tmp_path / "b")
    assert found.provenance == where
    torch.testing.assert_close(
        found.sae.reconstruct(raw_activations()), sae.reconstruct(raw_activations()), rtol=1e-5, atol=1e-5
    )
    assert sae_ray("import", tmp_path / "a", tmp_path / "c", "--format", "saelens")[0] == 2


def started(tmp_path: Path, sae: dict, **more) -> RunConfig:
    tree = {"name": "tuned", "hook": {"layer": 2}, "runs_dir": str(tmp_path / "runs"), "rlaif": {"enabled": False}}
    return parse_config({**tree, "evaluation": {"latents": 0}, "sae": sae, **more}, "test")


def test_a_run_that_starts_from_an_sae_is_checked_before_any_cluster(tmp_path):
    path = export_sae(small_sae(), tmp_path / "there", "saelens", Provenance())
    sae = {"d_sae": M, "k": 5, "init_from": str(path)}
    with pytest.raises(UserError, match=r"^sae\.init_from .*there: reads .* width 12, the hook point's is 576"):
        check_init_from(started(tmp_path, sae))
    with pytest.raises(UserError, match=r"^sae\.init_from .*there: is a batchtopk, .* write sae.architecture: batch"):
        check_init_from(started(tmp_path, {**sae, "architecture": "topk"}))
    with pytest.raises(UserError, match=r"^sae\.init_from: .*elsewhere: does not exist"):
        check_init_from(started(tmp_path, {**sae, "init_from": str(tmp_path / "elsewhere")}))
    variant = [{"name": "wide", "sae": {"d_sae": 80, "init_from": str(path)}}]
    with pytest.raises(UserError, match=r"^saes wide: sae\.init_from .*write sae.d_sae: 40"):
        check_init_from(started(tmp_path, {"d_sae": 80}, saes=variant))


def test_a_run_that_has_a_checkpoint_needs_no_start(tmp_path):
    config = started(tmp_path, {"d_sae": M, "k": 5, "init_from": str(tmp_path / "gone")})
    commit(config, 10, {"main": small_sae()})
    check_init_from(config)


@pytest.fixture
def tuned(tmp_path, monkeypatch) -> tuple[RunConfig, TrainedSAE]:
    """A run at step 20 that started from a sparsify SAE without any scale, and what it has become."""
    monkeypatch.chdir(tmp_path)
    original = small_sae("topk", input_scale=1.0)
    export_sae(original, tmp_path / "theirs", "sparsify", Provenance("a-model", HOOK, 64))
    (tmp_path / "theirs" / "sae_ray.json").unlink()
    sae = {"architecture": "topk", "d_sae": M, "k": 5, "init_from": "theirs"}
    late = {"name": "late", "sae": {"init_from": None, "export": "dictionary_learning"}}
    config = started(tmp_path, sae, saes=[late])
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    now = small_sae("topk", input_scale=0.31)
    commit(config, 20, {"main": now, "late": small_sae("topk")})
    return config, now


def test_a_run_ends_with_each_sae_in_the_format_that_it_came_from_or_that_is_named(tuned):
    config, now = tuned
    said: list[str] = []
    export(config, said.append)
    assert said == []
    assert {path.name for path in config.run_dir.iterdir()} >= {"sparsify", "dictionary_learning-late"}
    assert not (config.run_dir / "saelens").exists()
    found = read_sae(config.run_dir / "sparsify")
    assert found.sae.input_scale == 1.0  # as theirs
    torch.testing.assert_close(
        found.sae.reconstruct(raw_activations()), now.reconstruct(raw_activations()), rtol=1e-4, atol=1e-4
    )
    assert (found.provenance.init_from, found.provenance.hook) == ("theirs", HOOK)
    assert read_sae(config.run_dir / "dictionary_learning-late").provenance.init_from == ""


def test_an_export_into_the_same_format_can_be_asked_for_later(tuned, sae_ray, tmp_path):
    config, _ = tuned
    code, out, err = sae_ray("export", config.run_dir, tmp_path / "out", "--format", "same")
    assert (code, err) == (0, "")
    assert "sparsify, topk" in out
    assert (tmp_path / "out" / "sae.safetensors").exists()


def test_without_what_it_started_from_an_sae_is_not_lost(tuned, sae_ray, tmp_path):
    config, now = tuned
    shutil.rmtree(tmp_path / "theirs")
    said: list[str] = []
    export(config, said.append)
    assert len(said) == 1
    assert said[0].startswith("main is not exported: sae.init_from: theirs: does not exist")
    assert "name a format: saelens, sparsify" in said[0]
    code, _, _ = sae_ray("export", config.run_dir, tmp_path / "out", "--format", "sparsify")
    assert code == 0
    torch.testing.assert_close(import_sae(tmp_path / "out").W_enc_MD, now.W_enc_MD)


def test_nothing_is_exported_where_nothing_is_asked_for(run):
    folder, _ = run
    config = parse_config(yaml.safe_load((folder / "config.yaml").read_text()), "test", ["sae.export=null"])
    export(config, print)
    assert not [path.name for path in folder.iterdir() if path.is_dir() and path.name != "checkpoints"]


def test_a_format_that_cannot_express_the_sae_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"^sae\.export sparsify: the format cannot express a batchtopk"):
        check_export(started(tmp_path, {"export": "sparsify"}))
    late = [{"name": "late", "sae": {"architecture": "topk"}}]
    with pytest.raises(UserError, match=r"^saes late: sae\.export gemma_scope: the format cannot express a topk"):
        check_export(started(tmp_path, {"export": "gemma_scope"}, saes=late))
    check_export(started(tmp_path, {"export": None}))
    check_export(started(tmp_path, {"architecture": "topk", "export": "sparsify"}))


def test_every_format_may_be_named_in_a_config():
    allowed = SAEConfig.model_json_schema()["properties"]["export"]["anyOf"][0]["enum"]
    assert set(allowed) == {"same", *FORMATS}
