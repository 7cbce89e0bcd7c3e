"""Reconstruction metrics on held-out blocks, and how much of the language model's loss an SAE recovers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_ray.activations.block import Block
from sae_ray.activations.hooks import edited, hook_point
from sae_ray.activations.subject import check_hooks, load_full_model
from sae_ray.config import HookConfig, ModelConfig
from sae_ray.corpus.reader import TokenBlock
from sae_ray.sae.inference import TrainedSAE


@dataclass(frozen=True)
class PlacedSAE:
    """An SAE and where it belongs: the hook point it reads, and the one it reconstructs (None: the same)."""

    sae: TrainedSAE
    hook: HookConfig
    hook_out: HookConfig | None = None

    @property
    def target(self) -> HookConfig:
        return self.hook_out or self.hook


@dataclass(frozen=True)
class CoreMetrics:
    """fvu: sum ||y - y_hat||^2 / sum ||y - mean(y)||^2, where y is what the SAE reconstructs: its input x, or a
    transcoder's target. l0: mean active latents per token. dead_fraction: share of latents that fire on none of
    the `tokens` tokens."""

    fvu: float
    l0: float
    dead_fraction: float
    tokens: int


@torch.inference_mode()
def core_metrics(blocks: Iterable[Block], placed: PlacedSAE, batch_tokens: int = 2048) -> CoreMetrics:
    """FVU, L0 and dead latents over all kept tokens of `blocks`, in one pass.

    Sums are float64: a few activations with norms a hundred times the median carry most of ||y||^2.

    Raises:
        ValueError: no tokens, or all of them are equal (FVU is undefined).
    """
    sae = placed.sae
    fired_M = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc_MD.device)
    sum_O: Tensor | float = 0.0
    square = residual = active = 0.0
    tokens = 0
    for raw_BD, target_BO in _batches(blocks, placed, batch_tokens):
        f_BM = sae.encode(raw_BD)
        y_BO = target_BO.double()
        residual += float((y_BO - sae.decode(f_BM).double()).square().sum())
        sum_O = sum_O + y_BO.sum(0)
        square += float(y_BO.square().sum())
        active_BM = f_BM > 0
        active += float(active_BM.sum())
        fired_M |= active_BM.any(0)
        tokens += len(raw_BD)
    if tokens == 0:
        raise ValueError("no tokens to evaluate on")
    assert isinstance(sum_O, Tensor)
    variance = square - float(sum_O.square().sum()) / tokens
    if variance <= 0:
        raise ValueError(f"the activations of {tokens} tokens have no variance")
    return CoreMetrics(
        fvu=residual / variance,
        l0=active / tokens,
        dead_fraction=1 - float(fired_M.double().mean()),
        tokens=tokens,
    )


def _batches(blocks: Iterable[Block], placed: PlacedSAE, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(what the SAE reads, what it reconstructs), batch by batch."""
    device = placed.sae.W_enc_MD.device
    for block in blocks:
        raw_TD = block.acts_TD(hook=placed.hook.name).to(device)
        target_TO = raw_TD if placed.hook_out is None else block.acts_TD(hook=placed.hook_out.name).to(device)
        yield from zip(raw_TD.split(batch_tokens), target_TO.split(batch_tokens), strict=True)


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
    sequences: TokenBlock | Iterable[TokenBlock],
    saes: Mapping[str, PlacedSAE],
    batch_sequences: int = 4,
    device: str | torch.device | None = None,
) -> dict[str, CERecovered]:
    """Splice each SAE's reconstruction into the language model at its hook point and measure the loss.

    A transcoder reads its input and replaces its target in the same pass. The same positions (`keep_SL`) are
    replaced in all passes; masked ones go through unchanged. The mean is that of the kept positions of these
    sequences. `auto` means float32 here: in bfloat16, rounding would be a visible part of a small difference of
    losses. Memory: one batch of logits.

    Raises:
        UserError: the model or a layer does not exist.
        ValueError: no token has a next token to predict.
    """
    check_hooks(model_cfg, [point for placed in saes.values() for point in (placed.hook, placed.target)])
    dtype = torch.float32 if model_cfg.dtype == "auto" else getattr(torch, model_cfg.dtype)
    model = load_full_model(model_cfg, dtype, device)
    return splice_losses(model, sequences, saes, batch_sequences)


@torch.inference_mode()
def splice_losses(
    model: Any,
    sequences: TokenBlock | Iterable[TokenBlock],
    saes: Mapping[str, PlacedSAE],
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

    def loss(*edits: _Edit) -> float:
        return sum(_summed_loss(model, batch, edits) for batch in batches) / n_targets

    targets = {placed.target.name: placed.target for placed in saes.values()}
    sums = {name: _Sum() for name in targets}
    clean = loss(*(_Edit(targets[name], sums[name].add) for name in targets))
    ablated = {}
    for name, target in targets.items():
        mean = loss(_Edit(target, (sums[name].total_D / max(1, int(keep_SL.sum()))).expand_as))
        ablated[name] = mean, loss(_Edit(target, torch.zeros_like))
    out = {}
    for name, placed in saes.items():
        mean, zero = ablated[placed.target.name]
        spliced = loss(*_splice(placed, placed.sae.to(model.device)))
        out[name] = CERecovered(
            clean=clean,
            sae=spliced,
            mean_ablation=mean,
            zero_ablation=zero,
            recovered_vs_mean=_recovered(clean, spliced, mean),
            recovered_vs_zero=_recovered(clean, spliced, zero),
            tokens=n_targets,
        )
    return out


class _Batch(NamedTuple):
    tokens_SL: Tensor
    keep_SL: Tensor


class _Edit(NamedTuple):
    """At `hook`, `change` sees, and may replace, the kept rows [T, D]."""

    hook: HookConfig
    change: Callable[[Tensor], Tensor | None]


class _Sum:
    """Sum of all rows that a clean pass has at one hook point."""

    def __init__(self) -> None:
        self.total_D: Tensor = torch.zeros((), dtype=torch.float64)

    def add(self, x_TD: Tensor) -> None:
        self.total_D = self.total_D.to(x_TD.device) + x_TD.double().sum(0)


def _splice(placed: PlacedSAE, sae: TrainedSAE) -> list[_Edit]:
    """The edits that put an SAE's reconstruction into a forward pass."""
    if placed.hook_out is None:
        return [_Edit(placed.hook, sae.reconstruct)]
    read: list[Tensor] = []

    def encode(x_TD: Tensor) -> None:
        read.append(sae.encode(x_TD))

    def decode(_x_TD: Tensor) -> Tensor:
        return sae.decode(read.pop())

    return [_Edit(placed.hook, encode), _Edit(placed.hook_out, decode)]


def _summed_loss(model: Any, batch: _Batch, edits: Iterable[_Edit]) -> float:
    """Summed cross entropy of a batch under `edits`."""

    def on_kept(change: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def replace_kept(x_SLD: Tensor) -> Tensor | None:
            new_TD = change(x_SLD[batch.keep_SL])
            if new_TD is None:
                return None
            new_SLD = x_SLD.clone()
            new_SLD[batch.keep_SL] = new_TD.to(x_SLD.dtype)
            return new_SLD

        return replace_kept

    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edited(hook_point(model, edit.hook), on_kept(edit.change)))
        logits_SLV = model(input_ids=batch.tokens_SL.clamp(min=0), use_cache=False).logits
    # Sequence by sequence, so that the float32 copy of the logits stays small.
    return sum(
        float(F.cross_entropy(logits_LV[:-1].float(), ids_L[1:], ignore_index=-1, reduction="sum"))
        for logits_LV, ids_L in zip(logits_SLV, batch.tokens_SL, strict=True)
    )


def _recovered(clean: float, spliced: float, ablated: float) -> float | None:
    return (ablated - spliced) / (ablated - clean) if ablated > clean else None
