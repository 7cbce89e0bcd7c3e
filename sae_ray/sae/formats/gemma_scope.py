"""Gemma Scope: `params.npz` with a jumprelu SAE or transcoder that never centres its input; W_enc is [d_in, d_sae].

Scales are folded into biases and thresholds, b_dec's share of the encoder into b_enc. The npz holds nothing but
the five arrays: its readers take every array for a parameter.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_ray.sae.formats.files import Shapes, as_npz, checked, read_npz
from sae_ray.sae.formats.notes import (
    FILE,
    THRESHOLD_GATED,
    Format,
    Found,
    Provenance,
    notes_of,
    read_notes,
    restored,
    write_notes,
)
from sae_ray.sae.formats.rewrite import just_below, recentred, rescaled
from sae_ray.sae.inference import TrainedSAE
from sae_ray.storage import LocalStorage

WEIGHTS = "params.npz"
SHAPES: Shapes = {
    "W_enc": ("D", "M"),
    "W_dec": ("M", "O"),
    "b_enc": ("M",),
    "b_dec": ("O",),
    "threshold": ("M",),
}
# What the files of the published folders do not say of themselves is in the folders' names.
L0_OF_FOLDER = r"average_l0_(\d+)"


def refusal(sae: TrainedSAE, transcoder: bool) -> str | None:
    if sae.architecture not in (*THRESHOLD_GATED, "jumprelu", "relu_l1"):
        return f"a {sae.architecture} (it knows jumprelu only)"
    return None


def write(sae: TrainedSAE, folder: Path, provenance: Provenance) -> None:
    factor = 1 / sae.reconstruction_scale
    plain = recentred(rescaled(sae, 1.0, 1.0 if sae.is_transcoder else None, factor), False)
    # relu_l1's threshold is 0: a jumprelu that passes what is above 0.
    threshold_M = plain.threshold.float().expand(sae.d_sae)
    tensors = {
        "W_enc": plain.W_enc_MD.T,
        "W_dec": plain.W_dec_MD,
        "b_enc": plain.b_enc_M,
        "b_dec": plain.b_dec_D,
        "threshold": threshold_M if sae.architecture in ("jumprelu", "relu_l1") else just_below(threshold_M),
    }
    data = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    LocalStorage(folder).write(WEIGHTS, as_npz(data))
    write_notes(folder, notes_of(sae, factor, provenance))


def read(folder: Path) -> Found:
    weights_file = folder / WEIGHTS
    stored = {re.sub("^w_", "W_", name): tensor for name, tensor in read_npz(weights_file).items()}
    tensors = checked(weights_file, stored, SHAPES, {})
    l0 = re.search(L0_OF_FOLDER, str(folder.resolve()))
    sae = TrainedSAE(
        tensors["W_enc"].T.contiguous(),
        tensors["W_dec"],
        tensors["b_enc"],
        tensors["b_dec"],
        tensors["threshold"].clamp(min=0),  # their ReLU cuts below 0 whatever the threshold
        "jumprelu",
        int(l0[1]) if l0 else 0,
        subtract_b_dec=False,
    )
    notes = read_notes(folder)
    return Found(restored(sae, notes, folder / FILE), Provenance.of(notes))


FORMAT = Format("gemma_scope", WEIGHTS, refusal, write, read)
