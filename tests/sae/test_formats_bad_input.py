"""Files that are not what they should be: one line that names the file and the tensor or key."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_saes import M, small_sae

from sae_ray.errors import UserError
from sae_ray.sae.formats import FORMATS, Provenance, export_sae, import_sae

CONFIG = {"saelens": "cfg.json", "sparsify": "cfg.json", "dictionary_learning": "config.json"}


@pytest.fixture
def folder(tmp_path):
    """Makes a good export to spoil."""

    def _export(format: str, architecture: str = "topk", **options: Any) -> Path:
        return export_sae(small_sae(architecture, **options), tmp_path / format, format, Provenance())

    return _export


def change_config(folder: Path, format: str, change: dict) -> None:
    path = folder / CONFIG[format]
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def change_tensors(file: Path, change: dict) -> None:
    tensors = {name: tensor for name, tensor in (load_file(file) | change).items() if tensor is not None}
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("format", "architecture", "change", "said"),
    [
        ("saelens", "topk", {"architecture": "temporal"}, r"cfg.json: architecture is 'temporal'; .*reads standard"),
        ("saelens", "topk", {"architecture": ["topk"]}, "architecture is"),
        ("saelens", "topk", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ("saelens", "topk", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ("saelens", "topk", {"k": 0}, f"k is 0, expected a whole number from 1 to {M}"),
        ("saelens", "topk", {"k": M + 1}, f"k is {M + 1}, expected"),
        ("saelens", "topk", {"d_sae": 41}, r"W_enc has shape \[12, 40\], but d_sae says \[12, 41\]"),
        ("saelens", "topk", {"d_in": "wide"}, "d_in is 'wide', expected a whole number"),
        ("saelens", "topk", {"metadata": {"sae_ray": {"k": 3}}}, "'sae_ray' notes cannot be read: KeyError"),
        ("sparsify", "topk", {"activation": "groupmax"}, "activation is 'groupmax'; this version reads topk"),
        ("sparsify", "topk", {"k": "gone"}, "k is None, expected"),
        ("sparsify", "topk", {"d_in": 13}, r"encoder.weight has shape \[40, 12\], but d_in says \[40, 13\]"),
        ("dictionary_learning", "topk", {"trainer": {"dict_class": "IdentityDict"}}, "'IdentityDict'.*AutoEncoder,"),
        ("dictionary_learning", "topk", {"trainer": "gone"}, "has no trainer section"),
        ("dictionary_learning", "topk", {"trainer": {"dict_class": "AutoEncoder"}}, "ae.pt: has no bias; found b_dec"),
    ],
)
def test_a_config_that_says_something_else_is_refused(format, architecture, change, said, folder):
    home = folder(format, architecture)
    change_config(home, format, change)
    with pytest.raises(UserError, match=said) as refused:
        import_sae(home)
    assert str(home) in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"W_dec": None, "b_enc": None}, "has no W_dec, b_enc; found W_enc, b_dec, threshold"),
        ({"W_dec": torch.zeros(M, 13)}, r"W_dec has shape \[40, 13\], but d_in says \[40, 12\]"),
        ({"W_dec": torch.zeros(12, M)}, r"W_dec has shape \[12, 40\], but d_sae says \[40, 12\]"),
        ({"b_enc": torch.zeros(M, 1)}, r"b_enc has shape \[40, 1\], expected 1 axes"),
        ({"b_dec": torch.full((12,), torch.nan)}, "b_dec holds 12 values that are NaN or infinite"),
        ({"W_enc": torch.full((12, M), torch.inf)}, "W_enc holds 480 values that are NaN or infinite"),
        ({"W_skip": torch.zeros(12, 12)}, "holds W_skip, which would be ignored"),
        ({"scaling_factor": torch.full((M,), 2.0)}, "scaling_factor is not 1"),
    ],
)
def test_tensors_that_cannot_be_right_are_named(change, said, folder):
    home = folder("saelens", "jumprelu")
    change_tensors(home / "sae_weights.safetensors", change)
    with pytest.raises(UserError, match=r"sae_weights\.safetensors: " + said):
        import_sae(home)


@pytest.mark.parametrize("format", ["sparsify", "saelens"])
def test_a_skip_connection_is_refused_unless_it_is_zero(format, folder):
    home = folder(format, "topk") if format == "sparsify" else folder(format, "relu_l1", d_out=12)
    file = home / ("sae.safetensors" if format == "sparsify" else "sae_weights.safetensors")
    if format == "saelens":
        change_config(home, format, {"architecture": "skip_transcoder"})
    change_tensors(file, {"W_skip": torch.zeros(12, 12)})
    assert import_sae(home).d_sae == M
    change_tensors(file, {"W_skip": torch.eye(12)})
    with pytest.raises(UserError, match="W_skip is not 0"):
        import_sae(home)


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("saelens", "cfg.json"),
        ("saelens", "sae_weights.safetensors"),
        ("sparsify", "sae.safetensors"),
        ("dictionary_learning", "ae.pt"),
        ("dictionary_learning", "config.json"),
        ("gemma_scope", "params.npz"),
    ],
)
@pytest.mark.parametrize("spoil", ["garbage", "half", "gone"])
def test_a_file_that_is_gone_or_torn_is_named(format, file, spoil, folder):
    home = folder(format, "jumprelu" if format == "gemma_scope" else "topk")
    data = (home / file).read_bytes()
    if spoil == "gone":
        (home / file).unlink()
    else:
        (home / file).write_bytes(b"not what you think" if spoil == "garbage" else data[: len(data) // 2])
    with pytest.raises(UserError, match=file.replace(".", r"\.")) as refused:
        import_sae(home, format)
    assert len(str(refused.value).splitlines()) == 1


class Payload:
    ran = False

    @classmethod
    def run(cls) -> Payload:
        cls.ran = True
        return cls()

    def __reduce__(self):
        return Payload.run, ()


@pytest.mark.parametrize("how", ["torch", "pickle", "numpy"])
def test_nothing_is_unpickled(how, folder):
    home = folder("gemma_scope", "jumprelu") if how == "numpy" else folder("dictionary_learning")
    if how == "torch":
        torch.save({"encoder.weight": Payload()}, home / "ae.pt")
    elif how == "pickle":
        (home / "ae.pt").write_bytes(pickle.dumps(Payload()))
    else:
        np.savez(home / "params.npz", W_enc=np.array([Payload()], dtype=object))
    with pytest.raises(UserError, match=r"ae\.pt|params\.npz"):
        import_sae(home)
    assert not Payload.ran


@pytest.mark.parametrize("name", ["input_scale", "output_scale", "activation_factor"])
@pytest.mark.parametrize("value", [0, -1.5, float("nan")])
def test_a_scale_that_is_none_is_refused(name, value, folder):
    home = folder("sparsify")
    notes = json.loads((home / "sae_ray.json").read_text())
    (home / "sae_ray.json").write_text(json.dumps({"sae_ray": {**notes["sae_ray"], name: value}}))
    with pytest.raises(UserError, match=rf"sae_ray\.json: sae_ray\.{name} is .*; a scale is positive"):
        import_sae(home)


def test_a_folder_without_an_sae_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"holds no sae_weights\.safetensors \(saelens\), sae\.safetensors"):
        import_sae(tmp_path)
    with pytest.raises(UserError, match=r"nothing-there: does not exist"):
        import_sae(tmp_path / "nothing-there")
    with pytest.raises(UserError, match="'onnx' is unknown"):
        import_sae(tmp_path, "onnx")


def test_a_folder_with_two_formats_asks_which(folder, tmp_path):
    home = folder("saelens")
    (home / "ae.pt").write_bytes((folder("dictionary_learning") / "ae.pt").read_bytes())
    with pytest.raises(UserError, match="formats saelens and dictionary_learning; name the one to read"):
        import_sae(home)
    assert import_sae(home, "saelens").d_sae == M


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/out.*cannot be written"):
        export_sae(small_sae("topk"), tmp_path / "file" / "out", "saelens", Provenance())


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "gemma_scope"])
def test_an_sae_in_the_hugging_face_cache_is_read_through_its_links(format, tmp_path):
    made = export_sae(
        small_sae("topk" if format == "sparsify" else "jumprelu"), tmp_path / "made", format, Provenance()
    )
    snapshot, blobs = tmp_path / "models--x--sae" / "snapshots" / "c0ffee", tmp_path / "models--x--sae" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(made.iterdir()):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    weights = FORMATS[format].weights
    for path in (snapshot, snapshot / weights):
        assert import_sae(path).d_sae == M
    (snapshot / weights).resolve().unlink()
    with pytest.raises(UserError, match=f"{weights}"):  # what the user knows, not a hash
        import_sae(snapshot, format)
