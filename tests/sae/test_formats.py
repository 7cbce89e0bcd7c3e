"""SAELens folders, read by a small reader of that format and by our own importer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_ray.errors import UserError
from sae_ray.sae.formats import export_saelens, import_saelens
from sae_ray.sae.inference import TrainedSAE


class SAELensReader:
    """What SAELens v6 computes from a folder: acts = relu(pre) * (pre > threshold), or the k largest."""

    def __init__(self, folder: Path):
        self.cfg = json.loads((folder / "cfg.json").read_text())
        self.w = load_file(folder / "sae_weights.safetensors")
        assert self.w["W_enc"].shape == (self.cfg["d_in"], self.cfg["d_sae"])

    def encode(self, raw):
        pre = (raw - self.w["b_dec"]) @ self.w["W_enc"] + self.w["b_enc"]
        if self.cfg["architecture"] == "jumprelu":
            return pre.relu() * (pre > self.w["threshold"])
        top = pre.topk(self.cfg["k"], dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def decode(self, f):
        return f @ self.w["W_dec"] + self.w["b_dec"]


def trained(architecture: str) -> TrainedSAE:
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(40, 12, generator=generator), dim=1)
    b_enc, b_dec = torch.randn(40, generator=generator) / 9, torch.randn(12, generator=generator)
    return TrainedSAE(W, W.clone(), b_enc, b_dec, torch.tensor(0.7), architecture, 5, input_scale=0.31)


def raw_activations() -> torch.Tensor:
    return 8 * torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def export(sae: TrainedSAE, folder: Path) -> Path:
    return export_saelens(sae, folder, model="m", hook="blocks.3.hook_resid_post", context_length=128)


@pytest.mark.parametrize("architecture", ["batchtopk", "topk"])
def test_a_saelens_reader_computes_our_activations_and_reconstruction(architecture, tmp_path):
    sae, raw = trained(architecture), raw_activations()
    reader = SAELensReader(export(sae, tmp_path))
    ours = sae.encode(raw)
    assert 0 < ours.count_nonzero() < ours.numel()
    assert torch.equal(ours > 0, reader.encode(raw) > 0)
    torch.testing.assert_close(reader.encode(raw), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reader.decode(ours), sae.decode(ours), rtol=1e-5, atol=1e-5)
    assert reader.cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"


@pytest.mark.parametrize("architecture", ["batchtopk", "topk"])
def test_an_export_reads_back_as_the_same_sae_and_exports_the_same_bytes(architecture, tmp_path):
    sae, raw = trained(architecture), raw_activations()
    again = import_saelens(export(sae, tmp_path / "a"))
    assert (again.architecture, again.k, again.input_scale) == (architecture, 5, 1.0)
    torch.testing.assert_close(again.encode(raw), sae.encode(raw), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.reconstruct(raw), sae.reconstruct(raw), rtol=1e-5, atol=1e-5)
    export(again, tmp_path / "b")
    name = "sae_weights.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_pre_activation_equal_to_the_threshold_stays_active_after_export(tmp_path):
    sae = TrainedSAE(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2), torch.tensor(0.7), "batchtopk", 1)
    at_threshold = torch.tensor([[0.7, 0.69]])
    assert sae.encode(at_threshold).count_nonzero() == 1
    assert SAELensReader(export(sae, tmp_path)).encode(at_threshold).count_nonzero() == 1


def test_foreign_sae_variants_keep_their_numbers(tmp_path):
    sae, raw = trained("topk"), raw_activations()
    folder = export(sae, tmp_path)
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    w["W_dec"] = w["W_dec"] * torch.linspace(0.5, 3, 40)[:, None]
    cfg |= {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    save_file(w, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))

    norm = w["W_dec"].norm(dim=1)
    top = ((raw @ w["W_enc"] + w["b_enc"]) * norm).topk(5, dim=-1)
    f = torch.zeros(64, 40).scatter(-1, top.indices, top.values.relu())
    found = import_saelens(folder)
    torch.testing.assert_close(found.encode(raw), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.decode(f), (f / norm) @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "architecture is 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
    ],
)
def test_an_sae_that_would_give_other_numbers_is_refused(change, message, tmp_path):
    folder = export(trained("batchtopk"), tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(UserError, match=message):
        import_saelens(folder)


def test_missing_tensors_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cfg\.json"):
        import_saelens(tmp_path / "nothing")
    folder = export(trained("batchtopk"), tmp_path)
    w = load_file(folder / "sae_weights.safetensors")
    save_file({"W_enc": w["W_enc"]}, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="has no W_dec, b_enc, b_dec, threshold"):
        import_saelens(folder)
