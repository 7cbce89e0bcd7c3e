"""dictionary_learning: a folder with `ae.pt` (a state dict) and `config.json`, whose `dict_class` says how to read it.

Scales are folded into biases and thresholds, as its trainers do: the decoder's rows keep their norm, and a latent's
activations are 1 / scale times ours. It has no transcoders. `ae.pt` is read with `weights_only`: nothing unpickles.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_ray.errors import UserError
from sae_ray.sae.formats.files import Shapes, allow, checked, read_json, read_state_dict, write_json
from sae_ray.sae.formats.notes import KEY, THRESHOLD_GATED, Format, Found, Provenance, notes_of, restored
from sae_ray.sae.formats.rewrite import just_above, just_below, recentred, rescaled, with_unit_rows
from sae_ray.sae.inference import TrainedSAE
from sae_ray.storage import LocalStorage

CONFIG, WEIGHTS = "config.json", "ae.pt"


class DictClass(NamedTuple):
    """One of its classes: our architecture, and what it calls the tensors."""

    architecture: str
    b_enc: str
    b_dec: str
    centred: bool = True
    linear: bool = True  # weights of nn.Linear, [out, in]; else W_enc [d_in, d_sae] and W_dec [d_sae, d_in]

    @property
    def weights(self) -> tuple[str, str]:
        return ("encoder.weight", "decoder.weight") if self.linear else ("W_enc", "W_dec")

    @property
    def shapes(self) -> Shapes:
        W_enc, W_dec = self.weights
        out: dict[str, tuple[str, ...]] = {
            W_enc: ("M", "D") if self.linear else ("D", "M"),
            W_dec: ("D", "M") if self.linear else ("M", "D"),
            self.b_enc: ("M",),
            self.b_dec: ("D",),
        }
        if self.architecture == "gated":
            out |= {"r_mag": ("M",), "mag_bias": ("M",)}
        if self.architecture == "jumprelu":
            out |= {"threshold": ("M",)}
        if self.architecture in ("topk", *THRESHOLD_GATED):
            out |= {"k": (), "threshold": ()}
        if self.architecture == "matryoshka":
            out |= {"group_sizes": ("G",)}
        return out


CLASSES = {
    "AutoEncoder": DictClass("relu_l1", "encoder.bias", "bias"),
    "AutoEncoderNew": DictClass("relu_l1", "encoder.bias", "decoder.bias", centred=False),
    "GatedAutoEncoder": DictClass("gated", "gate_bias", "decoder_bias"),
    "AutoEncoderTopK": DictClass("topk", "encoder.bias", "b_dec"),
    "BatchTopKSAE": DictClass("batchtopk", "encoder.bias", "b_dec"),
    "MatryoshkaBatchTopKSAE": DictClass("matryoshka", "b_enc", "b_dec", linear=False),
    "JumpReluAutoEncoder": DictClass("jumprelu", "b_enc", "b_dec", centred=False, linear=False),
}


def refusal(sae: TrainedSAE, transcoder: bool) -> str | None:
    if transcoder:
        return "a transcoder"
    if sae.architecture not in {known.architecture for known in CLASSES.values()}:
        return f"a {sae.architecture}"
    if sae.architecture == "topk" and sae.margin:
        return f"a topk with a margin ({sae.margin:g})"
    return None


def write(sae: TrainedSAE, folder: Path, provenance: Provenance) -> None:
    # The first class of an architecture: a relu_l1 that does not centre becomes an AutoEncoder, which does.
    dict_class = next(name for name, known in CLASSES.items() if known.architecture == sae.architecture)
    kind, factor = CLASSES[dict_class], 1 / sae.input_scale
    plain = recentred(rescaled(sae, 1.0, None, factor), kind.centred)
    W_enc, W_dec = kind.weights
    tensors = {
        W_enc: plain.W_enc_MD if kind.linear else plain.W_enc_MD.T,
        W_dec: plain.W_dec_MD.T if kind.linear else plain.W_dec_MD,
        kind.b_enc: plain.b_enc_M,
        kind.b_dec: plain.b_dec_D,
    }
    if sae.architecture == "gated":
        tensors |= {"r_mag": plain.own["r_mag"], "mag_bias": plain.own["b_mag"]}
    if "threshold" in kind.shapes:
        threshold = plain.threshold.float()
        tensors["threshold"] = just_below(threshold) if kind.architecture in THRESHOLD_GATED else threshold
    data = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    trainer: dict[str, Any] = {
        "dict_class": dict_class,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": provenance.model,
        "submodule_name": provenance.hook,
        "device": "cpu",
    }
    if "k" in kind.shapes:
        data["k"] = torch.tensor(sae.k, dtype=torch.int32)
        trainer["k"] = sae.k
    if "group_sizes" in kind.shapes:
        data["group_sizes"] = torch.tensor([sae.d_sae])  # groups are a matter of training only
    file = io.BytesIO()
    torch.save(data, file)
    LocalStorage(folder).write(WEIGHTS, file.getvalue())
    buffer = {"d_submodule": sae.d_in, "ctx_len": provenance.context_length}
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": buffer, KEY: notes_of(sae, factor, provenance)})


def read(folder: Path) -> Found:
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    config = read_json(config_file)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{config_file}: has no trainer section, which says the dict_class")
    dict_class = str(trainer.get("dict_class"))
    allow(config_file, "trainer.dict_class", dict_class, tuple(CLASSES))
    kind = CLASSES[dict_class]
    sae = _sae(kind, checked(weights_file, read_state_dict(weights_file), kind.shapes, {}), weights_file)
    if (notes := config.get(KEY)) is not None:
        return Found(restored(sae, notes, config_file), Provenance.of(notes))
    if dict_class == "AutoEncoder":
        sae = with_unit_rows(sae)  # as its `load_dictionary` does
    return Found(sae, _provenance(trainer, config.get("buffer")))


def _sae(kind: DictClass, tensors: dict[str, torch.Tensor], weights_file: Path) -> TrainedSAE:
    """The SAE as its tensors say it, at scale 1."""
    W_enc, W_dec = (tensors[name] for name in kind.weights)
    k, threshold = 0, torch.zeros(())
    if "k" in tensors:
        k = int(tensors["k"])
        if not 1 <= k <= len(tensors[kind.b_enc]):
            raise UserError(f"{weights_file}: k is {k}, expected 1 to {len(tensors[kind.b_enc])} (the latents)")
    if "threshold" in tensors:  # -1 until their trainer has seen enough steps: what is positive passes
        threshold = tensors["threshold"].clamp(min=0)
        if kind.architecture in THRESHOLD_GATED and threshold > 0:
            threshold = just_above(threshold)
    return TrainedSAE(
        (W_enc if kind.linear else W_enc.T).contiguous(),
        (W_dec.T if kind.linear else W_dec).contiguous(),
        tensors[kind.b_enc],
        tensors[kind.b_dec],
        threshold,
        kind.architecture,
        k,
        subtract_b_dec=kind.centred,
        own={"r_mag": tensors["r_mag"], "b_mag": tensors["mag_bias"]} if kind.architecture == "gated" else {},
    )


def _provenance(trainer: dict[str, Any], buffer: Any) -> Provenance:
    context_length = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    layer = f"layer {trainer['layer']}" if trainer.get("layer") is not None else None
    hook = trainer.get("submodule_name") or layer
    return Provenance.of({"model": trainer.get("lm_name"), "hook": hook, "context_length": context_length})


FORMAT = Format("dictionary_learning", WEIGHTS, refusal, write, read)
