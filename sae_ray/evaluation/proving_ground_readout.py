"""SAEs at matched L0: which latents respond to samples, and metrics after one shift of all thresholds.

Suffixes: N samples, M latents, F features, D d_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from sae_ray.evaluation.synthetic_matching import best_by_f1, best_features
from sae_ray.evaluation.synthetic_metrics import (
    Matching,
    Truth,
    detect,
    explained_variance,
    match,
    measure,
    threshold_shift,
)
from sae_ray.trainer.sharded_sae import ShardedTrainer

TARGET_L0 = (4, 8)
FRONTIER_L0 = (2, 3, 4, 6, 8, 12)


class Readout(NamedTuple):
    """An SAE's responses to some samples, before it is decided which of them count as active."""

    margin_NM: torch.Tensor  # of the gate: active from 0 on
    value_NM: torch.Tensor  # activation where active; never negative
    W_dec_MD: torch.Tensor
    b_dec_D: torch.Tensor
    scale: float  # the decoder speaks of activations times this


def readout(trainer: ShardedTrainer, x_ND: torch.Tensor) -> Readout:
    pre_NM = trainer.pre_activations(x_ND)
    margin_NM = pre_NM - trainer.thresholds_m()
    return Readout(margin_NM, pre_NM.relu_(), trainer.W_dec_mD, trainer.b_dec_D, trainer.output_scale)


def measurements(at: Readout, truth: Truth, l0s: Sequence[int] = TARGET_L0) -> dict[str, Any]:
    """All metrics as deployed and at each of `l0s`, and the main ones along FRONTIER_L0."""
    matching = match(at.W_dec_MD, truth.directions_FD)  # one decoder: the same at every L0
    return {
        "deployed": full_metrics(at, truth, None, matching),
        "matched": {str(l0): full_metrics(at, truth, l0, matching) for l0 in l0s},
        "frontier": [main_metrics(at, truth, l0, matching.best_M) for l0 in FRONTIER_L0],
    }


def full_metrics(at: Readout, truth: Truth, l0: float | None, matching: Matching | None = None) -> dict[str, float]:
    """Every metric, at the thresholds that let `l0` latents per sample be active; None: as deployed."""
    f_NM, x_hat_ND = _coded(at, l0)
    return asdict(measure(f_NM, x_hat_ND, at.W_dec_MD, truth, matching))


def main_metrics(at: Readout, truth: Truth, l0: float | None, best_M: torch.Tensor | None = None) -> dict[str, float]:
    """L0, EV, precision, recall and F1 only; see `full_metrics`.

    Args:
        best_M: the feature that each latent's decoder row is most parallel to, where that is known already.
    """
    f_NM, x_hat_ND = _coded(at, l0)
    best_M = best_features(at.W_dec_MD, truth.directions_FD) if best_M is None else best_M
    found = detect(f_NM > 0, truth.on_NF[:, best_M])
    means = {name: float(values.mean()) for name, values in found._asdict().items()}
    return {"l0": float((f_NM > 0).sum(1).double().mean()), "ev": explained_variance(truth.x_ND, x_hat_ND), **means}


def concepts(at: Readout, truth: Truth, l0: float) -> torch.Tensor:
    """The feature that each latent detects best, int64 [M], with `l0` latents active per sample."""
    return best_by_f1(_coded(at, l0)[0] > 0, truth.on_NF)


def _coded(at: Readout, l0: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [N, M] and reconstructions [N, D]."""
    shift = 0.0 if l0 is None else threshold_shift(at.margin_NM, at.value_NM > 0, l0)
    f_NM = torch.where(at.margin_NM >= shift, at.value_NM, 0)
    return f_NM, torch.addmm(at.b_dec_D, f_NM, at.W_dec_MD) / at.scale
