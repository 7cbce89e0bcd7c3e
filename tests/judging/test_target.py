"""What is judged, and with which model, hook and corpus, from what the user and the SAE say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_ray.config import HookConfig
from sae_ray.errors import UserError
from sae_ray.judging.target import digest_of, find_target, hook_of, latents_of
from sae_ray.sae.formats import export_sae
from sae_ray.sae.formats.notes import Provenance
from sae_ray.sae.inference import TrainedSAE

MODEL = "smollm2-135m-instruct"


def sae(scale: float = 1.0) -> TrainedSAE:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(8, 576, generator=generator), dim=1)
    return TrainedSAE(rows * scale, rows, torch.zeros(8), torch.zeros(576), torch.tensor(0.5), "batchtopk", 2)


def exported(folder: Path, provenance: Provenance) -> Path:
    return export_sae(sae(), folder / "layer9", "saelens", provenance)


def test_an_sae_that_names_its_model_and_hook_needs_nothing_else(tmp_path):
    path = exported(tmp_path, Provenance(MODEL, "blocks.9.hook_resid_post", 64))
    found = find_target(path, None, [])
    assert (found.config.model.name, found.config.hook.name) == (MODEL, "blocks.9.hook_resid_post")
    assert (found.config.corpus.context_length, found.config.name) == (64, "judge-layer9")
    assert found.sae.d_sae == 8


def test_what_an_sae_does_not_say_is_asked_for_by_key(tmp_path):
    path = exported(tmp_path, Provenance())
    with pytest.raises(
        UserError, match=r"layer9: does not say its model.name and hook.layer; add --set model.name=... --set"
    ):
        find_target(path, None, [])
    with pytest.raises(UserError, match=r"does not say its hook.layer;"):
        find_target(path, None, [f"model.name={MODEL}"])
    found = find_target(path, None, [f"model.name={MODEL}", "hook.layer=4", "hook.site=mlp_out"], name="mine")
    assert (found.config.hook, found.config.name) == (HookConfig(layer=4, site="mlp_out"), "mine")


def test_a_hook_in_unknown_words_is_repeated_to_the_user(tmp_path):
    path = exported(tmp_path, Provenance(MODEL, "transformer.ln_f"))
    with pytest.raises(UserError, match=r"hook\.layer \(it says hook 'transformer\.ln_f'\)"):
        find_target(path, None, [])


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("blocks.9.hook_resid_post", HookConfig(layer=9)),
        ("blocks.0.mlp.hook_in", HookConfig(layer=0, site="mlp_in")),
        ("layers.12", HookConfig(layer=12)),
        ("gpt_neox.layers.3", HookConfig(layer=3)),
        ("blocks.2.attn.hook_z", None),
        ("", None),
    ],
)
def test_hook_names_of_other_libraries_are_read(name, hook):
    assert hook_of(name) == hook


@pytest.mark.parametrize(
    ("corpus", "kind", "where"),
    [
        ("s3://b/*.jsonl", "jsonl", ["s3://b/*.jsonl"]),
        ("texts/*.parquet", "parquet", ["texts/*.parquet"]),
        ("a book.txt", "text", ["a book.txt"]),
    ],
)
def test_a_corpus_is_told_by_its_name(tmp_path, corpus, kind, where):
    path = exported(tmp_path, Provenance(MODEL, "blocks.9.hook_resid_post"))
    found = find_target(path, None, [], corpus).config.corpus
    assert (found.kind, found.paths) == (kind, where)


def test_a_dataset_is_told_from_a_file_that_cannot_be_read(tmp_path):
    path = exported(tmp_path, Provenance(MODEL, "blocks.9.hook_resid_post"))
    assert find_target(path, None, [], "monology/pile").config.corpus.dataset == "monology/pile"
    with pytest.raises(UserError, match=r"--corpus notes.docx: expected a .txt, .jsonl or .parquet"):
        find_target(path, None, [], "notes.docx")


def test_latents_are_chosen_by_numbers_and_ranges():
    assert latents_of(None, 4) == [0, 1, 2, 3]
    assert latents_of("0:3", 10) == [0, 1, 2]
    assert latents_of("7, 2:4,3", 10) == [2, 3, 7]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0:11", "0:11 is not within 0:10"),
        ("5:5", "5:5 is not within"),
        ("a:b", "'a:b' is neither a number nor first:end"),
    ],
)
def test_latents_that_are_not_there_are_refused(text, said):
    with pytest.raises(UserError, match=f"--latents {text}: .*{said}"):
        latents_of(text, 10)


def test_another_sae_has_another_digest():
    assert digest_of(sae()) == digest_of(sae())
    assert digest_of(sae()) != digest_of(sae(1.0001))


def test_a_path_that_is_neither_a_run_nor_an_sae_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such run folder or SAE"):
        find_target(tmp_path / "nowhere", None, [])


def test_a_name_that_leaves_the_runs_folder_is_refused(tmp_path):
    path = exported(tmp_path, Provenance(MODEL, "blocks.9.hook_resid_post", 64))
    with pytest.raises(UserError, match=r"--name: name = '\.\./out': a run name is"):
        find_target(path, None, [], name="../out")
