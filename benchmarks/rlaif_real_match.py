"""At what the SAEs of `rlaif_real.py` are compared: one L0 for all, and which latents; how often these are active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from rlaif_real_configs import CONTEXT_TOKENS

from sae_ray.activations.block import Block
from sae_ray.config import RunConfig
from sae_ray.reward.evidence import choose_latents, layout_contexts
from sae_ray.sae.inference import TrainedSAE


def threshold_at(pre_TM: Sequence[torch.Tensor], k: int) -> float:
    """The threshold at which tokens have k active latents on average; 0 where so many are not above 0.

    Args:
        pre_TM: pre-activations, piece by piece.
    """
    n_active = k * sum(len(piece) for piece in pre_TM)
    kept = torch.empty(0)
    for piece in pre_TM:  # only the largest so far can matter
        kept = torch.cat([kept, piece.flatten().topk(min(piece.numel(), n_active)).values])
        kept = kept.topk(min(len(kept), n_active)).values
    return max(0.0, float(kept[-1]))


def counted(active_TM: torch.Tensor, context_T: torch.Tensor) -> torch.Tensor:
    """In how many contexts each latent is active, int64 [M]."""
    rows_N, cols_N = active_TM.nonzero(as_tuple=True)
    m = active_TM.shape[1]
    return torch.bincount(torch.unique(context_T[rows_N] * m + cols_N) % m, minlength=m)


def at_same_l0(sae: TrainedSAE, blocks: Sequence[Block], hook: str, k: int) -> TrainedSAE:
    threshold = threshold_at([sae.pre_activations(block.acts_TD(torch.float32, hook)) for block in blocks], k)
    return replace(sae, threshold=torch.tensor(threshold), k=k)


def latents_like_rlaif(sae: TrainedSAE, blocks: Sequence[Block], config: RunConfig) -> list[int]:
    """Latents of an SAE that no round judged, by the rule by which a round chooses."""
    counts_M, contexts = torch.zeros(sae.d_sae, dtype=torch.int64), 0
    for block in blocks:
        sequences, length = block.tokens_SL.shape
        layout = layout_contexts([(block.seq_T, block.pos_T)], sequences, length, CONTEXT_TOKENS)
        counts_M += counted(sae.encode(block.acts_TD(torch.float32, config.hook.name)) > 0, layout.context_T)
        contexts += layout.n_contexts
    settings, rng = config.rlaif, np.random.default_rng([config.seed, 7, 0])
    need = settings.positives + settings.explainer_examples
    return choose_latents(counts_M.numpy(), contexts, settings.latents, need, settings.max_context_share, rng).tolist()


def active_shares(sae: TrainedSAE, latents: Sequence[int], blocks: Sequence[Block], hook: str) -> dict[int, float]:
    """latent -> the share of all blocks' tokens on which it is active."""
    active_N, tokens = torch.zeros(len(latents), dtype=torch.int64), 0
    for block in blocks:
        acts_TM = sae.encode(block.acts_TD(torch.float32, hook))
        active_N += (acts_TM[:, list(latents)] > 0).sum(0)
        tokens += len(acts_TM)
    return dict(zip(latents, (active_N / tokens).tolist(), strict=True))
