"""What SECURITY.md says is refused: secrets in configs, code and bombs in files, text that steers a terminal."""

from __future__ import annotations

import io
import json
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from small_saes import small_sae

import sae_ray
from sae_ray import cli
from sae_ray.config_file import load_config, parse_config
from sae_ray.doctor import Finding, print_findings
from sae_ray.errors import UserError, printable
from sae_ray.preflight import warn_of_code
from sae_ray.sae.formats import Provenance, export_sae, import_sae
from sae_ray.telemetry import Progress, RunStatus

MINIMAL = {"name": "a", "hook": {"layer": 3}}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"activations": {"store": "s3://AKIA:hunter2@bucket/acts"}}, "activations.store"),
        ({"trainer": {"checkpoint_dir": "s3://AKIA:hunter2@bucket"}}, "trainer.checkpoint_dir"),
        ({"judge": {"s3_mirror": "s3://AKIA:hunter2@bucket/model"}}, "judge.s3_mirror"),
        ({"judges": {"heldout": {"s3_mirror": "s3://AKIA:hunter2@bucket/model"}}}, "heldout.s3_mirror"),
        ({"judge": {"engine_kwargs": {"hf_token": "hunter2"}}}, "judge.engine_kwargs.hf_token"),
        # Secret keys of AWS hold slashes; a token may stand where the name does.
        ({"trainer": {"checkpoint_dir": "s3://AKIA:ab/hunter2@bucket/x"}}, "trainer.checkpoint_dir"),
        ({"trainer": {"checkpoint_dir": "s3://hunter2@bucket/x"}}, "trainer.checkpoint_dir"),
        ({"corpus": {"kind": "text", "paths": ["a.txt", "https://me:hunter2@host/b.txt"]}}, "corpus.paths[1]"),
        ({"judge": {"engine_kwargs": {"x": {"url": "http://me:hunter2@host"}}}}, "judge.engine_kwargs.x.url"),
        ({"saes": [{"name": "b", "sae": {"init_from": "s3://AKIA:ab/hunter2@b/sae"}}]}, "saes[0].sae.init_from"),
        # Refused for something else, and shown.
        ({"runs_dir": "s3://AKIA:ab/hunter2@bucket/x"}, "runs_dir = "),
        ({"trainer": {"checkpoint_dir": "gs://hunter2@bucket"}}, "trainer.checkpoint_dir = "),
        ({"judge": {"lora": {"x": "https://me:hunter2@host/x"}}}, "judge.lora.x"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(section, said):
    with pytest.raises(UserError) as refused:
        parse_config({**MINIMAL, **section}, "run.yaml")
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_the_resolved_config_holds_the_name_of_a_key_and_never_the_key(monkeypatch):
    for name in ("JUDGE_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    run = parse_config({**MINIMAL, "judge": {"endpoint": "https://h/v1", "api_key_env": "JUDGE_KEY"}}, "run.yaml")
    for written in (run.to_yaml(), run.model_dump_json()):
        assert "JUDGE_KEY" in written
        assert "hunter2" not in written


def test_code_of_others_runs_only_where_it_is_asked_for_and_then_it_is_said(capsys):
    warn_of_code(parse_config(dict(MINIMAL), "run.yaml"))
    assert capsys.readouterr().err == ""
    trusting = {"model": {"name": "x/subject", "trust_remote_code": True}}
    trusting["judges"] = {"heldout": {"model": "x/judge", "trust_remote_code": True}}
    warn_of_code(parse_config({**MINIMAL, **trusting}, "run.yaml"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "model.trust_remote_code: code of x/subject will run" in lines[0]
    assert "judges.heldout.trust_remote_code: code of x/judge" in lines[1]


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!int x",
        "seed: !!bool x",
        "seed: !!timestamp x",
        "seed: !!int ''",
        "seed: 2024-99-99",
        "seed: !!python/object/apply:os.system ['true']",
        "seed: " + "[" * 3000,
        "seed: 0x" + "f" * 5000,
        "? [a]\n: 1",
        "\x00",
    ],
)
def test_a_config_that_yaml_stumbles_over_is_one_line(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"name: a\nhook: {{layer: 3}}\n{text}\n")
    with pytest.raises(UserError, match=r"run\.yaml: ") as refused:
        load_config(path)
    assert len(str(refused.value)) < 2000


def test_a_config_of_a_few_lines_cannot_become_an_endless_message(tmp_path):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nhook: {layer: 3}\n" + "\n".join(lines) + "\nseed: *l11\n")
    began = time.monotonic()
    with pytest.raises(UserError, match="seed = ") as refused:
        load_config(path)
    assert time.monotonic() - began < 5
    assert len(str(refused.value)) < 20_000


def test_what_others_wrote_does_not_steer_a_terminal(tmp_path, monkeypatch, capsys):
    hostile = "\x1b]0;owned\x07[/bold]\u202e\ud800"
    shown = printable(hostile)
    assert shown.isprintable()
    assert "owned" in shown
    export_sae(small_sae("topk"), tmp_path / "sae", "saelens", Provenance(model="ok"))
    config = tmp_path / "sae" / "cfg.json"
    config.write_text(config.read_text().replace('"ok"', json.dumps(hostile)))
    monkeypatch.setattr(sys, "argv", ["sae-ray", "import", str(tmp_path / "sae"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().out
    assert not stop.value.code
    assert "[/bold]" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    monkeypatch.setattr(sys, "argv", ["sae-ray", "import", str(tmp_path / "no\x1b[2Jthing"), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\x1b" not in capsys.readouterr().err


def test_a_line_of_progress_does_not_steer_a_terminal_either(capsys):
    Progress("run", RunStatus()).say("a judge says \x1b[2J")
    assert "\\x1b[2J" in capsys.readouterr().out


def test_findings_and_the_last_words_of_a_command_do_not_either(monkeypatch, capsys):
    hostile = "[/tmp] [abc] \x1b[2J"
    console = Console(file=io.StringIO(), width=200)
    assert not print_findings([Finding(hostile, "failure", hostile)], console)
    told = console.file.getvalue()
    assert told.count("[/tmp] [abc] \\x1b[2J") == 2
    assert "\x1b" not in told
    monkeypatch.setattr("sae_ray.preflight.preflight", lambda run: None)
    monkeypatch.setattr("sae_ray.preflight.check_checkpoint", lambda run: None)
    monkeypatch.setattr(cli, "load_config", lambda path, sets: parse_config({**MINIMAL, "runs_dir": hostile}, "x"))
    monkeypatch.setattr(sys, "argv", ["sae-ray", "train", "[/x].yaml", "--check"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "[/x].yaml: fine; a would train in [/tmp] [abc] \\x1b[2J/a" in capsys.readouterr().out


def test_a_zip_that_is_meant_to_fill_the_memory_is_refused_unread(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 24,)})
    with (
        zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("W_enc.npy", "w") as entry,
    ):  # 64 MiB of zeros
        entry.write(header.getvalue())
        for _ in range(64):
            entry.write(bytes(1 << 20))
    assert (tmp_path / "params.npz").stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"params\.npz: \d+ bytes that unpack to 671"):
        import_sae(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(1).expand(1 << 20, 1 << 20), "holds fewer numbers"),
        (torch.eye(4).to_sparse(), "is no plain tensor"),
        (torch.zeros(4, dtype=torch.complex64), "is no plain tensor"),
        (torch.zeros(4, device="meta"), "is no plain tensor|is not a PyTorch file"),
    ],
    ids=["expanded", "sparse", "complex", "meta"],
)
def test_a_tensor_that_is_not_what_it_looks_like_is_refused(tensor, said, tmp_path):
    home = export_sae(small_sae("topk"), tmp_path / "sae", "dictionary_learning", Provenance())
    tensors = torch.load(home / "ae.pt", weights_only=True)
    torch.save({**tensors, "encoder.weight": tensor}, home / "ae.pt")
    with pytest.raises(UserError, match=said):
        import_sae(home)


def test_every_file_and_every_test_that_security_md_names_is_there():
    tests, code = Path(__file__).parent, Path(sae_ray.__file__).parent
    text = (tests.parent / "SECURITY.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::(test_\w+)(\.\.\.)?)?`", text)
    assert len(named) > 60
    for path, test, cut in named:
        file = tests / path if "test_" in path else next(iter(sorted(code.rglob(Path(path).name))), tests.parent / path)
        assert file.is_file(), path
        if test:
            known = re.findall(r"def (test_\w+)", file.read_text())
            assert any(each.startswith(test) if cut else each == test for each in known), f"{path}::{test}"
