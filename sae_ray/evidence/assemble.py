"""From what a collector holds to the evidence of each latent: strata, weights, siblings, output tokens.

The weights of a side's positives add up to the contexts that the latent is active in there, those of its negatives
to the contexts that it is not:

- TOP and NEAR_MISS are kept for certain: each stands for its own occurrences.
- QUANTILE: the sample without TOP is a uniform sample of all other active texts. Sorted by activation it is cut into
  equal groups; each group stands for its share of those contexts, each text for its part of the group by its
  occurrences.
- SIBLING: texts with one of the siblings active and the latent not; how many contexts that is comes from the
  coordinated samples (`siblings.sibling_texts`).
- RANDOM: all other inactive contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_ray.errors import UserError
from sae_ray.evidence.examples import allot
from sae_ray.evidence.logit_lens import Unembedding, output_tokens
from sae_ray.evidence.siblings import TextSample, find_siblings, sibling_texts
from sae_ray.evidence.slots import EMPTY, BestTexts
from sae_ray.evidence.types import (
    NEAR_MISS,
    QUANTILE,
    RANDOM,
    SIBLING,
    TOP,
    Contexts,
    EvidenceSet,
    Example,
    LatentEvidence,
    Side,
)

if TYPE_CHECKING:
    from sae_ray.evidence.collect import EvidenceCollector, SideState


def assemble(
    collector: EvidenceCollector,
    tokenizer: Any,
    W_dec_MD: torch.Tensor | None,
    lens: Unembedding | None,
    only: Sequence[int] | None,
    n_siblings: int,
    n_tokens: int,
) -> EvidenceSet:
    """See `EvidenceCollector.finish`."""
    latents, cfg = collector.latents, collector.cfg
    columns = np.arange(len(latents)) if only is None else _columns(latents, only)
    active_N = np.sum([side.active_N for side in collector.sides.values()], axis=0)
    skipped = {int(latents[c]): _skipped(collector, int(c), int(active_N[c])) for c in columns}
    skipped = {latent: why for latent, why in skipped.items() if why}
    columns = np.array([c for c in columns if int(latents[c]) not in skipped], dtype=np.int64)

    W_dec_ND = None if W_dec_MD is None else _decoder_rows(W_dec_MD, latents)
    orders = {side: state.shared.by_key().tolist() for side, state in collector.sides.items()}
    keys = {side: TextSample.of(state.sample) for side, state in collector.sides.items()}
    near = find_siblings(list(keys.values()), W_dec_ND, min(n_siblings, len(latents) - 1))
    promoted: list[tuple[tuple[tuple[str, float], ...], ...]] = [((), ())] * len(columns)
    if lens is not None and W_dec_ND is not None:
        promoted = list(output_tokens(W_dec_ND[torch.from_numpy(columns)], lens, tokenizer, n_tokens))

    found: dict[int, LatentEvidence] = {}
    tokens: dict[int, np.ndarray] = {}
    for column, (adds, removes) in zip(columns.tolist(), promoted, strict=True):
        siblings = near[column]
        sides: dict[Side, tuple[Example, ...]] = {}
        for side, state in collector.sides.items():
            builder = _SideBuilder(collector, state, keys[side], column, [s[0] for s in siblings], orders[side], tokens)
            sides[side] = (*builder.positives(cfg.quantiles, cfg.per_quantile), *builder.negatives())
        statistics = collector.statistics
        profile = statistics.profile(column)
        found[int(latents[column])] = LatentEvidence(
            int(latents[column]),
            float(statistics.firings_N[column] / collector.n_tokens),
            float(active_N[column] / collector.n_contexts),
            float(statistics.max_N[column]),
            profile.entropy,
            profile.unigram_share,
            profile.top,
            adds,
            removes,
            tuple((int(latents[c]), cosine, overlap) for c, cosine, overlap in siblings),
            sides["explain"],
            sides["score"],
        )
    return EvidenceSet(found, Contexts(tokens, tokenizer), collector.n_tokens, collector.n_contexts, skipped)


class _SideBuilder:
    """Examples of one latent on one side. What is used once (by key) is not used again."""

    def __init__(
        self,
        collector: EvidenceCollector,
        state: SideState,
        keys: TextSample,
        column: int,
        siblings: list[int],
        shared_order: list[int],
        tokens: dict[int, np.ndarray],
    ) -> None:
        self.collector, self.state, self.keys, self.column = collector, state, keys, column
        self.siblings, self.shared_order, self.tokens = siblings, shared_order, tokens
        self.silent_S = np.zeros(collector.context_tokens, dtype=np.float32)
        self.silent_S.flags.writeable = False
        self.top_keys = {EMPTY, *state.top.key_NK[column].tolist()}
        self.active_keys = self.top_keys | set(state.sample.key_NK[column].tolist())

    def positives(self, quantiles: int, per_quantile: int) -> list[Example]:
        j, top, sample = self.column, self.state.top, self.state.sample
        n_active = float(self.state.active_N[j])
        strongest = top.held(j)
        rest = np.array(
            [s for s, k in enumerate(sample.key_NK[j].tolist()) if k not in {*self.top_keys, EMPTY}], dtype=int
        )
        times = top.times_NK[j, strongest].astype(np.float64)
        n_rest = n_active - times.sum()
        if len(strongest) and (n_rest <= 0 or not len(rest)):
            times *= n_active / times.sum()
            n_rest = 0.0
        out = [self._example(top, slot, TOP, weight) for slot, weight in zip(strongest, times, strict=True)]
        if n_rest <= 0:
            return out
        peak_r = sample.acts_NKS[j, rest].max(axis=1)  # type: ignore[index]
        rest = rest[np.lexsort((sample.context_NK[j, rest], peak_r))]
        all_times = float(sample.times_NK[j, rest].sum())
        for quantile, group in enumerate(np.array_split(rest, min(quantiles, len(rest)))):
            stands_for = n_rest * float(sample.times_NK[j, group].sum()) / all_times
            chosen = group[np.argsort(sample.key_NK[j, group])][:per_quantile]
            weights = stands_for * sample.times_NK[j, chosen] / sample.times_NK[j, chosen].sum()
            out += [
                self._example(sample, slot, QUANTILE, weight, quantile)
                for slot, weight in zip(chosen, weights, strict=True)
            ]
        return out

    def negatives(self) -> list[Example]:
        j, cfg, near, shared = self.column, self.collector.cfg, self.state.near, self.state.shared
        near_keys = near.key_NK[j].tolist()
        close = [slot for slot in near.held(j).tolist() if near_keys[slot] not in self.active_keys]
        out = [self._example(near, slot, NEAR_MISS, float(near.times_NK[j, slot])) for slot in close]
        used = self.active_keys | set(near_keys)
        remaining = float(self.state.contexts - self.state.active_N[j]) - sum(example.weight for example in out)

        groups = []
        if cfg.siblings:
            groups = sibling_texts(self.state.sample, self.keys, j, self.siblings, used)
        free_R = np.isfinite(shared.margin_RN[:, j])
        if groups:
            free_R &= ~np.isnan(shared.margin_RN[:, self.siblings]).any(axis=1)
            used.update(k for g in groups for k in self.state.sample.key_NK[g.sibling, g.slots].tolist())
        keys_R = shared.key_R.tolist()
        rows = [row for row in self.shared_order if free_R[row] and keys_R[row] not in used][: cfg.randoms]

        n_random = float(shared.times_R[rows].sum())
        pool = sum(group.contexts for group in groups)
        # An estimate of a part may come out above the whole.
        scale = 1.0 if pool <= remaining - n_random else max(remaining - n_random, 1.0) / pool
        if groups and not len(rows):
            scale = max(remaining, 1.0) / pool
        counts = allot([len(group.slots) for group in groups], cfg.siblings)
        # With fewer places than siblings, those that got one stand for the others' contexts too.
        dealt = sum(group.contexts for group, count in zip(groups, counts, strict=True) if count)
        for group, count in zip(groups, counts, strict=True):
            if count:
                stands_for = group.contexts * scale * pool / dealt
                out += self._of_sibling(group.sibling, group.slots[:count], stands_for)
        far = max(remaining - pool * scale, n_random)
        for row in rows:
            context = self._refer(int(shared.key_R[row]), int(shared.context_R[row]))
            weight, margin = far * float(shared.times_R[row]) / n_random, float(shared.margin_RN[row, j])
            out.append(Example(context, self.silent_S, RANDOM, weight, margin=margin))
        return out

    def _of_sibling(self, sibling: int, slots: np.ndarray, stands_for: float) -> list[Example]:
        sample, latent = self.state.sample, int(self.collector.latents[sibling])
        times = sample.times_NK[sibling, slots]
        out = []
        for slot, share in zip(slots, times / max(1, times.sum()), strict=True):
            context = self._refer(int(sample.key_NK[sibling, slot]), int(sample.context_NK[sibling, slot]))
            weight = stands_for * float(share)
            # What its margin was is not kept: it is not known, and NaN says so.
            out.append(Example(context, self.silent_S, SIBLING, weight, margin=float("nan"), sibling=latent))
        return out

    def _example(self, best: BestTexts, slot: int, stratum: str, weight: float, quantile: int = -1) -> Example:
        at = self.column, slot
        context = self._refer(int(best.key_NK[at]), int(best.context_NK[at]))
        if best.acts_NKS is None or best.margin_NK is None:  # near misses: the margin is what they are ranked by
            return Example(context, self.silent_S, stratum, float(weight), quantile, float(best.score_NK[at]))
        acts_S, margin = best.acts_NKS[at].copy(), float(best.margin_NK[at])
        return Example(context, acts_S, stratum, float(weight), quantile, margin)

    def _refer(self, key: int, context: int) -> int:
        self.tokens[context] = self.collector.text(key)
        return context


def _skipped(collector: EvidenceCollector, column: int, n_active: int) -> str:
    """Why a latent is not judged; empty if it is."""
    if not n_active:
        return "dead"
    if n_active < collector.cfg.min_contexts:
        return f"{n_active} active contexts"
    for side, purpose in (("explain", "explaining"), ("score", "scoring")):
        if not collector.sides[side].active_N[column]:  # type: ignore[index]
            return f"none of its {n_active} active contexts is for {purpose}"
    return ""


def _columns(latents: np.ndarray, only: Sequence[int]) -> np.ndarray:
    place = {int(latent): column for column, latent in enumerate(latents)}
    missing = [int(latent) for latent in only if int(latent) not in place]
    if missing:
        raise UserError(f"latents: no evidence was collected of {missing[0]} ({len(missing)} in all)")
    return np.array([place[int(latent)] for latent in only], dtype=np.int64)


def _decoder_rows(W_dec_MD: torch.Tensor, latents: np.ndarray) -> torch.Tensor:
    if len(W_dec_MD) <= int(latents.max()):
        raise UserError(f"the decoder has {len(W_dec_MD)} rows, and latent {int(latents.max())} is collected")
    return W_dec_MD[torch.from_numpy(latents).to(W_dec_MD.device)]
