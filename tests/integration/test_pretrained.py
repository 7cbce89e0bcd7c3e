"""RLAIF on an SAE that someone else trained: from SAELens's files, through one round with real judges, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
import torch
from runs import losses, tiny_sae, train, write_config
from safetensors.torch import load_file

from sae_ray.activations.block import Block
from sae_ray.activations.producer import ActivationProducer
from sae_ray.config_file import load_config
from sae_ray.sae.formats import Provenance, export_sae, import_sae, read_sae
from sae_ray.sae.inference import TrainedSAE
from sae_ray.telemetry import read_jsonl
from sae_ray.trainer import checkpoint

pytestmark = pytest.mark.timeout(900)
D_SAE, HOOK = 256, "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def tuned(judge_app, tmp_path_factory) -> tuple[Path, Path, str]:
    """(the SAE that was brought along, the run folder, what the run printed)"""
    folder = tmp_path_factory.mktemp("pretrained")
    theirs = export_sae(tiny_sae(D_SAE), folder / "theirs", "saelens", Provenance("smollm2-135m-instruct", HOOK, 64))
    config = write_config(
        folder,
        name="tuned",
        ray={"address": ray.get_runtime_context().gcs_address},
        judge={"app": judge_app.name, "calibration": {"concepts": 8}},
        sae={"d_sae": D_SAE, "init_from": str(theirs)},
        trainer={"steps": 0},
        rlaif={
            "enabled": True, "steps": 8, "rounds": 1, "max_staleness_steps": 2, "latents": 4, "evidence_blocks": 24,
            "positives": 4, "near_misses": 2, "siblings": 2, "randoms": 2, "explainer_examples": 3, "candidates": 1,
            "max_context_share": 0.9, "control": True,
        },
    )  # fmt: skip
    return theirs, folder / "runs" / "tuned", train(config, timeout=600)


def test_rlaif_begins_with_the_sae_that_was_brought_along(tuned):
    theirs, run, printed = tuned
    assert "reconstruction: " not in printed  # the phase
    assert sorted(losses(run.parent.parent, "tuned")) == list(range(1, 9))
    applied = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "rewards_applied"]
    assert [event["judged_at_step"] for event in applied] == [0]
    assert applied[0]["verdicts"] > 0
    core = json.loads((run / "evaluation.json").read_text())["core"]
    assert set(core) == {"before", "rlaif", "control"}

    config = load_config(run / "config.yaml")
    _, stored = ActivationProducer(config.model_dump_json()).produce("heldout", 0)
    raw_TD = Block.from_numpy_dict(stored).acts_TD(torch.float32)
    begun = TrainedSAE.from_checkpoint(*checkpoint.load_full(run / "checkpoints" / "step-0"))
    scale = float(raw_TD.norm(dim=1).mean())
    assert torch.allclose(begun.reconstruct(raw_TD), import_sae(theirs).reconstruct(raw_TD), atol=1e-4 * scale)


def test_what_comes_out_is_in_the_format_and_the_units_of_what_went_in(tuned):
    theirs, run, _ = tuned
    before, after = (load_file(folder / "sae_weights.safetensors") for folder in (theirs, run / "saelens"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    torch.testing.assert_close(after["W_dec"].norm(dim=1), before["W_dec"].norm(dim=1), rtol=1e-4, atol=0)
    assert not torch.equal(after["W_enc"], before["W_enc"])
    torch.testing.assert_close(after["threshold"], before["threshold"], rtol=0.3, atol=0)

    found = read_sae(run / "saelens")
    assert (found.sae.architecture, found.sae.k) == ("batchtopk", 8)
    assert (found.provenance.hook, found.provenance.init_from) == (HOOK, str(theirs))
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    trained = TrainedSAE.from_checkpoint(*checkpoint.load_full(path, "main"))
    config = load_config(run / "config.yaml")
    _, stored = ActivationProducer(config.model_dump_json()).produce("heldout", 1)
    raw_TD = Block.from_numpy_dict(stored).acts_TD(torch.float32)
    scale = float(raw_TD.norm(dim=1).mean())
    assert torch.allclose(found.sae.reconstruct(raw_TD), trained.reconstruct(raw_TD), atol=1e-4 * scale)


def test_a_second_start_goes_on_with_nothing(tuned):
    _, run, _ = tuned
    assert "is complete" in train(run.parent.parent / "tuned.yaml", timeout=120)
