"""What travels beside an exported SAE's tensors: where its inputs come from, and what the format cannot say of it.

The notes are one JSON object under the key `sae_ray` of the format's own config, or, where its readers complain about
keys that they do not know or have no config, in a file `sae_ray.json` beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_ray.errors import UserError
from sae_ray.sae.formats.files import read_json, write_json
from sae_ray.sae.formats.rewrite import just_above, recentred, rescaled
from sae_ray.sae.inference import TrainedSAE

KEY, FILE = "sae_ray", "sae_ray.json"
THRESHOLD_GATED = ("batchtopk", "matryoshka")  # ours whose gate at inference is one threshold for all latents


@dataclass(frozen=True)
class Provenance:
    """Where an SAE's inputs (and a transcoder's targets) come from, and the SAE that it was fine-tuned from.

    "" and 0 where it is not known.
    """

    model: str = ""
    hook: str = ""
    context_length: int = 0
    dataset: str = ""
    hook_out: str | None = None
    init_from: str = ""

    @classmethod
    def of(cls, found: Any) -> Provenance:
        """From the mapping that a file holds, whatever else is in it."""
        known: dict[str, Any] = found if isinstance(found, dict) else {}
        texts = {name: known.get(name) for name in ("model", "hook", "dataset", "hook_out", "init_from")}
        length = known.get("context_length")
        return cls(
            **{name: text for name, text in texts.items() if isinstance(text, str)},
            context_length=length if isinstance(length, int) else 0,
        )


class Found(NamedTuple):
    """What a file held. As text, the line that a person is told."""

    sae: TrainedSAE
    provenance: Provenance

    def __str__(self) -> str:
        sae, where = self.sae, self.provenance
        transcoder = sae.is_transcoder or where.hook_out is not None
        parts = [
            sae.architecture + (" transcoder" if transcoder else ""),
            f"d_in {sae.d_in}",
            *([f"d_out {sae.d_out}"] if transcoder else []),
            f"d_sae {sae.d_sae}",
            *([f"k {sae.k}"] if sae.k else []),
            *([f"input scale {sae.input_scale:.4g}"] if sae.input_scale != 1 else []),
        ]
        hooks = " -> ".join(hook for hook in (where.hook, where.hook_out) if hook)
        source = " of ".join(part for part in (hooks, where.model) if part)
        return ", ".join(parts) + (f" ({source})" if source else "")


@dataclass(frozen=True)
class Format:
    """One library's files. `weights` is the file name that gives it away in a folder."""

    name: str
    weights: str
    refusal: Callable[[TrainedSAE, bool], str | None]  # (sae, is a transcoder) -> what it cannot express
    write: Callable[[TrainedSAE, Path, Provenance], None]
    read: Callable[[Path], Found]


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    write_json(folder / FILE, {KEY: notes})


def read_notes(folder: Path) -> Any:
    """None where there are none."""
    return read_json(folder / FILE).get(KEY) if (folder / FILE).is_file() else None


def notes_of(sae: TrainedSAE, activation_factor: float, provenance: Provenance) -> dict[str, Any]:
    """Notes of an export whose latents' activations are `activation_factor` times ours."""
    return {
        "architecture": sae.architecture,
        "k": sae.k,
        "threshold": float(sae.threshold) if sae.architecture == "topk" else None,
        "input_scale": sae.input_scale,
        "output_scale": sae.output_scale,
        "input_norm": sae.input_norm,
        "subtract_b_dec": sae.subtract_b_dec,
        "activation_factor": activation_factor,
        **asdict(provenance),
    }


def restored(sae: TrainedSAE, notes: Any, file: Path) -> TrainedSAE:
    """Undoes what an export folded. Without notes the SAE stays as it was read, at scale 1.

    The tensors have the last word: thresholds that were changed elsewhere and differ by latent stay a jumprelu.
    """
    if notes is None:
        return sae
    try:
        scale, output_scale = float(notes["input_scale"]), notes["output_scale"]
        output_scale = None if output_scale is None else float(output_scale)
        factor, k = float(notes["activation_factor"]), int(notes["k"])
        trained, centred = str(notes["architecture"]), bool(notes["subtract_b_dec"])
        input_norm, threshold = str(notes["input_norm"]), float(notes["threshold"] or 0)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: its {KEY!r} notes cannot be read: {error!r}") from error
    if not 0 <= k <= sae.d_sae:
        raise UserError(f"{file}: {KEY}.k is {k}, expected 0 (not known) to {sae.d_sae} (the latents)")
    for name, value in (("input_scale", scale), ("output_scale", output_scale), ("activation_factor", factor)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{file}: {KEY}.{name} is {value}; a scale is positive")
    sae = as_trained(sae, trained)
    if sae.architecture != "topk":
        sae = replace(sae, k=k)
    if sae.d_in == sae.d_out:
        sae = recentred(sae, centred)
    sae = replace(rescaled(sae, scale, output_scale, 1 / factor), input_norm=input_norm)
    if sae.architecture == "topk" and threshold > 0:
        sae = replace(sae, threshold=torch.tensor(threshold))
    return sae


def as_trained(sae: TrainedSAE, trained: str) -> TrainedSAE:
    """A jumprelu as the architecture that it was trained as, if its thresholds are what that exports."""
    if sae.architecture != "jumprelu":
        return sae
    theta_M = sae.threshold
    if trained in THRESHOLD_GATED and bool((theta_M == theta_M[0]).all()):
        return replace(sae, architecture=trained, threshold=just_above(theta_M[0].clone()))
    if trained == "relu_l1" and not bool(theta_M.any()):
        return replace(sae, architecture=trained, threshold=torch.zeros(()))
    return sae
