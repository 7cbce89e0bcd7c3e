"""Block i of a split: a pure function of (config, seed, split, i), whoever reads it and in whatever order.

A reader walks the token stream of a split from its start and numbers blocks as it passes them. Nothing of the
walk is shared between readers, so any number of producers, started or restarted at any time, agree.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, get_args

import numpy as np

from sae_ray.config import RunConfig
from sae_ray.corpus.documents import Corpus, open_corpus
from sae_ray.errors import UserError

Split = Literal["train", "evidence", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

PAD = -1
_DOCUMENTS_PER_BATCH = 32
# A tokenizer call holds several times its text; a book is tokenized in pieces.
_PIECE_CHARS = 50_000
# A lease that is issued again lies a little behind the cursor; 512 blocks of 16 x 128 ids are 4 MB.
_REMEMBERED_BLOCKS = 512


@dataclass(frozen=True)
class TokenBlock:
    """S sequences of L token ids.

    tokens_SL: int32, `-1` is padding (on the right). keep_SL: bool, the positions whose activations count.
    """

    tokens_SL: np.ndarray
    keep_SL: np.ndarray


def split_of(document: str) -> Split:
    """The one split a document belongs to: 5% evidence, 5% heldout, by a hash of its text.

    Equal texts land in one split, so a duplicate never leaks from train into heldout.
    """
    digest = hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % 20
    return "evidence" if bucket == 0 else "heldout" if bucket == 1 else "train"


class BlockReader:
    """Token blocks of a run's corpus.

    Raises (from `block`):
        UserError: the corpus or the split has no tokens, or a source is unreadable.
    """

    def __init__(self, cfg: RunConfig, tokenizer: Any, corpus: Corpus | None = None) -> None:
        self.corpus = corpus or open_corpus(cfg.corpus)
        self._length = cfg.corpus.context_length
        self._pack = cfg.corpus.pack
        self._seed = cfg.seed
        self._block_sequences = cfg.activations.block_sequences
        self._mask_first = cfg.activations.mask_first_tokens
        self._encode = DocumentEncoder(tokenizer)
        self._masked_ids = np.array(
            sorted(self._encode.special_ids) if cfg.activations.mask_special_tokens else [], dtype=np.int32
        )
        self._walks: dict[Split, _Walk] = {}

    def block(self, split: Split, block_id: int) -> TokenBlock:
        """Block `block_id` (from 0, unbounded: the corpus starts over in a new order at its end)."""
        walk = self._walks.get(split)
        if walk is None or not walk.can_reach(block_id):
            walk = self._walks[split] = _Walk(self.sequences(split), self._block_sequences)
        tokens_SL = walk.reach(block_id)
        return TokenBlock(tokens_SL, self._keep(tokens_SL))

    def sequences(self, split: Split) -> Iterator[np.ndarray]:
        """Token sequences [L] int32 of a split, endlessly, one epoch of the corpus after another."""
        for epoch in count():
            some = False
            documents = self.corpus.documents(self._seed, epoch)
            token_documents = self._encode(text for text in documents if split_of(text) == split)
            for sequence in self._cut(token_documents):
                some = True
                yield sequence
            if not some:
                raise UserError(
                    f"{self.corpus.name}: no tokens in its {split} split; about 5% of the documents go to "
                    "evidence and 5% to heldout, so a corpus needs at least some hundred documents"
                )

    def _cut(self, documents: Iterable[list[int]]) -> Iterator[np.ndarray]:
        prefix = [] if self._encode.bos is None else [self._encode.bos]
        room = self._length - len(prefix)
        if self._pack:
            rest: list[int] = []
            for document in documents:
                rest += document
                if self._encode.separator is not None:
                    rest.append(self._encode.separator)
                full = len(rest) - len(rest) % room
                for start in range(0, full, room):
                    yield np.array(prefix + rest[start : start + room], dtype=np.int32)
                rest = rest[full:]
            chunks = [rest] if rest else []
            yield from (self._padded(prefix + chunk) for chunk in chunks)
            return
        for document in documents:
            for start in range(0, len(document), room):
                yield self._padded(prefix + document[start : start + room])

    def _padded(self, ids: list[int]) -> np.ndarray:
        sequence = np.full(self._length, PAD, dtype=np.int32)
        sequence[: len(ids)] = ids
        return sequence

    def _keep(self, tokens_SL: np.ndarray) -> np.ndarray:
        keep_SL = (tokens_SL != PAD) & ~np.isin(tokens_SL, self._masked_ids)
        keep_SL[:, : self._mask_first] = False
        return keep_SL


class DocumentEncoder:
    """Token ids of documents, in batches.

    bos: put at the start of a *sequence*, for models whose tokenizer adds it by itself; else None.
    separator: put between packed documents: `<|endoftext|>` where the vocabulary has it (in a chat model
    the end-of-sequence token ends a turn, not a document), else the end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        self.bos: int | None = bos if bos is not None and tokenizer("a").input_ids[0] == bos else None
        vocabulary = tokenizer.get_vocab()
        self.separator: int | None = vocabulary.get("<|endoftext|>", tokenizer.eos_token_id)
        self.special_ids = set(tokenizer.all_special_ids) | ({self.separator} - {None})

    def __call__(self, documents: Iterable[str]) -> Iterator[list[int]]:
        """Ids of each document, without special tokens; documents without any token are left out."""
        batch: list[str] = []
        for document in documents:
            if len(document) > _PIECE_CHARS:
                yield from self._batch(batch)
                batch = []
                pieces = self._ids(_pieces(document))
                yield [token for piece in pieces for token in piece]
                continue
            batch.append(document)
            if len(batch) == _DOCUMENTS_PER_BATCH:
                yield from self._batch(batch)
                batch = []
        yield from self._batch(batch)

    def _batch(self, batch: list[str]) -> Iterator[list[int]]:
        return (ids for ids in self._ids(batch) if ids)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens: a corpus that quotes "<|im_end|>" must not inject the control token.
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=True,
            verbose=False,
        )
        return encoded["input_ids"]


class _Walk:
    """One pass over a split's sequences, with the last blocks remembered."""

    def __init__(self, sequences: Iterator[np.ndarray], block_sequences: int) -> None:
        self._sequences = sequences
        self._block_sequences = block_sequences
        self._next_id = 0
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()

    def can_reach(self, block_id: int) -> bool:
        return block_id >= self._next_id or block_id in self._recent

    def reach(self, block_id: int) -> np.ndarray:
        while self._next_id <= block_id:
            self._recent[self._next_id] = np.stack([next(self._sequences) for _ in range(self._block_sequences)])
            self._next_id += 1
            if len(self._recent) > _REMEMBERED_BLOCKS:
                self._recent.popitem(last=False)
        return self._recent[block_id]


def _pieces(document: str) -> list[str]:
    """Cut before a space, so that the space stays with the word it precedes."""
    pieces = []
    start = 0
    while start < len(document):
        end = start + _PIECE_CHARS
        if end < len(document):
            end = max(document.rfind(" ", start + 1, end), document.rfind("\n", start + 1, end))
            end = end if end > start else start + _PIECE_CHARS
        pieces.append(document[start:end])
        start = end
    return pieces


def check_corpus(cfg: RunConfig, tokenizer: Any) -> None:
    """Refuse a corpus without usable tokens, reading only as far as the first documents of each split.

    Raises:
        UserError: naming the source: unreadable, no tokens, nothing in a split, or everything masked.
    """
    if cfg.corpus.context_length <= cfg.activations.mask_first_tokens:
        raise UserError(
            f"activations.mask_first_tokens = {cfg.activations.mask_first_tokens}: masks all of "
            f"corpus.context_length {cfg.corpus.context_length}"
        )
    corpus = open_corpus(cfg.corpus)
    reader = BlockReader(cfg, tokenizer, corpus)
    _check_some_text(corpus, cfg.seed)
    for split in SPLITS:
        if not reader.block(split, 0).keep_SL.any():
            raise UserError(
                f"{corpus.name}: the first block of its {split} split holds only special or masked tokens "
                "(activations.mask_special_tokens, activations.mask_first_tokens)"
            )


def _check_some_text(corpus: Corpus, seed: int) -> None:
    """An empty corpus gets its own message, not one about splits."""
    number = 0
    for document in corpus.documents(seed):
        if document.strip():
            return
        number += 1
    raise UserError(f"{corpus.name}: no tokens: " + (f"all {number} documents are empty" if number else "no documents"))
