"""MiniLM's detection over every held-out text that had no part in an explanation, and how much labels would tell it.

The scorer `embedding` draws a few texts per latent; its AUROC has a standard error of a tenth. An embedding per text
serves all latents of all SAEs, so here each text is asked about each latent, at its natural frequency.

In place of the explanation's vector, LDA's direction between the texts of another split on which the latent is active
and those on which it is not shows what the best explanation could come to with this embedding, about.
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
from sae_ray.reward.credit.whitening import whitener
from sae_ray.reward.evidence import layout_contexts, max_per_context
from sae_ray.sae.inference import TrainedSAE

LEAST_ACTIVE = 8  # texts, for an AUROC and for a direction
RIDGE = 0.1  # of the embedding's mean variance: it has 384 dimensions, and a direction a few hundred texts


class Texts(NamedTuple):
    """Some contexts of blocks: their ids, int64 [C], and unit vectors [C, E]."""

    context_C: np.ndarray
    vector_CE: np.ndarray


def embedded(blocks: Sequence[Block], config: RunConfig, model: MiniLM, every: bool = False) -> Texts:
    """Contexts that no explainer saw and that chose no explanation, or `every` context."""
    tokenizer, size = load_tokenizer(config.model), config.judge.context_tokens
    tokens_CS = np.concatenate([np.asarray(block.tokens_SL).reshape(-1, size) for block in blocks])
    own = [c for c, row in enumerate(tokens_CS) if every or (side_of(row) == "score" and not chooses_explanation(row))]
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
    active_CN, vector_CE = _active(sae, latents, blocks, texts, config)
    wanted_NE = model.embed_now([explanations[latent] for latent in latents])
    return {latent: _told(active_CN[:, n], vector_CE @ wanted_NE[n]) for n, latent in enumerate(latents)}


def ceilings(
    sae: TrainedSAE,
    latents: Sequence[int],
    labelled: tuple[Sequence[Block], Texts],
    scored: tuple[Sequence[Block], Texts],
    config: RunConfig,
) -> dict[int, float | None]:
    """latent -> AUROC on the `scored` texts of the direction that tells its active texts among the `labelled` ones."""
    label_CN, known_CE = _active(sae, latents, *labelled, config)
    active_CN, vector_CE = _active(sae, latents, *scored, config)
    inverse_EE = whitener(torch.tensor(known_CE, dtype=torch.float64), RIDGE)[2].numpy()
    found: dict[int, float | None] = {}
    for n, latent in enumerate(latents):
        label_C = label_CN[:, n]
        if min(label_C.sum(), (~label_C).sum()) < LEAST_ACTIVE:
            found[latent] = None
            continue
        direction_E = inverse_EE @ (known_CE[label_C].mean(0) - known_CE[~label_C].mean(0))
        found[latent] = _told(active_CN[:, n], vector_CE @ direction_E)
    return found


def _told(active_C: np.ndarray, score_C: np.ndarray) -> float | None:
    if min(active_C.sum(), (~active_C).sum()) < LEAST_ACTIVE:
        return None
    return auroc(score_C[active_C].tolist(), score_C[~active_C].tolist()).value


def _active(
    sae: TrainedSAE, latents: Sequence[int], blocks: Sequence[Block], texts: Texts, config: RunConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Which latents are active where, bool [C, N], and the vectors [C, E], of the texts that have tokens that count."""
    best_CN = torch.cat([_strongest(sae, block, latents, config) for block in blocks]).numpy()[texts.context_C]
    seen_C = np.isfinite(best_CN).all(1)
    return best_CN[seen_C] > 0, texts.vector_CE[seen_C]


def _strongest(sae: TrainedSAE, block: Block, latents: Sequence[int], config: RunConfig) -> torch.Tensor:
    """[contexts of the block, N]: each context's largest activation; -inf where no token is kept."""
    sequences, length = block.tokens_SL.shape
    layout = layout_contexts([(block.seq_T, block.pos_T)], sequences, length, config.judge.context_tokens)
    return max_per_context(sae.encode(block.acts_TD(torch.float32, config.hook.name))[:, list(latents)], layout)
