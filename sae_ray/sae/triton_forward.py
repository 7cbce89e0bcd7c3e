"""The training forward of the topk family on a GPU: selection without a host sync, codes of fixed capacity.

Used where one process holds all tokens of its latents (dp 1): padded pairs are not in order of token, which
joining the pairs of several dp ranks needs.
"""

from __future__ import annotations

import torch

from sae_ray.sae import triton_kernels, triton_selection
from sae_ray.sae.activation import Active, StepContext
from sae_ray.sae.encoder import Encoder


def usable(encoder: Encoder, context: StepContext) -> bool:
    """Whether this step's forward can run in the kernels."""
    return triton_kernels.usable(encoder.centred_BD, encoder.W_mD) and _all_tokens_here(encoder, context)


def topk(encoder: Encoder, context: StepContext) -> Active | None:
    """The k largest per token; None where k is too large for the kernel."""
    pre_Bm, b_m = _without_bias(encoder)
    chosen = triton_selection.select_topk(pre_Bm, context.k, context.collectives, bias_m=b_m)
    return None if chosen is None else _active(encoder, pre_Bm, chosen)


def batch_topk(encoder: Encoder, context: StepContext) -> Active:
    """The k*B largest of the batch."""
    pre_Bm, b_m = _without_bias(encoder)
    n_keep = context.k * context.shard.global_rows
    chosen = triton_selection.select_batch_topk(pre_Bm, n_keep, context.shard, context.collectives, bias_m=b_m)
    return _active(encoder, pre_Bm, chosen)


def _all_tokens_here(encoder: Encoder, context: StepContext) -> bool:
    return len(encoder.centred_BD) == context.shard.global_rows


def _without_bias(encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The product, [B, m], and the bias that the selection adds in place on its way."""
    c_BD, W_mD, b_m = encoder.operands()
    return c_BD @ W_mD.T, b_m


def _active(encoder: Encoder, pre_Bm: torch.Tensor, chosen: triton_selection.Selected) -> Active:
    encoder.note(0, pre_Bm)
    codes = triton_selection.padded_codes(pre_Bm, chosen)
    return Active(codes._replace(vals_N=codes.vals_N.to(encoder.W_mD.dtype)), chosen.threshold)
