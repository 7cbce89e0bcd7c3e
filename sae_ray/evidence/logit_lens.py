"""What a latent says to the output: the tokens whose logits its decoder row raises and lowers most.

    effect = (W_dec * norm_weight) @ unembedding.T, minus its mean over the vocabulary

The final norm's division is a positive number that depends on the rest of the residual stream; it is left out, so
the numbers compare tokens of one latent and not latents. The mean over the vocabulary does not change any
probability, so it is taken off; a LayerNorm's subtraction of the mean is applied.

Suffixes: N latents, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_ray.errors import UserError

OutputTokens = tuple[tuple[str, float], ...]
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Unembedding:
    """weight_VD: of the output layer. norm_D: the weight of the norm before it (all ones if it has none).
    centred: that norm is a LayerNorm, which takes the mean over D off."""

    weight_VD: torch.Tensor
    norm_D: torch.Tensor
    centred: bool = False


def output_logits(model: Any, tokenizer: Any) -> Unembedding:
    """Of a loaded transformers causal LM; its output layer may be its embedding. Rows past the tokenizer's vocabulary
    (padding) are left out.

    Raises:
        UserError: it has no output layer, or its final norm is not found by a name that is known.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise UserError(f"{type(model).__name__} has no output embeddings: no logit lens")
    weight_VD = head.weight.detach()[: len(tokenizer)]
    norm = _final_norm(model)
    norm_D = getattr(norm, "weight", None)
    if norm_D is None:
        return Unembedding(weight_VD, torch.ones_like(weight_VD[0]), isinstance(norm, torch.nn.LayerNorm))
    norm_D = norm_D.detach()
    if type(norm).__name__.startswith("Gemma"):
        # Gemma 1 to 3 keep the weight less one; 3n and later do not. What the norm does to a constant vector says.
        norm_D = _as_applied(norm, norm_D)
    return Unembedding(weight_VD, norm_D.to(weight_VD.dtype), isinstance(norm, torch.nn.LayerNorm))


@torch.no_grad()
def output_effects(W_dec_ND: torch.Tensor, unembedding: Unembedding) -> torch.Tensor:
    """Effect on each logit, centred over the vocabulary: float32 [N, V]. Mind the size."""
    weight_VD = unembedding.weight_VD
    rows_ND = W_dec_ND.to(weight_VD.device, torch.float32)
    if rows_ND.shape[1] != weight_VD.shape[1]:
        raise UserError(
            f"the decoder writes vectors of width {rows_ND.shape[1]}, the output layer reads {weight_VD.shape[1]}: "
            "no logit lens at this hook point"
        )
    if unembedding.centred:
        rows_ND = rows_ND - rows_ND.mean(dim=1, keepdim=True)
    effect_NV = (rows_ND * unembedding.norm_D.float()) @ weight_VD.float().T
    return effect_NV - effect_NV.mean(dim=1, keepdim=True)


@torch.no_grad()
def output_tokens(
    W_dec_ND: torch.Tensor, unembedding: Unembedding, tokenizer: Any, k: int = 10
) -> list[tuple[OutputTokens, OutputTokens]]:
    """(promoted, suppressed) of each latent: k of (token as text, logit) each, the furthest from 0 first.

    Blockwise: about 64 MB of logits at a time.
    """
    unembedding = replace(unembedding, weight_VD=unembedding.weight_VD.float())
    n_tokens = len(unembedding.weight_VD)
    k = min(k, n_tokens)
    texts: dict[int, str] = {}

    def named(ids: Sequence[int], values: Sequence[float]) -> OutputTokens:
        for token in ids:
            if token not in texts:
                texts[token] = tokenizer.decode([token])
        return tuple((texts[token], value) for token, value in zip(ids, values, strict=True))

    out = []
    for rows_BD in W_dec_ND.split(max(1, _BLOCK_ELEMENTS // n_tokens)):
        effect_BV = output_effects(rows_BD, unembedding)
        high, low = effect_BV.topk(k, dim=1), effect_BV.topk(k, dim=1, largest=False)
        lists = (high.indices.tolist(), high.values.tolist(), low.indices.tolist(), low.values.tolist())
        out += [(named(up, ups), named(down, downs)) for up, ups, down, downs in zip(*lists, strict=True)]
    return out


def promoted(W_dec_ND: torch.Tensor, unembedding: Unembedding, tokenizer: Any, k: int = 10) -> list[OutputTokens]:
    return [up for up, _ in output_tokens(W_dec_ND, unembedding, tokenizer, k)]


def suppressed(W_dec_ND: torch.Tensor, unembedding: Unembedding, tokenizer: Any, k: int = 10) -> list[OutputTokens]:
    return [down for _, down in output_tokens(W_dec_ND, unembedding, tokenizer, k)]


_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm")


def _final_norm(model: Any) -> Any:
    inner = getattr(model, model.base_model_prefix, model)
    for place in (inner, getattr(inner, "decoder", None), getattr(inner, "language_model", None)):
        for name in _NORM_NAMES:
            norm = getattr(place, name, None)
            if isinstance(norm, torch.nn.Module):
                return norm
    raise UserError(
        f"{type(model).__name__}: its final norm is not under any of the names {', '.join(_NORM_NAMES)}: no logit lens"
    )


def _as_applied(norm: Any, norm_D: torch.Tensor) -> torch.Tensor:
    ones_D = torch.ones_like(norm_D)
    return norm(ones_D[None])[0] / ones_D.float().square().mean().sqrt().to(norm_D.dtype)
