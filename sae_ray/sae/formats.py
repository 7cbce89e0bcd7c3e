"""Reading and writing SAEs in the formats of other libraries (the fields: RESEARCH.md section 3).

SAELens (v6): a folder with `cfg.json` and `sae_weights.safetensors`; W_enc is [d_in, d_sae]. A BatchTopK SAE
is exported as `jumprelu`, which is what its inference gate is. The input scale is folded into the weights,
so that the exported SAE takes raw activations:

    W_enc * s    b_enc    W_dec / s    b_dec / s    threshold
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from sae_ray.errors import UserError
from sae_ray.sae.inference import TrainedSAE
from sae_ray.storage import LocalStorage

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def export_saelens(
    sae: TrainedSAE, folder: str | Path, *, model: str, hook: str, context_length: int, dataset: str = ""
) -> Path:
    """Writes an SAE as a SAELens folder, float32. Returns the folder.

    Args:
        model, hook, context_length, dataset: where its inputs come from; SAELens keeps them as metadata.
    """
    scale = sae.input_scale
    tensors = {
        "W_enc": (sae.W_enc_MD * scale).T,
        "b_enc": sae.b_enc_M,
        "W_dec": sae.W_dec_MD / scale,
        "b_dec": sae.b_dec_D / scale,
    }
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    config: dict[str, Any] = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": model,
            "hook_name": hook,
            "context_size": context_length,
            "dataset_path": dataset,
            "prepend_bos": False,
            "trained_by": "sae_ray",
            "trained_architecture": sae.architecture,
            "trained_k": sae.k,
            "folded_input_scale": scale,
        },
    }
    if sae.architecture == "topk":
        config |= {"architecture": "topk", "k": sae.k, "rescale_acts_by_decoder_norm": False}
    else:
        config["architecture"] = "jumprelu"
        threshold_M = sae.threshold.float().expand(sae.d_sae)
        # SAELens lets pass what is greater than the threshold, we what reaches it.
        tensors["threshold"] = torch.nextafter(threshold_M, torch.tensor(-torch.inf)).contiguous()
    storage = LocalStorage(folder)
    storage.write(WEIGHTS, tensors_to_bytes(tensors))
    storage.write(CONFIG, json.dumps(config, indent=2).encode())
    return Path(folder)


def import_saelens(folder: str | Path) -> TrainedSAE:
    """Reads a SAELens folder of a jumprelu or topk SAE that takes raw activations.

    Raises:
        UserError: a file is missing or unreadable, or the SAE would give other numbers here.
    """
    storage = LocalStorage(folder)
    try:
        config = json.loads(storage.read(CONFIG))
        stored = tensors_from_bytes(storage.read(WEIGHTS))
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: {CONFIG} or {WEIGHTS} cannot be read: {error}") from error
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    kind = config.get("architecture")
    _require(folder, "architecture", kind, ("jumprelu", "topk"))
    _require(folder, "normalize_activations", config.get("normalize_activations", "none"), ("none",))
    _require(folder, "reshape_activations", config.get("reshape_activations", "none"), ("none",))
    wanted = ["W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if kind == "jumprelu" else [])]
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(f"{Path(folder) / WEIGHTS}: has no {', '.join(missing)}; found {', '.join(sorted(tensors))}")
    W_enc_MD, W_dec_MD = tensors["W_enc"].T.contiguous(), tensors["W_dec"]
    if W_enc_MD.shape != W_dec_MD.shape:
        shapes = f"W_enc {list(tensors['W_enc'].shape)}, W_dec {list(W_dec_MD.shape)}"
        raise UserError(f"{Path(folder) / WEIGHTS}: {shapes} are not [d_in, d_sae] and [d_sae, d_in]")
    b_enc_M = tensors["b_enc"]
    if not config.get("apply_b_dec_to_input", True):
        b_enc_M = b_enc_M + W_enc_MD @ tensors["b_dec"]  # ours always subtracts b_dec first
    if kind == "topk":
        if config.get("rescale_acts_by_decoder_norm"):
            # They rank f * ||W_dec|| and decode with unit rows: the same SAE with the norms moved over.
            norm_M = W_dec_MD.norm(dim=1)
            W_enc_MD, b_enc_M, W_dec_MD = (
                W_enc_MD * norm_M[:, None],
                b_enc_M * norm_M,
                W_dec_MD / norm_M[:, None],
            )
        return TrainedSAE(W_enc_MD, W_dec_MD, b_enc_M, tensors["b_dec"], torch.zeros(()), "topk", int(config["k"]))
    threshold_M = torch.nextafter(tensors["threshold"], torch.tensor(torch.inf, dtype=W_enc_MD.dtype))
    k = int(config.get("metadata", {}).get("trained_k") or 1)
    return TrainedSAE(W_enc_MD, W_dec_MD, b_enc_M, tensors["b_dec"], threshold_M, "batchtopk", k)


def _require(folder: str | Path, key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{Path(folder) / CONFIG}: {key} is {value!r}; this version reads {', '.join(allowed)}")
