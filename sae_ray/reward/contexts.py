"""The text behind a context id: decoding evidence blocks piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import RunConfig


class ContextTexts(Mapping[int, str]):
    """Texts of the contexts of a list of blocks, numbered as `reward.evidence` numbers them.

    Args:
        blocks: block dicts as producers return them; only their token ids are read.
    """

    def __init__(self, config: RunConfig, blocks: list[dict[str, Any]]):
        self._tokenizer = load_tokenizer(config.model)
        size = config.judge.context_tokens
        self._tokens_CS = np.concatenate([block["tokens_SL"].reshape(-1, size) for block in blocks])
        self._offset_T = np.concatenate([block["pos_T"] % size for block in blocks])
        self._texts: dict[int, str] = {}

    @property
    def n_contexts(self) -> int:
        return len(self._tokens_CS)

    def __getitem__(self, context: int) -> str:
        if context not in self._texts:
            tokens_S = self._tokens_CS[context]
            self._texts[context] = self._tokenizer.decode(tokens_S[tokens_S >= 0].tolist(), skip_special_tokens=True)
        return self._texts[context]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self.n_contexts

    def tokens(self, context: int) -> np.ndarray:
        """Token ids int32 [S] of a context; negative is padding."""
        return self._tokens_CS[context]

    def opening(self, context: int, n: int) -> str:
        """The text of a context's first n tokens."""
        return self._tokenizer.decode(self._tokens_CS[context, :n].tolist(), skip_special_tokens=True)

    def pieces(self, context: int) -> list[str]:
        """Each token of a context as text, padding left out."""
        return [self._tokenizer.decode([int(token)]) for token in self._tokens_CS[context] if token >= 0]

    def offset_of(self, token: int) -> int:
        """Position inside its context of a kept token, numbered over all blocks."""
        return int(self._offset_T[token])
