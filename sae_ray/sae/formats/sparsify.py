"""sparsify (EleutherAI): a folder with `cfg.json` and `sae.safetensors`; W_dec is [d_sae, d_in] like the encoder's.

It knows TopK only, as autoencoder or, between hook points of one width, as transcoder. Scales are folded into the
biases, so that the decoder's rows keep the unit norm that its trainer holds them at.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save as tensors_to_bytes

from sae_ray.errors import UserError
from sae_ray.sae.formats.files import Shapes, allow, checked, read_json, read_safetensors, whole, write_json
from sae_ray.sae.formats.notes import FILE, Format, Found, Provenance, notes_of, read_notes, restored, write_notes
from sae_ray.sae.formats.rewrite import recentred, rescaled
from sae_ray.sae.inference import TrainedSAE
from sae_ray.storage import LocalStorage

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
SHAPES: Shapes = {
    "encoder.weight": ("M", "D"),
    "encoder.bias": ("M",),
    "W_dec": ("M", "D"),
    "b_dec": ("D",),
}


def refusal(sae: TrainedSAE, transcoder: bool) -> str | None:
    if sae.architecture != "topk":
        return f"a {sae.architecture} (it knows topk only)"
    if sae.margin:
        return f"a topk with a margin ({sae.margin:g})"
    if sae.d_in != sae.d_out:
        return f"a transcoder between widths {sae.d_in} and {sae.d_out}"
    return None


def write(sae: TrainedSAE, folder: Path, provenance: Provenance) -> None:
    transcoder = sae.is_transcoder or provenance.hook_out is not None
    factor = 1 / sae.reconstruction_scale
    plain = recentred(rescaled(sae, 1.0, 1.0 if transcoder else None, factor), not transcoder)
    tensors = {
        "encoder.weight": plain.W_enc_MD,
        "encoder.bias": plain.b_enc_M,
        "W_dec": plain.W_dec_MD,
        "b_dec": plain.b_dec_D,
    }
    norms_M = plain.W_dec_MD.norm(dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": bool(torch.allclose(norms_M, torch.ones_like(norms_M), atol=1e-4)),
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": transcoder,
        "d_in": sae.d_in,
    }
    data = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    LocalStorage(folder).write(WEIGHTS, tensors_to_bytes(data))
    write_json(folder / CONFIG, config)
    write_notes(folder, notes_of(sae, factor, provenance))


def read(folder: Path) -> Found:
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    config = read_json(config_file)
    allow(config_file, "activation", config.get("activation", "topk"), ("topk",))
    sizes = {"D": (whole(config_file, config, "d_in"), "d_in")}
    if config.get("num_latents"):
        sizes["M"] = (whole(config_file, config, "num_latents"), "num_latents")
    stored = read_safetensors(weights_file)
    shapes = SHAPES if "W_skip" not in stored else {**SHAPES, "W_skip": ("D", "D")}
    tensors = checked(weights_file, stored, shapes, sizes)
    if "W_skip" in tensors and bool(tensors["W_skip"].any()):
        raise UserError(f"{weights_file}: W_skip is not 0; skip connections cannot be expressed here")
    sae = TrainedSAE(
        tensors["encoder.weight"],
        tensors["W_dec"],
        tensors["encoder.bias"],
        tensors["b_dec"],
        torch.zeros(()),
        "topk",
        whole(config_file, config, "k", 1, len(tensors["W_dec"])),
        subtract_b_dec=not config.get("transcode", False),
    )
    notes = read_notes(folder)
    return Found(restored(sae, notes, folder / FILE), Provenance.of(notes))


FORMAT = Format("sparsify", WEIGHTS, refusal, write, read)
