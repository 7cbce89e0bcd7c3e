"""Other parameters for the same function: scales, the input bias, and decoder norms moved around exactly.

Formats differ in what they can write down, not in what they compute, so an export or import is a chain of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sae_ray.sae.activation import Parameters
from sae_ray.sae.inference import TrainedSAE


def rescaled(
    sae: TrainedSAE, input_scale: float, output_scale: float | None, activation_factor: float = 1.0
) -> TrainedSAE:
    """The same map of raw activations under other scales; its latents' activations are `activation_factor` times ours.

    With scales of 1, a factor of 1 keeps the activations (SAELens's folding: the decoder's rows take the scale), and
    1 / output scale keeps the decoder's rows (the biases and thresholds take it).
    """
    new_output = input_scale if output_scale is None else output_scale
    encoder = activation_factor * sae.input_scale / input_scale
    bias = new_output / sae.reconstruction_scale
    return replace(
        sae,
        W_enc_MD=sae.W_enc_MD * encoder,
        W_dec_MD=sae.W_dec_MD * (bias / activation_factor),
        b_enc_M=sae.b_enc_M * activation_factor,
        b_dec_D=sae.b_dec_D * bias,
        threshold=sae.threshold * activation_factor,
        own=_with_b_mag(sae, lambda b_mag_M: b_mag_M * activation_factor),
        margin=sae.margin * activation_factor,
        input_scale=input_scale,
        output_scale=output_scale,
    )


def recentred(sae: TrainedSAE, subtract_b_dec: bool) -> TrainedSAE:
    """The same function with b_dec subtracted from the input, or not: the encoder's biases take the difference.

    A transcoder between different widths has no such form with `subtract_b_dec`; its d_in and d_out must agree.
    """
    if sae.subtract_b_dec == subtract_b_dec:
        return sae
    # float64: the two terms may be far larger than their difference.
    shift_M = sae.W_enc_MD.double() @ sae.b_dec_D.double() * (1 if subtract_b_dec else -1)
    own = _with_b_mag(sae, lambda b_mag_M: (b_mag_M + shift_M * sae.own["r_mag"].double().exp()).to(b_mag_M.dtype))
    b_enc_M = (sae.b_enc_M + shift_M).to(sae.b_enc_M.dtype)
    return replace(sae, b_enc_M=b_enc_M, own=own, subtract_b_dec=subtract_b_dec)


def with_unit_rows(sae: TrainedSAE) -> TrainedSAE:
    """Decoder rows of norm 1; each latent's activations, and its own threshold, take its row's norm.

    The same function where the gate treats latents alone (relu_l1, jumprelu, gated). The topk family ranks them:
    for it this is the SAE that ranks activations times norms, at the same 0-dim threshold.
    """
    return with_row_norms(sae, torch.ones_like(sae.b_enc_M))


def with_row_norms(sae: TrainedSAE, norm_M: torch.Tensor) -> TrainedSAE:
    """Decoder rows of these norms (rows of zeros stay); otherwise as `with_unit_rows`."""
    now_M = sae.W_dec_MD.norm(dim=1)
    factor_M = torch.where(now_M > 0, now_M / norm_M, torch.ones_like(now_M))
    return replace(
        sae,
        W_enc_MD=sae.W_enc_MD * factor_M[:, None],
        W_dec_MD=sae.W_dec_MD / factor_M[:, None],
        b_enc_M=sae.b_enc_M * factor_M,
        own=_with_b_mag(sae, lambda b_mag_M: b_mag_M * factor_M),
        threshold=sae.threshold * factor_M if sae.threshold.ndim else sae.threshold,
    )


def _with_b_mag(sae: TrainedSAE, change: Callable[[torch.Tensor], torch.Tensor]) -> Parameters:
    """Own parameters after a change of what activations are measured in: a gated SAE's second bias is one."""
    return sae.own | {name: change(value) for name, value in sae.own.items() if name == "b_mag"}


def just_below(threshold: torch.Tensor) -> torch.Tensor:
    """The threshold of a strict gate (`pre > threshold`) that passes what ours (`pre >= threshold`) passes."""
    return torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))


def just_above(threshold: torch.Tensor) -> torch.Tensor:
    """Undoes `just_below`; below 0 a gate is at 0, because only what is positive passes anyway."""
    return torch.nextafter(threshold, torch.full_like(threshold, torch.inf)).clamp(min=0)
