"""One pass over a corpus, everything that judging needs of every latent, in memory that does not grow with it.

For each latent and each side (`side_of` of the token ids: explaining or scoring) four memories are kept:

- the strongest contexts (TOP);
- a uniform sample of all contexts it is active in, from which the activation quantiles are cut (QUANTILE);
- the inactive contexts with the largest margins (NEAR_MISS);
- a uniform sample of all contexts, one for all latents, of which each takes those it is inactive in (RANDOM).

Samples are the lowest random keys of the texts' token ids (`slots.text_key`). So they do not depend on how the pass
is cut into blocks or its latents into shards, two sources on one corpus see the same random texts, and the samples
of two latents are coordinated: which texts both are active in is known without asking (`siblings`).

What a latent fires on at a token is kept for TOP and QUANTILE contexts only; token ids are kept once per text and
dropped when no latent holds the text any more. Memory is N * slots of both sides, about 32 KB per latent at the
defaults and 32-token contexts, and up to 16 KB of token counts.

Suffixes: T kept tokens of a piece, N latents, S tokens of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_ray.activations.block import Block
from sae_ray.config import JudgingConfig
from sae_ray.errors import UserError
from sae_ray.evidence.slots import BestTexts, SharedSample, text_key
from sae_ray.evidence.statistics import FiringStatistics
from sae_ray.evidence.types import EvidenceSet, LatentSource, Side, side_of

if TYPE_CHECKING:
    from sae_ray.evidence.logit_lens import Unembedding

SIDES: tuple[Side, Side] = ("explain", "score")
# Settling drops rare token ids of latents that fire on very many: it is done at fixed contexts of the pass, so that
# the cut of the blocks does not matter.
_SETTLE_CONTEXTS = 256
_PIECE_ELEMENTS = 1 << 22
_PIECE_TOKENS = 256
_LEAST_SWEEP = 1024


class SideState:
    """What is kept of one side. active_N: contexts each latent is active in; contexts: all of them with kept tokens."""

    def __init__(self, n: int, cfg: JudgingConfig, context_tokens: int) -> None:
        self.contexts = 0
        self.active_N = np.zeros(n, dtype=np.int64)
        self.top = BestTexts(n, cfg.top, np.float32, context_tokens)
        # The strongest are taken out of the sample in the end: so many more are kept.
        self.sample = BestTexts(n, cfg.quantiles * cfg.per_quantile + cfg.top, np.int64, context_tokens)
        self.near = BestTexts(n, cfg.near_misses, np.float32)
        # A latent may be active in three of four and still gets as many as are asked for.
        self.shared = SharedSample(n, 4 * cfg.randoms)

    @property
    def nbytes(self) -> int:
        return self.active_N.nbytes + sum(part.nbytes for part in (self.top, self.sample, self.near, self.shared))

    @staticmethod
    def joined(parts: list[SideState], order: np.ndarray) -> SideState:
        out = SideState.__new__(SideState)
        out.contexts = parts[0].contexts
        out.active_N = np.concatenate([part.active_N for part in parts])[order]
        out.top = BestTexts.joined([part.top for part in parts], order)
        out.sample = BestTexts.joined([part.sample for part in parts], order)
        out.near = BestTexts.joined([part.near for part in parts], order)
        out.shared = SharedSample.joined([part.shared for part in parts], order)
        return out


class EvidenceCollector:
    """Collects over the blocks of a pass, which are given in order, each once.

    Pickles without its source (to be merged or finished elsewhere); it then takes no more blocks.

    Args:
        context_tokens: length of a context; the blocks' sequence length must be a multiple.
        seed: of the texts' keys; collectors that are to be merged or compared need the same.
    """

    def __init__(self, source: LatentSource, cfg: JudgingConfig, context_tokens: int, seed: int) -> None:
        self.source: LatentSource | None = source
        self.kind = source.kind
        self.latents = np.asarray(source.latents, dtype=np.int64)
        self.cfg, self.context_tokens, self.seed = cfg, context_tokens, seed
        n = len(self.latents)
        self.sides: dict[Side, SideState] = {side: SideState(n, cfg, context_tokens) for side in SIDES}
        self.statistics = FiringStatistics(n)
        self.n_tokens = 0
        self.n_sequences = 0
        self._texts: dict[int, np.ndarray] = {}
        self._sweep_at = _LEAST_SWEEP
        self._settled = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "source": None}

    @property
    def n_contexts(self) -> int:
        """With at least one kept token."""
        return sum(side.contexts for side in self.sides.values())

    def text(self, key: int) -> np.ndarray:
        """Token ids int32 [S] of a text that some latent holds."""
        return self._texts[key]

    # ------------------------------------------------------------------ the pass

    def add(self, block: Block, hook: str | None = None) -> None:
        """The next block of the pass, at a hook point (None: the block's first).

        Raises:
            UserError: its sequences are not a whole number of contexts long.
        """
        if self.source is None:
            raise RuntimeError("a merged or unpickled collector takes no more blocks")
        sequences, length = block.tokens_SL.shape
        if length % self.context_tokens:
            raise UserError(
                f"judge.context_tokens = {self.context_tokens}: sequences of {length} tokens are no multiple of it"
            )
        chunks = length // self.context_tokens
        first_context = self.n_sequences * chunks
        tokens_CS = block.tokens_SL.reshape(sequences * chunks, self.context_tokens)
        context_T = block.seq_T.astype(np.int64) * chunks + block.pos_T // self.context_tokens
        offset_T = block.pos_T.astype(np.int64) % self.context_tokens
        acts_TD = block.acts_TD(hook=hook)
        for first, last in self._pieces(context_T, first_context):
            here = slice(first, last)
            group = (first_context + int(context_T[first])) // _SETTLE_CONTEXTS
            if group != self._settled:
                self.statistics.settle()
                self._settled = group
            self._add_piece(acts_TD[here], context_T[here], offset_T[here], tokens_CS, first_context)
        self.n_sequences += sequences
        self.n_tokens += block.n_tokens
        if len(self._texts) >= self._sweep_at:
            self._sweep()

    def _pieces(self, context_T: np.ndarray, first_context: int) -> list[tuple[int, int]]:
        """Ranges of kept tokens of whole contexts, not across a settling, of a bounded number of activations."""
        if not len(context_T):
            return []
        most = max(_PIECE_TOKENS, _PIECE_ELEMENTS // len(self.latents))
        starts = np.flatnonzero(np.diff(context_T, prepend=-1))
        ends = np.append(starts[1:], len(context_T))
        group = (context_T[starts] + first_context) // _SETTLE_CONTEXTS
        out, first = [], 0
        for index in range(1, len(starts) + 1):
            if index == len(starts) or ends[index] - starts[first] > most or group[index] != group[first]:
                out.append((int(starts[first]), int(ends[index - 1])))
                first = index
        return out

    def _add_piece(
        self,
        raw_TD: torch.Tensor,
        context_T: np.ndarray,
        offset_T: np.ndarray,
        tokens_CS: np.ndarray,
        first_context: int,
    ) -> None:
        assert self.source is not None
        f_TN, margin_TN = (value.cpu().numpy() for value in self.source.activations(raw_TD))
        row_P, latent_P = (index.numpy() for index in torch.nonzero(torch.from_numpy(f_TN) > 0, as_tuple=True))
        self.statistics.add(row_P, latent_P, tokens_CS[context_T, offset_T])
        starts = np.flatnonzero(np.diff(context_T, prepend=-1))
        for first, last in zip(starts, np.append(starts[1:], len(context_T)), strict=True):
            context = int(context_T[first])
            self._add_context(
                f_TN[first:last],
                margin_TN[first:last],
                offset_T[first:last],
                tokens_CS[context],
                first_context + context,
            )

    def _add_context(
        self, f_TN: np.ndarray, margin_TN: np.ndarray, offset_T: np.ndarray, tokens_S: np.ndarray, context: int
    ) -> None:
        state = self.sides[side_of(tokens_S)]
        key = text_key(self.seed, tokens_S)
        peak_N = f_TN.max(axis=0)
        margin_N = margin_TN.max(axis=0)
        active = np.flatnonzero(peak_N > 0)
        state.contexts += 1
        state.active_N[active] += 1
        np.maximum(self.statistics.max_N, peak_N, out=self.statistics.max_N)
        seen = key in self._texts

        def acts(who: np.ndarray) -> np.ndarray:
            out = np.zeros((len(who), self.context_tokens), dtype=np.float32)
            out[:, offset_T] = f_TN[:, who].T
            return out

        taken = state.shared.offer(key, context, peak_N, margin_N)
        strong = active if seen else active[peak_N[active] > state.top.floor_N[active]]
        taken |= state.top.offer(strong, peak_N[strong], key, context, seen, margin_N, acts)
        drawn = active[state.sample.floor_N[active] <= -key]
        taken |= state.sample.offer(drawn, np.full(len(drawn), -key), key, context, seen, margin_N, acts)
        close_N = peak_N <= 0
        if not seen:
            close_N &= margin_N > state.near.floor_N
        close = np.flatnonzero(close_N)
        taken |= state.near.offer(close, margin_N[close], key, context, seen)
        if taken and not seen:
            self._texts[key] = tokens_S.copy()

    def _sweep(self) -> None:
        """Forgets the texts that nobody holds."""
        held = [state.shared.key_R for state in self.sides.values()]
        held += [best.key_NK.ravel() for s in self.sides.values() for best in (s.top, s.sample, s.near)]
        live = set(np.unique(np.concatenate([np.unique(keys) for keys in held])).tolist())
        self._texts = {key: tokens_S for key, tokens_S in self._texts.items() if key in live}
        self._sweep_at = max(_LEAST_SWEEP, 2 * len(self._texts))

    def state_bytes(self) -> int:
        """Memory of all that is kept between blocks."""
        entry = 4 * self.context_tokens + 200  # the array's and the dictionary's own share
        kept = sum(side.nbytes for side in self.sides.values())
        return kept + self.statistics.nbytes + entry * len(self._texts)

    # ------------------------------------------------------------------ the end

    def finish(
        self,
        tokenizer: Any,
        W_dec_MD: torch.Tensor | None = None,
        lens: Unembedding | None = None,
        only: Sequence[int] | None = None,
        n_siblings: int = 5,
        n_tokens: int = 10,
    ) -> EvidenceSet:
        """The evidence; the collector may go on or be finished again.

        Args:
            W_dec_MD: decoder rows by latent id, of all latents. Without it siblings are known by co-occurrence only,
                and no output tokens.
            lens: of the subject (`logit_lens.output_logits`), for the promoted and suppressed tokens.
            only: latents whose evidence is wanted; None is all. Siblings are looked for among all collected ones.
            n_siblings: siblings named per latent.
            n_tokens: promoted and suppressed tokens each.
        """
        from sae_ray.evidence.assemble import assemble

        self.statistics.settle()
        return assemble(self, tokenizer, W_dec_MD, lens, only, n_siblings, n_tokens)

    @staticmethod
    def merge(parts: Sequence[EvidenceCollector]) -> EvidenceCollector:
        """One collector of all parts' latents, in ascending order, as if it had made the pass. It can be finished.

        Raises:
            ValueError: the parts are not of one pass, or share a latent.
        """
        first = parts[0]
        for part in parts[1:]:
            for name in ("cfg", "context_tokens", "seed", "kind", "n_tokens", "n_sequences", "n_contexts"):
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(f"collectors of different passes: {name} differs")
        latents = np.concatenate([part.latents for part in parts])
        if len(np.unique(latents)) < len(latents):
            raise ValueError("collectors that share a latent cannot be merged")
        order = np.argsort(latents)
        out = EvidenceCollector.__new__(EvidenceCollector)
        vars(out).update(vars(first))
        out.source = None
        out.latents = latents[order]
        out.sides = {side: SideState.joined([part.sides[side] for part in parts], order) for side in SIDES}
        out.statistics = FiringStatistics.joined([part.statistics for part in parts], order)
        out._texts = {}
        for part in parts:
            out._texts.update(part._texts)
        return out
