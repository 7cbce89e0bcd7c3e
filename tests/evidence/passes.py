"""Small passes whose every activation is known: integers, so that no product rounds and any cut is bitwise equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sae_ray.activations.block import Block
from sae_ray.config import JudgingConfig
from sae_ray.evidence.collect import EvidenceCollector
from sae_ray.evidence.types import LatentSource, Side, side_of

D, S, L = 8, 4, 8  # width, tokens of a context, tokens of a sequence
CFG = JudgingConfig(top=3, quantiles=2, per_quantile=2, near_misses=3, randoms=4, siblings=3, min_contexts=1)


class Rows:
    """Latent n is column n of the input, active above `threshold`."""

    kind = "latent"

    def __init__(self, latents: Sequence[int] = range(D), threshold: float = 2.0) -> None:
        self._latents, self.threshold = np.array(latents, dtype=np.int64), threshold

    @property
    def latents(self) -> np.ndarray:
        return self._latents

    def activations(self, raw_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre_TN = raw_TD[:, torch.from_numpy(self._latents)].float()
        margin_TN = pre_TN - self.threshold
        return torch.where(margin_TN > 0, pre_TN, 0), margin_TN


def make_block(
    tokens_SL: np.ndarray, acts_SLD: np.ndarray, keep_SL: np.ndarray | None = None, number: int = 0
) -> Block:
    keep_SL = tokens_SL >= 0 if keep_SL is None else keep_SL
    seq_T, pos_T = np.nonzero(keep_SL)
    acts_TD = np.ascontiguousarray(acts_SLD[seq_T, pos_T].astype(np.float32))
    columns = {"h": (0, acts_SLD.shape[-1])}
    return Block(number, tokens_SL.astype(np.int32), acts_TD, seq_T.astype(np.int32), pos_T.astype(np.int32), columns)


class Corpus:
    """n sequences of contexts, all different or, if `texts` is small, the same again and again.

    Activations belong to the occurrence or, if `fixed`, to the text.
    """

    def __init__(
        self, n: int, seed: int = 0, texts: int = 10**6, vocabulary: int = 50, scale: float = 1.2, fixed: bool = False
    ) -> None:
        rng = np.random.default_rng(seed)
        pool = rng.integers(0, vocabulary, (min(texts, 4 * n), S))
        which = rng.integers(0, len(pool), n * L // S)
        if texts > len(pool):
            which = np.arange(n * L // S)
        self.tokens = pool[which].reshape(n, L).astype(np.int32)
        acts = np.round(rng.normal(0, scale, (len(pool) if fixed else len(which), S, D)) * 2)
        self.acts = (acts[which] if fixed else acts).reshape(n, L, D)
        self.keep = rng.random((n, L)) < 0.9
        self.n = n

    def blocks(self, size: int) -> list[Block]:
        return [
            make_block(self.tokens[i : i + size], self.acts[i : i + size], self.keep[i : i + size], i)
            for i in range(0, self.n, size)
        ]

    def collect(
        self, size: int = 5, source: LatentSource | None = None, cfg: JudgingConfig = CFG, seed: int = 7
    ) -> EvidenceCollector:
        collector = EvidenceCollector(source or Rows(), cfg, S, seed)
        for block in self.blocks(size):
            collector.add(block)
        return collector

    def occurrences(self, latent: int, side: Side, threshold: float = 2.0) -> list[tuple[int, bytes, float, float]]:
        """Plain reference, one context after the other: (context, text, peak, margin); those without kept tokens
        are left out."""
        out = []
        for context in range(self.n * L // S):
            sequence, chunk = divmod(context, L // S)
            here = slice(chunk * S, chunk * S + S)
            tokens, keep = self.tokens[sequence, here], self.keep[sequence, here]
            if side_of(tokens) != side or not keep.any():
                continue
            pre = float(self.acts[sequence, here][keep, latent].max())
            out.append((context, tokens.tobytes(), pre if pre > threshold else 0.0, pre - threshold))
        return out
