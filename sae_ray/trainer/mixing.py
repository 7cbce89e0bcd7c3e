"""From a window of blocks to batches: a pure function of (seed, window), so that a resumed run repeats it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Cursor(NamedTuple):
    """Where training stands: the next batch is number `batch` of window `window`."""

    window: int
    batch: int


def batch_count(n_tokens: int, batch_tokens: int) -> int:
    """Batches a window of `n_tokens` is cut into: so many that their size is near `batch_tokens`."""
    return max(1, round(n_tokens / batch_tokens)) if n_tokens else 0


def window_batches(window: int, n_tokens: int, batch_tokens: int, seed: int) -> list[torch.Tensor]:
    """Token indices (int64) of each batch of a window.

    The window's tokens, blocks in id order, are permuted and cut into `batch_count` batches whose sizes
    differ by at most one: each token is trained exactly once.
    """
    n_batches = batch_count(n_tokens, batch_tokens)
    if not n_batches:
        return []
    # numpy's seed sequence mixes (seed, window) well; torch generators are correlated for small seeds.
    order = np.random.default_rng([seed % 2**63, window]).permutation(n_tokens)
    return [torch.from_numpy(part) for part in np.array_split(order, n_batches)]


def next_cursor(window: int, batches_done: int, n_batches: int) -> Cursor:
    return Cursor(window + 1, 0) if batches_done >= n_batches else Cursor(window, batches_done)
