"""Bounded memories of a pass: the best few texts of every latent, and one random sample of texts that all share.

A text is known by its key, a random 63-bit number that is a pure function of (seed, token ids). Texts with equal
token ids have equal keys, so a text is held once and its occurrences are counted; and the texts with the lowest keys
are a uniform sample of the distinct texts (bottom-k), the same in whatever pieces the pass comes.

Suffixes: N latents, K slots, S tokens of a context, n latents of one call, R shared slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

KEY_RANGE = float(1 << 63)
EMPTY = -1


def text_key(seed: int, tokens_S: np.ndarray) -> int:
    """In [0, 2^63)."""
    digest = hashlib.blake2b(
        np.ascontiguousarray(tokens_S, dtype=np.int32).tobytes(),
        digest_size=8,
        key=(seed & (1 << 64) - 1).to_bytes(8, "little"),
    )
    return int.from_bytes(digest.digest(), "little") >> 1


class BestTexts:
    """Per latent the K distinct texts of the highest score; of equal scores the earlier context.

    A text that occurs several times counts with its best occurrence, which is the context that is kept. Exact over
    the whole pass: a text that is not held cannot come back with a score that it already had.

    Attributes:
        score_NK: of `dtype`; the least one of that type in empty slots. key_NK, context_NK: int64, -1 where empty.
        times_NK: int32, occurrences seen while held (all of them where the score is the same each time).
        acts_NKS, margin_NK: float32, of the context that is kept; None without `context_tokens`.
    """

    def __init__(self, n: int, slots: int, dtype: type, context_tokens: int | None = None) -> None:
        self.least = -np.inf if np.issubdtype(dtype, np.floating) else np.iinfo(np.int64).min
        self.score_NK: np.ndarray = np.full((n, slots), self.least, dtype=dtype)
        self.key_NK = np.full((n, slots), EMPTY, dtype=np.int64)
        self.context_NK = np.full((n, slots), EMPTY, dtype=np.int64)
        self.times_NK = np.zeros((n, slots), dtype=np.int32)
        self.acts_NKS = self.margin_NK = None
        if context_tokens is not None:
            self.acts_NKS = np.zeros((n, slots, context_tokens), dtype=np.float32)
            self.margin_NK = np.zeros((n, slots), dtype=np.float32)
        self._floor_N: np.ndarray = np.full(n, self.least if slots else self._most(dtype), dtype=dtype)
        self._weak_N = np.zeros(n, dtype=np.int64)

    @staticmethod
    def _most(dtype: type) -> float:
        return np.inf if np.issubdtype(dtype, np.floating) else np.iinfo(np.int64).max

    @property
    def floor_N(self) -> np.ndarray:
        """What a text must score more than to get in."""
        return self._floor_N

    @property
    def full_N(self) -> np.ndarray:
        """bool: texts may have been turned away."""
        return (self.key_NK != EMPTY).all(axis=1)

    def offer(
        self,
        who_n: np.ndarray,
        score_n: np.ndarray,
        key: int,
        context: int,
        seen: bool,
        margin_N: np.ndarray | None = None,
        acts: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> bool:
        """One text, to the latents `who_n`; returns whether any took it.

        Args:
            seen: whether some latent may hold the text already; False saves the look.
            margin_N: of all latents, and `acts`, which gives the activations [n, S] of some: for those that take it.
        """
        if not self.key_NK.shape[1]:
            return False
        better_n = score_n > self._floor_N[who_n]
        if seen:
            match_nK = self.key_NK[who_n] == key
            held_n = match_nK.any(axis=1)
            if held_n.any():
                better_n &= ~held_n
                who, slot, score = who_n[held_n], match_nK[held_n].argmax(axis=1), score_n[held_n]
                self.times_NK[who, slot] += 1
                rises = score > self.score_NK[who, slot]
                self._write(who[rises], slot[rises], score[rises], key, context, margin_N, acts)
        who = who_n[better_n]
        slot = self._weak_N[who]
        self.times_NK[who, slot] = 1
        self._write(who, slot, score_n[better_n], key, context, margin_N, acts)
        return bool(len(who))

    def _write(
        self,
        who: np.ndarray,
        slot: np.ndarray,
        score: np.ndarray,
        key: int,
        context: int,
        margin_N: np.ndarray | None,
        acts: Callable[[np.ndarray], np.ndarray] | None,
    ) -> None:
        if not len(who):
            return
        self.score_NK[who, slot] = score
        self.key_NK[who, slot] = key
        self.context_NK[who, slot] = context
        if self.acts_NKS is not None and self.margin_NK is not None and acts is not None and margin_N is not None:
            self.acts_NKS[who, slot] = acts(who)
            self.margin_NK[who, slot] = margin_N[who]
        score_nK = self.score_NK[who]
        floor_n = score_nK.min(axis=1)
        self._floor_N[who] = floor_n
        self._weak_N[who] = np.where(score_nK == floor_n[:, None], self.context_NK[who], -2).argmax(axis=1)

    def held(self, column: int) -> np.ndarray:
        """Slots of one latent that hold a text, best first."""
        slots = np.flatnonzero(self.key_NK[column] != EMPTY)
        return slots[np.lexsort((self.context_NK[column, slots], -self.score_NK[column, slots]))]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    @staticmethod
    def joined(parts: list[BestTexts], order: np.ndarray) -> BestTexts:
        """Of all parts' latents, in `order`."""
        out = BestTexts.__new__(BestTexts)
        for name, value in vars(parts[0]).items():
            if isinstance(value, np.ndarray):
                value = np.concatenate([getattr(part, name) for part in parts])[order]
            setattr(out, name, value)
        return out


class SharedSample:
    """The R distinct texts of the lowest keys among all, and how every latent responds to them.

    Attributes:
        key_R, context_R: int64, -1 where empty. times_R: int32, occurrences, all of them.
        margin_RN: float32, the largest of a text's occurrences; NaN where the latent is active in one of them.
    """

    def __init__(self, n: int, slots: int) -> None:
        self.key_R = np.full(slots, EMPTY, dtype=np.int64)
        self.context_R = np.full(slots, EMPTY, dtype=np.int64)
        self.times_R = np.zeros(slots, dtype=np.int32)
        self.margin_RN = np.full((slots, n), np.nan, dtype=np.float32)

    def offer(self, key: int, context: int, peak_N: np.ndarray, margin_N: np.ndarray) -> bool:
        """One text with its largest activations and margins; returns whether it is held now and was not before."""
        if not len(self.key_R):
            return False
        quiet_N = np.where(peak_N > 0, np.nan, margin_N)
        there = np.flatnonzero(self.key_R == key)
        if len(there):
            row = int(there[0])
            self.times_R[row] += 1
            self.margin_RN[row] = np.maximum(self.margin_RN[row], quiet_N)  # NaN wins
            return False
        empty = np.flatnonzero(self.key_R == EMPTY)
        row = int(empty[0]) if len(empty) else int(self.key_R.argmax())
        if not len(empty) and key > self.key_R[row]:
            return False
        self.key_R[row], self.context_R[row], self.times_R[row] = key, context, 1
        self.margin_RN[row] = quiet_N
        return True

    def by_key(self) -> np.ndarray:
        """Slots that hold a text, lowest key first."""
        slots = np.flatnonzero(self.key_R != EMPTY)
        return slots[np.argsort(self.key_R[slots])]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values())

    @staticmethod
    def joined(parts: list[SharedSample], order: np.ndarray) -> SharedSample:
        out = SharedSample(0, 0)
        out.key_R, out.context_R, out.times_R = parts[0].key_R, parts[0].context_R, parts[0].times_R
        out.margin_RN = np.concatenate([part.margin_RN for part in parts], axis=1)[:, order]
        return out
