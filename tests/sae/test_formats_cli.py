"""`sae-ray export` and `sae-ray import` on a run folder with real checkpoints, and starting from an imported SAE."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_saes import D, M, raw_activations, small_sae

from sae_ray import cli
from sae_ray.config import RunConfig
from sae_ray.config_file import parse_config
from sae_ray.errors import UserError
from sae_ray.preflight import check_init_from
from sae_ray.sae.formats import Provenance, export_sae, import_sae, read_sae
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
