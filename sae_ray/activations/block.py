"""A block: the activations of some sequences, as it lies in Ray's object store."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_ray.corpus.reader import TokenBlock


@dataclass(frozen=True)
class Block:
    """The kept tokens of S sequences of L tokens, in (sequence, position) order.

    block_id: number within its split. tokens_SL: int32, -1 is padding. acts: [T, D] float32, or uint16
    holding bfloat16 bits. seq_T, pos_T: int32, where each kept token stands in tokens_SL.
    """

    block_id: int
    tokens_SL: np.ndarray
    acts: np.ndarray
    seq_T: np.ndarray
    pos_T: np.ndarray

    @classmethod
    def from_activations(cls, block_id: int, tokens: TokenBlock, acts_SLD: Tensor) -> Block:
        """Keep the activations at `tokens.keep_SL` (float16 is widened to float32)."""
        seq_T, pos_T = np.nonzero(tokens.keep_SL)
        rows_T = torch.from_numpy(seq_T * tokens.keep_SL.shape[1] + pos_T).to(acts_SLD.device)
        acts_TD = acts_SLD.flatten(0, 1).index_select(0, rows_T).cpu()
        if acts_TD.dtype == torch.bfloat16:
            acts = acts_TD.view(torch.uint16).numpy()
        else:
            acts = acts_TD.float().numpy()
        return cls(block_id, tokens.tokens_SL, acts, seq_T.astype(np.int32), pos_T.astype(np.int32))

    @property
    def n_tokens(self) -> int:
        return len(self.acts)

    @property
    def d_in(self) -> int:
        return self.acts.shape[1]

    @property
    def keep_SL(self) -> np.ndarray:
        """bool, the positions that `acts` has a row for."""
        keep_SL = np.zeros(self.tokens_SL.shape, dtype=bool)
        keep_SL[self.seq_T, self.pos_T] = True
        return keep_SL

    @property
    def tokens(self) -> TokenBlock:
        return TokenBlock(self.tokens_SL, self.keep_SL)

    def acts_TD(self, dtype: torch.dtype | None = None) -> Tensor:
        """Activations [T, D]. Where `dtype` is None or the stored one it is no copy: do not write to it."""
        with warnings.catch_warnings():
            # The object store's pages are read-only, which torch cannot express and warns about.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            acts_TD = torch.from_numpy(self.acts)
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
        }

    @classmethod
    def from_numpy_dict(cls, stored: dict[str, Any]) -> Block:
        return cls(**stored)
