"""Reconstruction metrics on held-out blocks, and how much of the language model's loss an SAE recovers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_ray.activations.block import Block
from sae_ray.activations.hooks import edited, hook_point
from sae_ray.activations.subject import check_hook, load_full_model
from sae_ray.config import HookConfig, ModelConfig
from sae_ray.corpus.reader import TokenBlock
from sae_ray.sae.inference import TrainedSAE


@dataclass(frozen=True)
class CoreMetrics:
    """fvu: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2. l0: mean active latents per token.
    dead_fraction: share of latents that fire on none of the `tokens` tokens."""

    fvu: float
    l0: float
    dead_fraction: float
    tokens: int


@torch.inference_mode()
def core_metrics(blocks: Iterable[Block], sae: TrainedSAE, batch_tokens: int = 2048) -> CoreMetrics:
    """FVU, L0 and dead latents over all kept tokens of `blocks`, in one pass.

    Sums are float64: a few activations with norms a hundred times the median carry most of ||x||^2.

    Raises:
        ValueError: no tokens, or all of them are equal (FVU is undefined).
    """
    fired_M = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc_MD.device)
    sum_D: Tensor | float = 0.0
    square = residual = active = 0.0
    tokens = 0
    for raw_BD in _batches(blocks, batch_tokens, sae.W_enc_MD.device):
        f_BM = sae.encode(raw_BD)
        x_BD = raw_BD.double()
        residual += float((x_BD - sae.decode(f_BM).double()).square().sum())
        sum_D = sum_D + x_BD.sum(0)
        square += float(x_BD.square().sum())
        active_BM = f_BM > 0
        active += float(active_BM.sum())
        fired_M |= active_BM.any(0)
        tokens += len(raw_BD)
    if tokens == 0:
        raise ValueError("no tokens to evaluate on")
    assert isinstance(sum_D, Tensor)
    variance = square - float(sum_D.square().sum()) / tokens
    if variance <= 0:
        raise ValueError(f"the activations of {tokens} tokens have no variance")
    return CoreMetrics(
        fvu=residual / variance,
        l0=active / tokens,
        dead_fraction=1 - float(fired_M.double().mean()),
        tokens=tokens,
    )


def _batches(blocks: Iterable[Block], batch_tokens: int, device: torch.device) -> Iterator[Tensor]:
    for block in blocks:
        yield from block.acts_TD().to(device).split(batch_tokens)


@dataclass(frozen=True)
class CERecovered:
    """Mean next-token cross entropy, nats: clean, with the SAE's reconstruction, and with each ablation.

    `recovered_*` is (CE_ablated - CE_sae) / (CE_ablated - CE_clean): 1 is as good as the clean model, 0 as
    bad as the ablation. None where the ablation does not hurt, so that there is nothing to recover.
    """

    clean: float
    sae: float
    mean_ablation: float
    zero_ablation: float
    recovered_vs_mean: float | None
    recovered_vs_zero: float | None
    tokens: int


def ce_recovered(
    model_cfg: ModelConfig,
    hook: HookConfig,
    sequences: TokenBlock | Iterable[TokenBlock],
    saes: Mapping[str, TrainedSAE],
    batch_sequences: int = 4,
    device: str | torch.device | None = None,
) -> dict[str, CERecovered]:
    """Splice each SAE's reconstruction into the language model at the hook point and measure its loss.

    The same positions (`keep_SL`) are replaced in all passes; masked ones go through unchanged. The mean
    is that of the kept positions of these sequences. `auto` means float32 here: in bfloat16, rounding would
    be a visible part of a small difference of losses. Memory: one batch of logits.

    Raises:
        UserError: the model or the layer does not exist.
        ValueError: no token has a next token to predict.
    """
    check_hook(model_cfg, hook)
    dtype = torch.float32 if model_cfg.dtype == "auto" else getattr(torch, model_cfg.dtype)
    model = load_full_model(model_cfg, dtype, device)
    placed = {name: sae.to(model.device) for name, sae in saes.items()}
    return splice_losses(model, hook, sequences, placed, batch_sequences)


@torch.inference_mode()
def splice_losses(
    model: Any,
    hook: HookConfig,
    sequences: TokenBlock | Iterable[TokenBlock],
    saes: Mapping[str, TrainedSAE],
    batch_sequences: int = 4,
) -> dict[str, CERecovered]:
    """`ce_recovered` on a loaded causal language model."""
    blocks = [sequences] if isinstance(sequences, TokenBlock) else list(sequences)
    tokens_SL = np.concatenate([block.tokens_SL for block in blocks])
    keep_SL = np.concatenate([block.keep_SL for block in blocks])
    batches = [
        _Batch(
            torch.from_numpy(tokens_SL[start : start + batch_sequences]).to(model.device, torch.long),
            torch.from_numpy(keep_SL[start : start + batch_sequences]).to(model.device),
        )
        for start in range(0, len(tokens_SL), batch_sequences)
    ]
    n_targets = sum(int((batch.tokens_SL[:, 1:] >= 0).sum()) for batch in batches)
    if n_targets == 0:
        raise ValueError("no token has a next token to predict")

    sum_D: Tensor | float = 0.0

    def add_up(x_TD: Tensor) -> None:
        nonlocal sum_D
        sum_D = sum_D + x_TD.double().sum(0)

    def total(edit: Callable[[Tensor], Tensor | None]) -> float:
        return sum(_summed_loss(model, hook, batch, edit) for batch in batches) / n_targets

    clean = total(add_up)
    mean_D = sum_D / max(1, int(keep_SL.sum()))
    mean_ablation = total(lambda x_TD: torch.as_tensor(mean_D, device=x_TD.device).expand_as(x_TD))
    zero_ablation = total(torch.zeros_like)
    out = {}
    for name, sae in saes.items():
        spliced = total(sae.reconstruct)
        out[name] = CERecovered(
            clean=clean,
            sae=spliced,
            mean_ablation=mean_ablation,
            zero_ablation=zero_ablation,
            recovered_vs_mean=_recovered(clean, spliced, mean_ablation),
            recovered_vs_zero=_recovered(clean, spliced, zero_ablation),
            tokens=n_targets,
        )
    return out


class _Batch(NamedTuple):
    tokens_SL: Tensor
    keep_SL: Tensor


def _summed_loss(model: Any, hook: HookConfig, batch: _Batch, edit: Callable[[Tensor], Tensor | None]) -> float:
    """Summed cross entropy of a batch; `edit` sees, and may replace, the kept rows [T, D] at the hook."""

    def replace_kept(x_SLD: Tensor) -> Tensor | None:
        new_TD = edit(x_SLD[batch.keep_SL])
        if new_TD is None:
            return None
        new_SLD = x_SLD.clone()
        new_SLD[batch.keep_SL] = new_TD.to(x_SLD.dtype)
        return new_SLD

    with edited(hook_point(model, hook), replace_kept):
        logits_SLV = model(input_ids=batch.tokens_SL.clamp(min=0), use_cache=False).logits
    # Sequence by sequence, so that the float32 copy of the logits stays small.
    return sum(
        float(F.cross_entropy(logits_LV[:-1].float(), ids_L[1:], ignore_index=-1, reduction="sum"))
        for logits_LV, ids_L in zip(logits_SLV, batch.tokens_SL, strict=True)
    )


def _recovered(clean: float, spliced: float, ablated: float) -> float | None:
    return (ablated - spliced) / (ablated - clean) if ablated > clean else None
