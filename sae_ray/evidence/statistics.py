"""How often, how strongly and on which token ids every latent fires, in bounded memory.

Suffixes: T tokens, N latents, P pairs of a latent and a token id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DISTINCT = 1024
TOP_TOKENS = 10


@dataclass(frozen=True)
class TokenProfile:
    """On which token ids one latent fires.

    entropy: nats, NaN where it never fires. unigram_share: of the commonest id. lost_share: of firings whose id is
    not in the table: no share is too low by more than it. top: (token id, share of firings), commonest first.
    """

    entropy: float
    unigram_share: float
    lost_share: float
    top: tuple[tuple[int, float], ...]


class FiringStatistics:
    """Counts of firings, and of firings per (latent, token id).

    The counts per id are exact for a latent that fires on at most `distinct` different ids. Of others the
    commonest so far are kept at every settling, and how many firings were dropped is known (`lost_N`): a
    count is too low by that at most. Their entropy takes the dropped firings for ids as common as the rarest kept
    one. It is then an estimate: with a share p dropped, within p ln(V) - p ln(p) - (1 - p) ln(1 - p) of the truth,
    V ids (Audenaert's inequality, for at most p of the probability is misplaced).
    """

    def __init__(self, n: int, distinct: int = DISTINCT) -> None:
        self.distinct = distinct
        self.firings_N = np.zeros(n, dtype=np.int64)
        self.max_N = np.zeros(n, dtype=np.float32)
        self.lost_N = np.zeros(n, dtype=np.int64)
        self._code_P = np.zeros(0, dtype=np.int64)  # latent << 32 | token id, ascending
        self._count_P = np.zeros(0, dtype=np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, row_P: np.ndarray, latent_P: np.ndarray, token_T: np.ndarray) -> None:
        """Firings of some tokens: pairs of a row of `token_T` and a column."""
        self.firings_N += np.bincount(latent_P, minlength=len(self.firings_N))
        code_P = latent_P.astype(np.int64) << 32 | token_T[row_P].astype(np.int64)
        self._waiting.append(np.unique(code_P, return_counts=True))

    def settle(self) -> None:
        """Folds in what was added. To be called at places that depend on the corpus only: dropping depends on it."""
        if not self._waiting:
            return
        code_P = np.concatenate([self._code_P, *(code for code, _ in self._waiting)])
        count_P = np.concatenate([self._count_P, *(count for _, count in self._waiting)])
        self._waiting = []
        order_P = np.argsort(code_P, kind="stable")
        code_P, count_P = code_P[order_P], count_P[order_P]
        first_P = np.flatnonzero(np.diff(code_P, prepend=-1))
        self._code_P = code_P[first_P]
        self._count_P = np.add.reduceat(count_P, first_P) if len(first_P) else count_P[:0]
        latent_P = self._code_P >> 32
        size_N = np.bincount(latent_P, minlength=len(self.firings_N))
        if size_N.max(initial=0) <= self.distinct:
            return
        order_P = np.lexsort((self._code_P, -self._count_P, latent_P))
        rank_P = np.empty(len(order_P), dtype=np.int64)
        rank_P[order_P] = np.arange(len(order_P)) - np.repeat(np.cumsum(size_N) - size_N, size_N)
        keep_P = rank_P < self.distinct
        lost = np.bincount(latent_P[~keep_P], self._count_P[~keep_P], minlength=len(self.firings_N))
        self.lost_N = self.lost_N + lost.astype(np.int64)  # not in place: it may be a read-only page of Ray's
        self._code_P, self._count_P = self._code_P[keep_P], self._count_P[keep_P]

    def profile(self, column: int) -> TokenProfile:
        """Settled counts of one latent."""
        first, last = np.searchsorted(self._code_P, [column << 32, column + 1 << 32])
        count_P, token_P = self._count_P[first:last], self._code_P[first:last] & 0xFFFFFFFF
        total, lost = int(self.firings_N[column]), int(self.lost_N[column])
        if not total:
            return TokenProfile(float("nan"), float("nan"), float("nan"), ())
        share_P = count_P / total
        entropy = float(-(share_P * np.log(share_P)).sum())
        if lost:
            entropy -= lost / total * float(np.log(count_P.min() / total))
        order = np.lexsort((token_P, -count_P))[:TOP_TOKENS]
        top = tuple((int(token_P[p]), float(share_P[p])) for p in order)
        return TokenProfile(abs(entropy), top[0][1], lost / total, top)

    @property
    def nbytes(self) -> int:
        waiting = sum(code.nbytes + count.nbytes for code, count in self._waiting)
        return waiting + sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    @staticmethod
    def joined(parts: list[FiringStatistics], order: np.ndarray) -> FiringStatistics:
        """Of all parts' latents, in `order`; every part is settled by this."""
        out = FiringStatistics(len(order), parts[0].distinct)
        for name in ("firings_N", "max_N", "lost_N"):
            setattr(out, name, np.concatenate([getattr(part, name) for part in parts])[order])
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        codes, offset = [], 0
        for part in parts:
            part.settle()
            latent_P = place[(part._code_P >> 32) + offset]
            codes.append(latent_P << 32 | part._code_P & 0xFFFFFFFF)
            offset += len(part.firings_N)
        code_P = np.concatenate(codes)
        order_P = np.argsort(code_P, kind="stable")
        out._code_P = code_P[order_P]
        out._count_P = np.concatenate([part._count_P for part in parts])[order_P]
        return out
