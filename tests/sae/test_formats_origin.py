"""An SAE goes from a library's file through a trainer and back: its numbers if nothing moved, its units if it did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_saes import OUT, D, K, M, raw_activations, small_sae

from sae_ray.config import SAEConfig, TrainerConfig
from sae_ray.sae.architectures import REGISTRY
from sae_ray.sae.formats import FORMATS, Provenance, check_fits, export_sae, import_sae
from sae_ray.sae.formats.origin import in_units_of
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.sharded_sae import ShardedTrainer

CASES = [
    (format, architecture, transcoder)
    for format, known in FORMATS.items()
    for architecture in REGISTRY
    for transcoder in (False, True)
    if known.refusal(small_sae(architecture, d_out=OUT if transcoder else None), transcoder) is None
]


def where(sae: TrainedSAE) -> Provenance:
    return Provenance("m", "blocks.3.hook_resid_post", 128, "c", "blocks.3.hook_mlp_out" if sae.is_transcoder else None)


def without_notes(folder: Path) -> Path:
    """An export as if another library had written it."""
    (folder / "sae_ray.json").unlink(missing_ok=True)
    for name in ("cfg.json", "config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            config.get("metadata", config).pop("sae_ray", None)
            (folder / name).write_text(json.dumps(config))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the one file of weights in a folder, read without any of our code."""
    for name in ("sae_weights.safetensors", "sae.safetensors"):
        if (folder / name).exists():
            return load_file(folder / name)
    if (folder / "ae.pt").exists():
        return torch.load(folder / "ae.pt", weights_only=True)
    return {name: torch.from_numpy(array) for name, array in np.load(folder / "params.npz").items()}


def started(path: Path, **changes) -> ShardedTrainer:
    """A trainer that starts from the SAE at `path`, as a run's rank does."""
    found = import_sae(path)
    coef = {"sparsity_coef": 1e-3} if found.architecture in ("relu_l1", "gated") else {}
    kind = {"architecture": found.architecture, "d_sae": M, "k": K, "init_from": str(path)}
    cfg = SAEConfig(**{**kind, **coef, **changes})
    d_out = OUT if found.d_out != found.d_in else None
    trainer = ShardedTrainer(cfg, TrainerConfig(tp=1), D, 0, Collectives(Mesh.alone()), d_out)
    target = None if d_out is None else 3 * raw_activations()[:, :OUT] + 1
    trainer.load_weights(check_fits(found, cfg, D, d_out), raw_activations(), target)
    return trainer


def trained(trainer: ShardedTrainer) -> TrainedSAE:
    return TrainedSAE.from_checkpoint({key: value.clone() for key, value in trainer.state().items()}, trainer.meta())


def back(trainer: ShardedTrainer, path: Path, format: str, out: Path) -> Path:
    unit = trainer.sae.decoder_norm == "unit"
    tuned = in_units_of(trained(trainer), import_sae(path), unit)
    return export_sae(tuned, out, format, where(tuned))


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(("format", "architecture", "transcoder"), CASES)
def test_what_was_not_trained_is_exported_as_it_was_read(format, architecture, transcoder, foreign, tmp_path):
    sae = small_sae(architecture, d_out=OUT if transcoder else None)
    path = export_sae(sae, tmp_path / "there", format, where(sae))
    if foreign:
        without_notes(path)
    trainer = started(path)
    assert trainer.input_scale != pytest.approx(import_sae(path).input_scale, rel=0.01)  # it went through other units
    before, after = stored(path), stored(back(trainer, path, format, tmp_path / "back"))
    assert set(before) == set(after)
    for name, value in before.items():
        torch.testing.assert_close(
            after[name].float(), value.float(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("format", ["saelens", "gemma_scope", "dictionary_learning"])
def test_latents_with_decoder_rows_of_any_length_get_them_back(format, tmp_path):
    sae = small_sae("jumprelu", input_scale=1.0)
    sae = replace(sae, W_dec_MD=sae.W_dec_MD * torch.linspace(0.5, 3, M)[:, None])
    path = without_notes(export_sae(sae, tmp_path / "there", format, where(sae)))
    trainer = started(path)
    torch.testing.assert_close(trainer.W_dec_mD.norm(dim=1), torch.ones(M))
    before, after = stored(path), stored(back(trainer, path, format, tmp_path / "back"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_a_free_decoder_keeps_its_activations_and_its_rows(architecture, tmp_path):
    sae = small_sae(architecture, input_scale=1.0)
    sae = replace(sae, W_dec_MD=sae.W_dec_MD * torch.linspace(0.5, 3, M)[:, None])
    path = without_notes(export_sae(sae, tmp_path / "there", "saelens", where(sae)))
    trainer = started(path, decoder_norm="free")
    trainer.W_dec_mD.mul_(1.5)
    before, after = stored(path), stored(back(trainer, path, "saelens", tmp_path / "back"))
    torch.testing.assert_close(after["W_dec"], 1.5 * before["W_dec"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(after["W_enc"], before["W_enc"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("format", "architecture", "transcoder"), CASES)
def test_what_was_trained_is_the_same_function_in_the_units_of_what_was_read(
    format, architecture, transcoder, tmp_path
):
    raw = raw_activations()
    sae = small_sae(architecture, d_out=OUT if transcoder else None)
    path = without_notes(export_sae(sae, tmp_path / "there", format, where(sae)))
    original, trainer = import_sae(path), started(path)
    generator = torch.Generator().manual_seed(1)
    trainer.W_enc_mD.add_(0.1 * torch.randn(M, D, generator=generator) * trainer.W_enc_mD.norm(dim=1, keepdim=True))
    trainer.W_dec_mD.add_(0.3 * torch.randn(trainer.W_dec_mD.shape, generator=generator))
    trainer.W_dec_mD.div_(trainer.W_dec_mD.norm(dim=1, keepdim=True))
    ours, again = trained(trainer), import_sae(back(trainer, path, format, tmp_path / "back"))
    assert torch.equal(again.encode(raw) > 0, ours.encode(raw) > 0)
    torch.testing.assert_close(again.reconstruct(raw), ours.reconstruct(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.W_dec_MD.norm(dim=1), original.W_dec_MD.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again.W_enc_MD, original.W_enc_MD, rtol=0.01)
