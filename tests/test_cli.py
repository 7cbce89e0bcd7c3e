"""What a person gets for bad input: one line on stderr that says what is wrong, exit code 2, no cluster."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from sae_ray import cli
from sae_ray.errors import UserError

MINIMAL: dict[str, Any] = {"name": "bad", "hook": {"layer": 2}, "rlaif": {"enabled": False}}


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys):
    """Runs `sae-ray train` in this process on MINIMAL with sections merged over it; returns (code, stderr)."""
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("a cluster was started"))

    def _run(*options: str, **sections: Any) -> tuple[int, str]:
        config = {**MINIMAL, "runs_dir": str(tmp_path / "runs"), **sections}
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["sae-ray", "train", str(path), *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return _run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bad_inputs() -> list[Any]:
    return [
        pytest.param({"model": {"name": "./no/such/model"}}, ["model.name", "./no/such/model"], id="model path"),
        pytest.param({"hook": {"layer": 30}}, ["hook.layer", "30 layers"], id="hook layer"),
        pytest.param({"sae": {"d_sae": 4609}}, ["sae.d_sae 4609", "trainer.tp 2"], id="d_sae and tp"),
        pytest.param({"sae": {"width": 1}}, ["sae.width", "unknown key"], id="unknown key"),
        pytest.param(
            {"corpus": {"kind": "text", "paths": ["no/such/*.txt"]}},
            ["corpus.paths", "no/such/*.txt"],
            id="corpus path",
        ),
        pytest.param(
            {"ray": {"address": f"127.0.0.1:{free_port()}"}}, ["ray.address", "cannot be reached"], id="ray address"
        ),
        pytest.param(
            {"ray": {"address": f"ray://127.0.0.1:{free_port()}"}},
            ["ray.address", "cannot be reached"],
            id="ray client",
        ),
        pytest.param({"runs_dir": str(Path(__file__) / "runs")}, ["run folder", "not writable"], id="run folder"),
    ]


@pytest.mark.parametrize(("sections", "said"), bad_inputs())
def test_bad_input_is_one_clear_line_and_exit_code_2(run_cli, sections, said):
    code, err = run_cli(**sections)
    assert code == 2
    assert err.startswith("sae-ray: ")
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for part in said:
        assert part in err


def test_a_corpus_without_tokens_is_refused(run_cli, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    code, err = run_cli(corpus={"kind": "text", "paths": [str(tmp_path / "empty.txt")]})
    assert code == 2
    assert "empty.txt" in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_name_that_means_other_numbers_is_refused_and_names_the_key(run_cli, tmp_path):
    folder = tmp_path / "runs" / "bad"
    folder.mkdir(parents=True)
    from sae_ray.config_file import parse_config

    earlier = parse_config({**MINIMAL, "sae": {"k": 16}}, "test")
    (folder / "config.yaml").write_text(earlier.to_yaml())
    code, err = run_cli(sae={"k": 17})
    assert code == 2
    assert "sae.k was 16, is 17" in err
    assert "--fresh" in err


def test_fresh_does_not_remove_a_folder_that_is_no_run(run_cli, tmp_path):
    folder = tmp_path / "runs" / "bad"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    code, err = run_cli("--fresh")
    assert code == 2
    assert "does not look like a run folder" in err
    assert (folder / "thesis.tex").exists()


def test_a_first_fresh_run_may_keep_its_checkpoints_in_its_folder(run_cli, tmp_path):
    folder = tmp_path / "runs" / "bad"
    nowhere = {"address": f"127.0.0.1:{free_port()}"}
    for _ in range(2):  # also after one that was refused further on
        code, err = run_cli("--fresh", trainer={"checkpoint_dir": str(folder / "ckpt" / "here")}, ray=nowhere)
        assert code == 2
        assert "cannot be reached" in err


def test_fresh_refuses_a_linked_run_folder_before_anything_is_removed(run_cli, tmp_path):
    real, folder = tmp_path / "large-disk", tmp_path / "runs" / "bad"
    manifest = real / "checkpoints" / "step-4" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"config": {"name": "bad"}}))
    (real / "config.yaml").write_text("")
    folder.parent.mkdir()
    folder.symlink_to(real)
    code, err = run_cli("--fresh")
    assert code == 2
    assert err.startswith(f"sae-ray: --fresh: {folder} is a link to {real}; not removed")
    assert manifest.exists()


def test_a_config_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    from sae_ray import run
    from sae_ray.config_file import parse_config

    config = parse_config({**MINIMAL, "runs_dir": str(tmp_path)}, "test")
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("the earlier one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(run, "RunLog", lambda *_: pytest.fail("the run began"))
    with pytest.raises(UserError, match=r"config\.yaml: cannot be written: No space left"):
        run.run_training(config)
    assert (config.run_dir / "config.yaml").read_text() == "the earlier one"


def test_a_replay_of_a_run_by_itself_is_refused_before_fresh_removes_it(run_cli, tmp_path):
    from sae_ray.config_file import parse_config

    folder = tmp_path / "runs" / "bad"
    folder.mkdir(parents=True)
    rlaif = {"enabled": True}
    (folder / "config.yaml").write_text(parse_config({**MINIMAL, "rlaif": rlaif}, "test").to_yaml())
    code, err = run_cli("--fresh", "--replay-rewards", str(folder), rlaif=rlaif)
    assert code == 2
    assert "is this run's own folder" in err
    assert (folder / "config.yaml").exists()


def test_a_replay_of_what_is_no_run_or_another_one_is_one_line(run_cli, tmp_path):
    from sae_ray.config_file import parse_config

    code, err = run_cli("--replay-rewards", str(tmp_path / "nowhere"), rlaif={"enabled": True})
    assert code == 2
    assert f"rlaif.replay_rewards = {tmp_path / 'nowhere'}: holds no run" in err
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.yaml").write_text(parse_config({**MINIMAL, "seed": 4, "rlaif": {}}, "test").to_yaml())
    code, err = run_cli("--replay-rewards", str(first), rlaif={"enabled": True})
    assert code == 2
    assert "its rewards are of another run (seed was 4, is 0)" in err
    assert len(err.strip().splitlines()) == 1, err


def test_check_validates_without_a_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("a cluster was started"))
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "runs_dir": str(tmp_path / "runs")}))
    monkeypatch.setattr(sys, "argv", ["sae-ray", "train", str(path), "--check"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "fine" in capsys.readouterr().out


@pytest.mark.parametrize("job", sorted(Path(__file__).parents[1].glob("jobs/*.yaml")), ids=lambda path: path.name)
def test_every_job_in_the_repository_is_a_valid_config(job):
    from sae_ray.config_file import load_config

    assert load_config(job).name


@pytest.mark.parametrize("name", ["node8", "nodes4", "finetune_gemma_scope"])
def test_jobs_of_many_gpus_judge_where_something_is_to_be_learned_and_watch_for_hacks(name):
    from sae_ray.config_file import load_config

    config = load_config(Path(__file__).parents[1] / "jobs" / f"{name}.yaml")
    rlaif = config.rlaif
    assert (rlaif.choose, rlaif.reexplain_cosine, rlaif.keep_rounds) == ("value", 0.9, 1)
    assert rlaif.alarms.duplicates
    assert rlaif.alarms.asks_held_out == ("heldout" in config.judges)
