"""SAEs in other libraries' files: read by small readers of those formats, and by our own importers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_saes import OUT, K, M, raw_activations, small_sae

from sae_ray.errors import UserError
from sae_ray.sae.architectures import REGISTRY
from sae_ray.sae.formats import FORMATS, Provenance, detect, export_sae, export_saelens, import_sae, read_sae
from sae_ray.sae.inference import TrainedSAE

WHERE = Provenance("a-model", "blocks.3.hook_resid_post", 128, "a-corpus")
OUT_WHERE = replace(WHERE, hook_out="blocks.3.hook_mlp_out")
JUMPING = ("batchtopk", "matryoshka", "jumprelu")
# What each format can express: (architecture, transcoder).
EXPRESSES = {
    "saelens": [(name, False) for name in REGISTRY] + [(name, True) for name in (*JUMPING, "relu_l1")],
    "sparsify": [("topk", False)],
    "dictionary_learning": [(name, False) for name in REGISTRY],
    "gemma_scope": [(name, transcoder) for name in (*JUMPING, "relu_l1") for transcoder in (False, True)],
}
EVERY = [(format, *case) for format, cases in EXPRESSES.items() for case in cases]


def export(sae: TrainedSAE, folder: Path, format: str = "saelens") -> Path:
    return export_sae(sae, folder, format, OUT_WHERE if sae.is_transcoder else WHERE)


# ---------------------------------------------------------------- readers that know a format and nothing of ours


def top(pre, k):
    best = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())


def gate(c, W_enc, b_gate, r_mag, b_mag):
    return ((c @ W_enc + b_gate) > 0) * (c @ (W_enc * r_mag.exp()) + b_mag).relu()


def read_by_saelens(folder, raw):
    """(activations, reconstruction) of an SAELens v6 folder."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert w["W_enc"].shape == (cfg["d_in"], cfg["d_sae"])
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    kind = cfg["architecture"]
    assert "transcoder" not in kind or not cfg["apply_b_dec_to_input"]
    c = raw - w["b_dec"] if cfg["apply_b_dec_to_input"] else raw
    if kind == "gated":
        f = gate(c, w["W_enc"], w["b_gate"], w["r_mag"], w["b_mag"])
    else:
        pre = c @ w["W_enc"] + w["b_enc"]
        jump = "jumprelu" in kind
        f = top(pre, cfg["k"]) if kind == "topk" else pre.relu() * (pre > w["threshold"]) if jump else pre.relu()
    return f, f @ w["W_dec"] + w["b_dec"]


def read_by_sparsify(folder, raw):
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    c = raw if cfg["transcode"] else raw - w["b_dec"]
    f = top((c @ w["encoder.weight"].T + w["encoder.bias"]).relu(), cfg["k"])
    return f, f @ w["W_dec"] + w["b_dec"]


def read_by_dictionary_learning(folder, raw):
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    w = torch.load(folder / "ae.pt", weights_only=True)
    kind = trainer["dict_class"]
    if kind == "AutoEncoder":
        f = ((raw - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        return f, f @ w["decoder.weight"].T + w["bias"]
    if kind == "GatedAutoEncoder":
        f = gate(raw - w["decoder_bias"], w["encoder.weight"].T, w["gate_bias"], w["r_mag"], w["mag_bias"])
        return f, f @ w["decoder.weight"].T + w["decoder_bias"]
    if kind == "JumpReluAutoEncoder":
        pre = raw @ w["W_enc"] + w["b_enc"]
        f = pre.relu() * (pre > w["threshold"])
        return f, f @ w["W_dec"] + w["b_dec"]
    assert (w["k"].dtype, int(w["k"])) == (torch.int32, trainer["k"])
    plain = kind == "MatryoshkaBatchTopKSAE"
    assert not plain or int(w["group_sizes"].sum()) == len(w["W_dec"])
    W_enc = w["W_enc"] if plain else w["encoder.weight"].T
    W_dec = w["W_dec"] if plain else w["decoder.weight"].T
    pre = ((raw - w["b_dec"]) @ W_enc + w["b_enc" if plain else "encoder.bias"]).relu()
    f = top(pre, int(w["k"])) if kind == "AutoEncoderTopK" else pre * (pre > w["threshold"])
    return f, f @ W_dec + w["b_dec"]


def read_by_gemma_scope(folder, raw):
    w = {name: torch.from_numpy(array) for name, array in np.load(folder / "params.npz").items()}
    assert sorted(w) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
    pre = raw @ w["W_enc"] + w["b_enc"]
    f = pre.relu() * (pre > w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


READERS = {
    "saelens": read_by_saelens,
    "sparsify": read_by_sparsify,
    "dictionary_learning": read_by_dictionary_learning,
    "gemma_scope": read_by_gemma_scope,
}


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize(("format", "architecture", "transcoder"), EVERY)
def test_a_reader_of_the_format_computes_our_activations_and_reconstruction(format, architecture, transcoder, tmp_path):
    sae, raw = small_sae(architecture, d_out=OUT if transcoder else None), raw_activations()
    f, reconstruction = READERS[format](export(sae, tmp_path, format), raw)
    ours = sae.encode(raw)
    assert 0 < ours.count_nonzero() < ours.numel()
    assert torch.equal(ours > 0, f > 0)
    # SAELens keeps a latent's activations, the others a decoder row's norm.
    factor = 1 if format == "saelens" else 1 / sae.reconstruction_scale
    torch.testing.assert_close(f, ours * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstruction, sae.decode(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("format", "architecture", "transcoder"), EVERY)
def test_an_export_reads_back_as_the_sae_that_was_trained(format, architecture, transcoder, tmp_path):
    sae, raw = small_sae(architecture, d_out=OUT if transcoder else None), raw_activations()
    again, provenance = read_sae(export(sae, tmp_path, format))
    for name, value in vars(sae).items():
        if isinstance(value, torch.Tensor | dict):
            torch.testing.assert_close(getattr(again, name), value, rtol=2e-6, atol=2e-6)
        else:
            assert getattr(again, name) == value, name
    assert again.threshold.shape == sae.threshold.shape
    torch.testing.assert_close(again.encode(raw), sae.encode(raw), rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(again.reconstruct(raw), sae.reconstruct(raw), rtol=1e-5, atol=5e-6)
    assert provenance == (OUT_WHERE if transcoder else WHERE)


@pytest.mark.parametrize("format", FORMATS)
def test_an_sae_that_does_not_centre_its_input_keeps_its_function(format, tmp_path):
    sae, raw = small_sae("topk" if format == "sparsify" else "relu_l1", subtract_b_dec=False), raw_activations()
    _, reconstruction = READERS[format](export(sae, tmp_path, format), raw)
    torch.testing.assert_close(reconstruction, sae.reconstruct(raw), rtol=1e-5, atol=1e-5)
    again = import_sae(tmp_path)
    assert not again.subtract_b_dec
    torch.testing.assert_close(again.encode(raw), sae.encode(raw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "gemma_scope"])
def test_a_pre_activation_equal_to_the_threshold_stays_active_after_export(format, tmp_path):
    eye, threshold = torch.eye(3), torch.tensor(0.7)
    sae = TrainedSAE(eye, eye, torch.zeros(3), torch.zeros(3), threshold, "batchtopk", 1)
    at_threshold = torch.tensor([[0.7, 0.69, 0.71]])
    f, _ = READERS[format](export(sae, tmp_path, format), at_threshold)
    assert (f > 0).tolist() == [[True, False, True]]
    assert torch.equal(import_sae(tmp_path).threshold, threshold)


def test_a_topk_transcoder_between_equal_widths_is_told_by_its_hook_points(tmp_path):
    sae, raw = small_sae("topk", subtract_b_dec=False), raw_activations()
    with pytest.raises(UserError, match=r"saelens cannot express a topk transcoder; sparsify can"):
        export_sae(sae, tmp_path / "a", "saelens", OUT_WHERE)
    export_sae(sae, tmp_path / "b", "sparsify", OUT_WHERE)
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["transcode"] is True
    torch.testing.assert_close(read_by_sparsify(tmp_path / "b", raw)[1], sae.reconstruct(raw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sae", "format", "said"),
    [
        (small_sae("gated"), "sparsify", "a gated .* saelens and dictionary_learning can"),
        (small_sae("gated", d_out=OUT), "saelens", "a gated transcoder; no known format can"),
        (small_sae("relu_l1", d_out=OUT), "dictionary_learning", "a transcoder; saelens and gemma_scope can"),
        (small_sae("topk", margin=0.4), "saelens", r"a topk with a margin \(0.4\); no known format can"),
        (small_sae("topk"), "gemma_scope", "a topk .* saelens and sparsify and dictionary_learning can"),
        (small_sae("topk", d_out=OUT), "sparsify", "between widths 12 and 7; no known format can"),
        (small_sae("topk"), "onnx", "'onnx' is unknown; known: saelens, sparsify"),
    ],
)
def test_what_a_format_cannot_express_is_refused_and_says_which_can(sae, format, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export(sae, tmp_path, format)
    assert not list(tmp_path.iterdir())


def test_two_formats_never_share_a_folder(tmp_path):
    export(small_sae("topk"), tmp_path, "saelens")
    with pytest.raises(UserError, match="holds an SAE in saelens's format"):
        export(small_sae("topk"), tmp_path, "sparsify")
    assert import_sae(tmp_path).architecture == "topk"


# ---------------------------------------------------------------- files that others wrote


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_told_by_the_files(format, tmp_path):
    folder = export(small_sae("topk" if format == "sparsify" else "batchtopk"), tmp_path, format)
    assert detect(folder) == format
    assert detect(folder / FORMATS[format].weights) == format
    assert import_sae(folder / FORMATS[format].weights).d_sae == M


def test_saelens_folders_that_rank_by_decoder_norm_keep_their_numbers(tmp_path):
    folder, raw = export(small_sae("topk"), tmp_path), raw_activations()
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    w["W_dec"] = w["W_dec"] * torch.linspace(0.5, 3, M)[:, None]
    del cfg["metadata"]["sae_ray"]
    (folder / "cfg.json").write_text(
        json.dumps(cfg | {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False})
    )
    save_file(w, folder / "sae_weights.safetensors")
    norm = w["W_dec"].norm(dim=1)
    f = top((raw @ w["W_enc"] + w["b_enc"]) * norm, K)
    found = import_sae(folder)
    torch.testing.assert_close(found.encode(raw), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.decode(f), (f / norm) @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


def without_notes(folder: Path, name: str) -> Path:
    """An export as if another library had written it."""
    config = json.loads((folder / name).read_text())
    config.get("metadata", config).pop("sae_ray")
    (folder / name).write_text(json.dumps(config))
    return folder


def test_a_foreign_batchtopk_is_told_from_a_jumprelu_by_saelens_metadata(tmp_path):
    sae, raw = small_sae("batchtopk"), raw_activations()
    folder = without_notes(export(sae, tmp_path), "cfg.json")
    assert import_sae(folder).architecture == "jumprelu"
    about = {"sae_lens_version": "6.54.12", "training_architecture": "matryoshka_batchtopk"}
    about |= {"training_architecture_details": {"k": 5}, "model_name": "gpt2"}
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"metadata": about}))
    found, provenance = read_sae(folder)
    assert (found.architecture, found.k, found.input_scale, provenance.model) == ("matryoshka", 5, 1.0, "gpt2")
    torch.testing.assert_close(found.encode(raw), sae.encode(raw), rtol=1e-5, atol=1e-5)


def test_what_saelens_trainers_save_is_read(tmp_path):
    eye, raw = torch.eye(3), torch.tensor([[0.7, 0.69, 0.71]])
    cfg = {"d_in": 3, "d_sae": 3, "metadata": {"sae_lens_version": "6.54.12"}}
    w = {"W_enc": eye, "W_dec": eye.clone(), "b_enc": torch.zeros(3), "b_dec": torch.zeros(3)}
    for kind, extra, active in (
        ("batchtopk", {"topk_threshold": torch.tensor(0.7).double()}, [False, False, True]),
        ("matryoshka_batchtopk", {"topk_threshold": torch.tensor(0.0).double()}, [True, True, True]),
        ("jumprelu", {"log_threshold": torch.tensor([0.71, 0.68, 0.7]).log()}, [False, True, True]),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"architecture": kind, "k": 1.5}))
        save_file(w | extra, tmp_path / "sae_weights.safetensors")
        assert (import_sae(tmp_path).encode(raw) > 0).tolist() == [active], kind


def test_thresholds_that_someone_tuned_stay_a_jumprelu(tmp_path):
    folder = export(small_sae("batchtopk"), tmp_path)
    w = load_file(folder / "sae_weights.safetensors")
    w["threshold"][3] += 1
    save_file(w, folder / "sae_weights.safetensors")
    found = import_sae(folder)
    assert found.architecture == "jumprelu"
    assert torch.equal(found.threshold, w["threshold"])


def test_a_saelens_config_from_before_6_is_read(tmp_path):
    sae, raw = small_sae("topk", input_scale=1.0), raw_activations()
    folder = export(sae, tmp_path)
    old = {"d_in": 12, "d_sae": M, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    old |= {"model_name": "gpt2", "hook_point": "blocks.0.hook_resid_pre", "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps(old))
    found, provenance = read_sae(folder)
    assert (found.architecture, found.k, provenance.hook) == ("topk", K, "blocks.0.hook_resid_pre")
    torch.testing.assert_close(found.encode(raw), sae.encode(raw), rtol=1e-5, atol=1e-5)


def test_a_foreign_autoencoder_is_read_with_unit_rows_as_its_library_does(tmp_path):
    sae, raw = small_sae("relu_l1"), raw_activations()
    sae = replace(sae, W_dec_MD=sae.W_dec_MD * torch.linspace(0.5, 3, M)[:, None])
    folder = without_notes(export(sae, tmp_path, "dictionary_learning"), "config.json")
    found = import_sae(folder)
    torch.testing.assert_close(found.W_dec_MD.norm(dim=1), torch.ones(M))
    torch.testing.assert_close(found.reconstruct(raw), sae.reconstruct(raw), rtol=1e-4, atol=1e-4)


def test_a_published_gemma_scope_folder_says_its_l0_by_its_name(tmp_path):
    folder = tmp_path / "layer_12" / "width_16k" / "average_l0_82"
    export(small_sae("jumprelu"), folder, "gemma_scope")
    (folder / "sae_ray.json").unlink()
    found = import_sae(folder / "params.npz")
    assert (found.architecture, found.k, found.subtract_b_dec) == ("jumprelu", 82, False)


def test_exports_of_a_run_are_written_as_before(tmp_path):
    export_saelens(small_sae("batchtopk"), tmp_path, model="m", hook="blocks.3.hook_resid_post", context_length=128)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("m", "blocks.3.hook_resid_post")
    assert metadata["context_size"] == 128
