"""Latents that lie close by: in decoder direction, and in the contexts they are active in.

Co-occurrence is read off the samples that the collector keeps anyway. They are bottom-k samples under one set of
keys: below the smaller of two latents' largest kept keys, both samples are complete, so which texts both, one or
none of them are active in is known exactly there, and that part of the corpus is a uniform sample of its texts.
Where neither sample has turned a text away it is the whole corpus, and the Jaccard index is exact.

Suffixes: N latents, K slots, D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_ray.evidence.slots import EMPTY, KEY_RANGE, BestTexts

_LAST_KEY = np.iinfo(np.int64).max
_BLOCK_ROWS = 256
_PAIR_BUDGET = 50_000_000  # of (latent, latent, text) triples that the search for co-occurring latents visits


@dataclass(frozen=True)
class TextSample:
    """The texts of one side that latents are active in, by key.

    key_NK: ascending, the largest int64 where empty. below_N: keys below it are all there; the largest int64 where
    the sample has turned none away.
    """

    key_NK: np.ndarray
    below_N: np.ndarray

    @classmethod
    def of(cls, sample: BestTexts) -> TextSample:
        key_NK = np.sort(np.where(sample.key_NK == EMPTY, _LAST_KEY, sample.key_NK), axis=1)
        return cls(key_NK, np.where(sample.full_N, key_NK[:, -1], _LAST_KEY))

    @property
    def distinct_N(self) -> np.ndarray:
        """Texts that each latent is active in: exact, or (K - 1) / largest key."""
        there_N = (self.key_NK != _LAST_KEY).sum(axis=1).astype(np.float64)
        full_N = self.below_N != _LAST_KEY
        return np.where(full_N, (there_N - 1) / np.maximum(share_below(self.below_N), 1e-300), there_N)


def share_below(below: np.ndarray) -> np.ndarray:
    """Share of all texts whose keys are below; 1 for the largest int64."""
    return np.asarray(below, dtype=np.float64) / KEY_RANGE


def nearest_by_decoder(W_dec_ND: torch.Tensor, k: int, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of highest cosine to each row, itself left out: (columns int64 [N, k], cosines float32 [N, k]).

    Blockwise: [block, N] at most is held. k is cut to N - 1. A zero row is at cosine 0 to all.
    """
    unit_ND = torch.nn.functional.normalize(W_dec_ND.float(), dim=1)
    k = min(k, len(unit_ND) - 1)
    columns, cosines = [], []
    for first in range(0, len(unit_ND), block):
        cosine_BN = unit_ND[first : first + block] @ unit_ND.T
        rows = torch.arange(len(cosine_BN), device=cosine_BN.device)
        cosine_BN[rows, rows + first] = -torch.inf
        best = cosine_BN.topk(k, dim=1)
        columns.append(best.indices.cpu().numpy())
        cosines.append(best.values.clamp(-1, 1).cpu().numpy())
    return np.concatenate(columns), np.concatenate(cosines)


def jaccard(samples: Sequence[TextSample], column: int, others: np.ndarray) -> np.ndarray:
    """Share of the texts that a latent or another one is active in, in which both are: float64 [others].

    NaN where neither is known to be active anywhere.
    """
    both, either = np.zeros(len(others)), np.zeros(len(others))
    for sample in samples:
        below_n = np.minimum(sample.below_N[others], sample.below_N[column])
        mine_K, theirs_nK = sample.key_NK[column], sample.key_NK[others]
        place_nK = np.searchsorted(mine_K, theirs_nK).clip(max=len(mine_K) - 1)
        inside_nK = theirs_nK < below_n[:, None]
        shared_n = ((mine_K[place_nK] == theirs_nK) & inside_nK).sum(axis=1)
        scale_n = 1 / np.maximum(share_below(below_n), 1e-300)
        both += shared_n * scale_n
        either += (np.searchsorted(mine_K, below_n) + inside_nK.sum(axis=1) - shared_n) * scale_n
    return np.divide(both, either, out=np.full(len(others), np.nan), where=either > 0)


def nearest_by_cooccurrence(samples: Sequence[TextSample], k: int) -> list[np.ndarray]:
    """Per latent the columns, at most k, that share the most texts with it by (estimated) Jaccard index.

    Only latents with a common text are visited. Where the corpus is small for so many latents, a sample of its
    texts (the lowest keys) is searched.
    """
    n = len(samples[0].below_N)
    distinct_N = np.sum([sample.distinct_N for sample in samples], axis=0)
    postings = [_Postings.of(sample) for sample in samples]
    out: list[np.ndarray] = []
    for first in range(0, n, _BLOCK_ROWS):
        last = min(n, first + _BLOCK_ROWS)
        both_BN = np.zeros((last - first, n))
        for sample, texts in zip(samples, postings, strict=True):
            below_BN = np.minimum(np.minimum(sample.below_N[first:last, None], sample.below_N), texts.below)
            both_BN += texts.together(first, last, n) / np.maximum(share_below(below_BN), 1e-300)
        rows = np.arange(last - first)
        both_BN[rows, rows + first] = 0
        either_BN = np.maximum(distinct_N[first:last, None] + distinct_N - both_BN, both_BN)
        score_BN = np.divide(both_BN, either_BN, out=np.zeros_like(both_BN), where=either_BN > 0)
        best_Bk = np.argsort(-score_BN, axis=1, kind="stable")[:, :k]
        out += [best[row[best] > 0] for best, row in zip(best_Bk, score_BN, strict=True)]
    return out


@dataclass(frozen=True)
class _Postings:
    """For each text the latents that are active in it, and the reverse; only of texts with keys below `below`."""

    latent_start: np.ndarray  # [N + 1] into text_of
    text_of: np.ndarray
    text_start: np.ndarray  # [texts + 1] into latent_of
    latent_of: np.ndarray
    below: int

    @classmethod
    def of(cls, sample: TextSample) -> _Postings:
        latent_P, slot_P = np.nonzero(sample.key_NK != _LAST_KEY)
        keys, text_P, size = np.unique(sample.key_NK[latent_P, slot_P], return_inverse=True, return_counts=True)
        n_texts = int(np.searchsorted(np.cumsum(size.astype(np.float64) ** 2), _PAIR_BUDGET, side="right"))
        below = _LAST_KEY if n_texts == len(keys) else int(keys[n_texts])
        keep_P = text_P < n_texts
        latent_P, text_P = latent_P[keep_P], text_P[keep_P]
        by_text = np.argsort(text_P, kind="stable")
        return cls(
            np.searchsorted(latent_P, np.arange(len(sample.below_N) + 1)),
            text_P,
            np.searchsorted(text_P[by_text], np.arange(n_texts + 1)),
            latent_P[by_text],
            below,
        )

    def together(self, first: int, last: int, n: int) -> np.ndarray:
        """Texts that latents [first, last) share with each of n: [last - first, n]."""
        entries = slice(self.latent_start[first], self.latent_start[last])
        text_E = self.text_of[entries]
        row_E = np.repeat(np.arange(last - first), np.diff(self.latent_start[first : last + 1]))
        size_E = self.text_start[text_E + 1] - self.text_start[text_E]
        ends_E = np.cumsum(size_E)
        inside = np.arange(ends_E[-1] if len(ends_E) else 0) - np.repeat(ends_E - size_E, size_E)
        latent = self.latent_of[np.repeat(self.text_start[text_E], size_E) + inside]
        return np.bincount(np.repeat(row_E, size_E) * n + latent, minlength=(last - first) * n).reshape(-1, n)


def find_siblings(
    samples: Sequence[TextSample], W_dec_ND: torch.Tensor | None, k: int
) -> list[list[tuple[int, float, float]]]:
    """Per latent at most k (column, decoder cosine, Jaccard index), closest first: by the larger of the two.

    Candidates are the k nearest by decoder and the k that co-occur most. The cosine is NaN without decoder rows.
    """
    n = len(samples[0].below_N)
    together = nearest_by_cooccurrence(samples, k)
    unit_ND, near_Nk = None, np.empty((n, 0), dtype=np.int64)
    if W_dec_ND is not None:
        near_Nk = nearest_by_decoder(W_dec_ND, k)[0]
        unit_ND = torch.nn.functional.normalize(W_dec_ND.float(), dim=1).cpu().numpy()
    out = []
    for column in range(n):
        others = np.union1d(near_Nk[column], together[column]).astype(np.int64)
        overlap = jaccard(samples, column, others)
        cosine = np.full(len(others), np.nan) if unit_ND is None else unit_ND[others] @ unit_ND[column]
        closeness = np.fmax(cosine, np.nan_to_num(overlap))
        best = np.lexsort((others, -closeness))[:k]
        out.append([(int(others[b]), float(cosine[b]), float(overlap[b])) for b in best])
    return out


@dataclass(frozen=True)
class SiblingTexts:
    """Texts of one side in which a sibling is active and the latent is not: slots of the sibling's sample, lowest
    key first, and how many contexts of the corpus they stand for (an estimate unless the samples are complete)."""

    sibling: int
    slots: np.ndarray
    contexts: float


def sibling_texts(
    sample: BestTexts, keys: TextSample, column: int, siblings: Sequence[int], taken: set[int]
) -> list[SiblingTexts]:
    """What a latent may be contrasted with. A text in which several siblings are active belongs to the closest.

    Only texts with keys below all their and its own largest kept keys are used: there, not to be in the latent's
    sample is to be inactive.

    Args:
        siblings: columns, closest first.
        taken: keys of texts that are used otherwise, or in which the latent is known to be active.
    """
    if not len(siblings):
        return []
    below = int(min(keys.below_N[column], keys.below_N[list(siblings)].min()))
    rate = float(share_below(np.array(below)))
    used = {EMPTY, *taken, *sample.key_NK[column].tolist()}
    out = []
    for sibling in siblings:
        free = [(k, slot) for slot, k in enumerate(sample.key_NK[sibling].tolist()) if k < below and k not in used]
        if not free:
            continue
        free.sort()
        used.update(k for k, _ in free)
        slots = np.array([slot for _, slot in free])
        out.append(SiblingTexts(sibling, slots, float(sample.times_NK[sibling, slots].sum()) / rate))
    return out
