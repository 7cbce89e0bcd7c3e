"""SAELens (v6): a folder with `cfg.json` and `sae_weights.safetensors`; W_enc is [d_in, d_sae].

Scales are folded so that activations stay ours (W_enc * s, W_dec / s, b_dec / s), as SAELens folds its own. Its
inference architectures are standard, jumprelu, topk, gated, transcoder and jumprelu_transcoder: a BatchTopK or
Matryoshka is a jumprelu there. Read are also what its trainers save (a running `topk_threshold`, a
`log_threshold`), and configs from before 6.0, which lie flat and leave out what was usual.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes

from sae_ray.errors import UserError
from sae_ray.sae.formats.files import Shapes, allow, checked, read_json, read_safetensors, whole, write_json
from sae_ray.sae.formats.notes import KEY, Format, Found, Provenance, as_trained, notes_of, restored
from sae_ray.sae.formats.rewrite import just_above, just_below, rescaled, with_unit_rows
from sae_ray.sae.inference import TrainedSAE
from sae_ray.storage import LocalStorage

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Without a version in its metadata a config counts as one from before 6.0, and loses its metadata.
VERSION = "6.0.0"

SAE: Shapes = {"W_enc": ("D", "M"), "W_dec": ("M", "D"), "b_enc": ("M",), "b_dec": ("D",)}
TRANSCODER: Shapes = {**SAE, "W_dec": ("M", "O"), "b_dec": ("O",)}
GATED: Shapes = {name: SAE[name] for name in ("W_enc", "W_dec", "b_dec")}
GATED = {**GATED, **dict.fromkeys(("b_gate", "b_mag", "r_mag"), ("M",))}
THETA: Shapes = {"threshold": ("M",)}
RUNNING: Shapes = {"topk_threshold": ()}
SKIP: Shapes = {"W_skip": ("O", "D")}
# Their architecture: ours, and its tensors. The last two are what their trainers save.
KINDS: dict[str, tuple[str, Shapes]] = {
    "standard": ("relu_l1", SAE),
    "topk": ("topk", SAE),
    "jumprelu": ("jumprelu", {**SAE, **THETA}),
    "gated": ("gated", GATED),
    "transcoder": ("relu_l1", TRANSCODER),
    "jumprelu_transcoder": ("jumprelu", {**TRANSCODER, **THETA}),
    "skip_transcoder": ("relu_l1", {**TRANSCODER, **SKIP}),
    "jumprelu_skip_transcoder": ("jumprelu", {**TRANSCODER, **THETA, **SKIP}),
    "batchtopk": ("batchtopk", {**SAE, **RUNNING}),
    "matryoshka_batchtopk": ("matryoshka", {**SAE, **RUNNING}),
}


def refusal(sae: TrainedSAE, transcoder: bool) -> str | None:
    if sae.architecture not in {ours for ours, _ in KINDS.values()}:
        return f"a {sae.architecture}"
    if sae.architecture == "topk" and sae.margin:
        return f"a topk with a margin ({sae.margin:g})"
    if transcoder and sae.architecture in ("topk", "gated"):
        return f"a {sae.architecture} transcoder"
    return None


def write(sae: TrainedSAE, folder: Path, provenance: Provenance) -> None:
    transcoder = sae.is_transcoder or provenance.hook_out is not None
    plain = rescaled(sae, 1.0, None if not transcoder else 1.0)
    kind = {"relu_l1": "standard", "topk": "topk", "gated": "gated"}.get(sae.architecture, "jumprelu")
    if transcoder:
        kind = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}[kind]
    tensors = {"W_enc": plain.W_enc_MD.T, "W_dec": plain.W_dec_MD, "b_dec": plain.b_dec_D}
    if sae.architecture == "gated":
        tensors |= {"b_gate": plain.b_enc_M, **plain.own}
    else:
        tensors["b_enc"] = plain.b_enc_M
    if "threshold" in KINDS[kind][1]:
        threshold_M = plain.threshold.float().expand(sae.d_sae)
        tensors["threshold"] = threshold_M if sae.architecture == "jumprelu" else just_below(threshold_M)
    config: dict[str, Any] = {
        "architecture": kind,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec and not transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "model_name": provenance.model,
            "hook_name": provenance.hook,
            "context_size": provenance.context_length,
            "dataset_path": provenance.dataset,
            "prepend_bos": False,
            KEY: notes_of(sae, 1.0, provenance),
        },
    }
    if kind == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if transcoder:
        config["d_out"] = sae.d_out
        config["metadata"]["hook_name_out"] = provenance.hook_out
    data = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    LocalStorage(folder).write(WEIGHTS, tensors_to_bytes(data))
    write_json(folder / CONFIG, config)


def read(folder: Path) -> Found:
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    config = _modern(read_json(config_file))
    kind, metadata = str(config.get("architecture")), config["metadata"]
    allow(config_file, "architecture", kind, tuple(KINDS))
    allow(config_file, "normalize_activations", config.get("normalize_activations") or "none", ("none",))
    allow(config_file, "reshape_activations", config.get("reshape_activations") or "none", ("none",))
    stored = read_safetensors(weights_file)
    for name in ("finetuning_scaling_factor", "scaling_factor"):
        if (factor := stored.pop(name, None)) is not None and not bool((factor == 1).all()):
            raise UserError(f"{weights_file}: {name} is not 1; this version reads no fine-tuned scales")
    if "log_threshold" in stored:
        stored["threshold"] = stored.pop("log_threshold").exp()
    letters = {"d_in": "D", "d_sae": "M", "d_out": "O"}
    sizes = {letter: (whole(config_file, config, key), key) for key, letter in letters.items() if key in config}
    tensors = checked(weights_file, stored, KINDS[kind][1], sizes)
    if "W_skip" in tensors and bool(tensors.pop("W_skip").any()):
        raise UserError(f"{weights_file}: W_skip is not 0; skip connections cannot be expressed here")

    sae = _sae(kind, config, config_file, tensors)
    if kind in ("topk", "batchtopk", "matryoshka_batchtopk") and config.get("rescale_acts_by_decoder_norm"):
        # They rank f * ||W_dec|| and decode with unit rows: the same SAE with the norms moved over. Their running
        # threshold is of what they rank, and stays.
        sae = with_unit_rows(sae)
    if (notes := metadata.get(KEY)) is not None:
        return Found(restored(sae, notes, config_file), Provenance.of(notes))
    return Found(_trained_by_saelens(sae, metadata), _provenance(metadata))


def _sae(kind: str, config: dict[str, Any], config_file: Path, tensors: dict[str, torch.Tensor]) -> TrainedSAE:
    """The SAE as its tensors say it, at scale 1."""
    k, threshold = 0, torch.zeros(())
    if kind == "topk":
        k = whole(config_file, config, "k", 1, len(tensors["W_dec"]))
    elif "topk_threshold" in tensors:
        fraction = _fraction(config.get("k") or 0)
        if fraction is None:
            raise UserError(f"{config_file}: k is {config['k']!r}, expected a number up to {len(tensors['W_dec'])}")
        k = fraction
        threshold = tensors["topk_threshold"].clamp(min=0)
        threshold = just_above(threshold) if threshold > 0 else threshold
    elif "threshold" in tensors:
        threshold = tensors["threshold"].clamp(min=0)  # their ReLU cuts below 0 whatever the threshold
    return TrainedSAE(
        tensors["W_enc"].T.contiguous(),
        tensors["W_dec"],
        tensors["b_gate"] if kind == "gated" else tensors["b_enc"],
        tensors["b_dec"],
        threshold,
        KINDS[kind][0],
        k,
        subtract_b_dec="transcoder" not in kind and bool(config.get("apply_b_dec_to_input", True)),
        own={name: tensors[name] for name in ("r_mag", "b_mag") if name in tensors},
    )


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A config from before 6.0 in today's form."""
    if isinstance(config.get("metadata"), dict):
        return config
    out = {"architecture": "standard"} | config
    if (config.get("activation_fn") or config.get("activation_fn_str")) == "topk":
        kwargs = config.get("activation_fn_kwargs")
        out |= {"architecture": "topk", "k": kwargs.get("k") if isinstance(kwargs, dict) else None}
    if isinstance(config.get("normalize_activations"), bool):
        out["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    if "hook_z" in str(config.get("hook_name") or config.get("hook_point")):
        out.setdefault("reshape_activations", "hook_z")
    names = {"model_name": "model_name", "hook_name": "hook_name", "hook_point": "hook_name"}
    names |= {"context_size": "context_size", "dataset_path": "dataset_path", "hook_name_out": "hook_name_out"}
    return out | {"metadata": {new: config[old] for old, new in names.items() if old in config}}


def _trained_by_saelens(sae: TrainedSAE, metadata: dict[str, Any]) -> TrainedSAE:
    """SAELens says beside a jumprelu that it was trained as a BatchTopK, and with which k."""
    details = metadata.get("training_architecture_details")
    k = _fraction(details.get("k")) if isinstance(details, dict) else None
    if k is None or sae.architecture != "jumprelu":
        return sae
    trained = as_trained(sae, KINDS.get(str(metadata.get("training_architecture")), ("", {}))[0])
    return replace(trained, k=k) if trained.architecture != "jumprelu" else sae


def _fraction(k: Any) -> int | None:
    """Their k may be a fraction; None where it is no number that could be one."""
    return max(1, round(k)) if isinstance(k, (int, float)) and 0 <= k < 1 << 31 else None


def _provenance(metadata: dict[str, Any]) -> Provenance:
    names = {"model": "model_name", "hook": "hook_name", "context_length": "context_size", "dataset": "dataset_path"}
    return Provenance.of(
        {ours: metadata.get(theirs) for ours, theirs in (names | {"hook_out": "hook_name_out"}).items()}
    )


FORMAT = Format("saelens", WEIGHTS, refusal, write, read)
