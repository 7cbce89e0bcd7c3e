"""A block: the activations of some sequences, as it lies in Ray's object store."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_ray.corpus.reader import TokenBlock


@dataclass(frozen=True)
class Block:
    """The kept tokens of S sequences of L tokens, in (sequence, position) order.

    block_id: number within its split. tokens_SL: int32, -1 is padding. acts: float32, or uint16 holding
    bfloat16 bits, [T, sum of the hook points' widths]. seq_T, pos_T: int32, where each kept token stands in
    tokens_SL. columns: hook name -> (first, last) of its columns in `acts`; the run's main input comes first.
    """

    block_id: int
    tokens_SL: np.ndarray
    acts: np.ndarray
    seq_T: np.ndarray
    pos_T: np.ndarray
    columns: dict[str, tuple[int, int]]

    @classmethod
    def from_activations(cls, block_id: int, tokens: TokenBlock, acts: Mapping[str, Tensor]) -> Block:
        """Keep what lies at `tokens.keep_SL` of each hook point's [S, L, D] (float16 is widened to float32)."""
        seq_T, pos_T = np.nonzero(tokens.keep_SL)
        index_T = torch.from_numpy(seq_T * tokens.keep_SL.shape[1] + pos_T)
        kept, columns, width = [], {}, 0
        for name, acts_SLD in acts.items():
            kept.append(acts_SLD.flatten(0, 1).index_select(0, index_T.to(acts_SLD.device)))
            columns[name] = (width, width + acts_SLD.shape[-1])
            width += acts_SLD.shape[-1]
        acts_TW = (kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)).cpu()
        stored = acts_TW.view(torch.uint16) if acts_TW.dtype == torch.bfloat16 else acts_TW.float()
        return cls(block_id, tokens.tokens_SL, stored.numpy(), seq_T.astype(np.int32), pos_T.astype(np.int32), columns)

    @property
    def n_tokens(self) -> int:
        return len(self.acts)

    @property
    def keep_SL(self) -> np.ndarray:
        """bool, the positions that `acts` has a row for."""
        keep_SL = np.zeros(self.tokens_SL.shape, dtype=bool)
        keep_SL[self.seq_T, self.pos_T] = True
        return keep_SL

    @property
    def tokens(self) -> TokenBlock:
        return TokenBlock(self.tokens_SL, self.keep_SL)

    def acts_TD(self, dtype: torch.dtype | None = None, hook: str | None = None) -> Tensor:
        """Activations [T, D] of a hook point; None is the first one.

        Where `dtype` is None or the stored one it is no copy: do not write to it.

        Raises:
            KeyError: the block holds no such hook point (it says which it holds).
        """
        if hook is not None and hook not in self.columns:
            raise KeyError(f"block {self.block_id} holds no {hook}, only {', '.join(self.columns)}")
        first, last = self.columns[hook if hook is not None else next(iter(self.columns))]
        with warnings.catch_warnings():
            # The object store's pages are read-only, which torch cannot express and warns about.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            acts_TD = torch.from_numpy(self.acts)[:, first:last]
        if self.acts.dtype == np.uint16:
            acts_TD = acts_TD.view(torch.bfloat16)
        return acts_TD if dtype is None else acts_TD.to(dtype)

    def to_numpy_dict(self) -> dict[str, Any]:
        return {
            "block_id": self.block_id,
            "tokens_SL": self.tokens_SL,
            "acts": self.acts,
            "seq_T": self.seq_T,
            "pos_T": self.pos_T,
            "columns": self.columns,
        }

    @classmethod
    def from_numpy_dict(cls, stored: dict[str, Any]) -> Block:
        return cls(**stored)
