"""MiniLM's detection over every held-out text that had no part in an explanation.

The scorer `embedding` draws a few texts per latent; its AUROC has a standard error of a tenth. An embedding per text
serves all latents of all SAEs, so here each text is asked about each latent, at its natural frequency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from sae_ray.activations.block import Block
from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.evidence.types import side_of
from sae_ray.judge.embedder import MiniLM
from sae_ray.judge.scores import auroc
from sae_ray.judging.selection import chooses_explanation
from sae_ray.reward.evidence import layout_contexts, max_per_context
from sae_ray.sae.inference import TrainedSAE

LEAST_ACTIVE = 8  # texts, for an AUROC


class Texts(NamedTuple):
    """Contexts that no explainer saw and that chose no explanation: their ids, int64 [C], and unit vectors [C, E]."""

    context_C: np.ndarray
    vector_CE: np.ndarray


def embedded(blocks: Sequence[Block], config: RunConfig, model: MiniLM) -> Texts:
    tokenizer, size = load_tokenizer(config.model), config.judge.context_tokens
    tokens_CS = np.concatenate([np.asarray(block.tokens_SL).reshape(-1, size) for block in blocks])
    own = [c for c, row in enumerate(tokens_CS) if side_of(row) == "score" and not chooses_explanation(row)]
    texts = [tokenizer.decode(tokens_CS[c][tokens_CS[c] >= 0].tolist(), skip_special_tokens=True) for c in own]
    return Texts(np.array(own, dtype=np.int64), model.embed_now(texts))


def detections(
    sae: TrainedSAE,
    explanations: Mapping[int, str],
    blocks: Sequence[Block],
    texts: Texts,
    config: RunConfig,
    model: MiniLM,
) -> dict[int, float | None]:
    """latent -> AUROC of cosine(explanation, text), active texts against inactive ones; None with too few of either."""
    latents = list(explanations)
    best_CN = torch.cat([_strongest(sae, block, latents, config) for block in blocks]).numpy()[texts.context_C]
    wanted_NE = model.embed_now([explanations[latent] for latent in latents])
    cosine_CN = texts.vector_CE @ wanted_NE.T
    seen_C = np.isfinite(best_CN).all(1)
    found: dict[int, float | None] = {}
    for column, latent in enumerate(latents):
        active_C = best_CN[seen_C, column] > 0
        cosine_C = cosine_CN[seen_C, column]
        enough = min(active_C.sum(), (~active_C).sum()) >= LEAST_ACTIVE
        found[latent] = auroc(cosine_C[active_C].tolist(), cosine_C[~active_C].tolist()).value if enough else None
    return found


def _strongest(sae: TrainedSAE, block: Block, latents: Sequence[int], config: RunConfig) -> torch.Tensor:
    """[contexts of the block, N]: each context's largest activation; -inf where no token is kept."""
    sequences, length = block.tokens_SL.shape
    layout = layout_contexts([(block.seq_T, block.pos_T)], sequences, length, config.judge.context_tokens)
    return max_per_context(sae.encode(block.acts_TD(torch.float32, config.hook.name))[:, list(latents)], layout)
