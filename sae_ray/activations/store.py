"""The activation store: blocks of a stream written once, read by any number of runs.

    index.json                      what decided the stream, hook points and their columns, a hash for each chunk
    train/00000012.safetensors      a chunk: one block as its producer made it
    evidence/...  heldout/...

A run with `activations.store` reads its blocks from here instead of running the language model. The leases, the
window and the mixing are those of a live run, so the losses are too, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch

from sae_ray.config import RunConfig
from sae_ray.corpus.reader import Split
from sae_ray.errors import UserError
from sae_ray.storage import Storage, open_storage
from sae_ray.tensor_file import arrays_of, buffers_of
from sae_ray.trainer.mixing import batch_count

FORMAT = 1
INDEX = "index.json"
_PLAIN = "plain"  # metadata entry of a chunk: what is no array, as JSON
_BLOCK_KEYS = ("block_sequences", "mask_special_tokens", "mask_first_tokens")


def stream_settings(cfg: RunConfig) -> dict[str, Any]:
    """The config keys that decide what block i holds, besides the hook points and the model's dtype."""
    return {
        "seed": cfg.seed,
        "model.name": cfg.model.name,
        **{f"corpus.{key}": value for key, value in cfg.corpus.model_dump(mode="json").items()},
        **{f"activations.{key}": getattr(cfg.activations, key) for key in _BLOCK_KEYS},
    }


def chunk_key(split: Split, block_id: int) -> str:
    return f"{split}/{block_id:08d}.safetensors"


def write_chunk(storage: Storage, split: Split, block: dict[str, Any]) -> dict[str, Any]:
    """Writes a block dict. Returns {"sha256", "bytes"}."""
    arrays = {key: value for key, value in block.items() if isinstance(value, np.ndarray)}
    plain = {key: value for key, value in block.items() if key not in arrays}
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}
    buffers = buffers_of(tensors, {_PLAIN: json.dumps(plain)})
    sha256 = storage.write(chunk_key(split, block["block_id"]), buffers)
    return {"sha256": sha256, "bytes": sum(buffer.nbytes for buffer in buffers)}


class ActivationStore:
    """A store that may be read.

    Args:
        uri: a folder or `s3://bucket/prefix`.
        index: its index.
    """

    def __init__(self, uri: str, index: dict[str, Any]):
        self.uri, self.storage = uri, open_storage(uri)
        self.settings: dict[str, Any] = index["settings"]
        self.columns = {hook: (first, last) for hook, (first, last) in index["columns"].items()}
        self.dtype: str = index["dtype"]
        self.chunks: dict[str, dict[str, Any]] = index["chunks"]
        self._committed: str | None = None  # SHA-256 of the index as it was read or written last

    @classmethod
    def open(cls, uri: str) -> ActivationStore:
        """Raises UserError: nothing there, or not readable by this version."""
        storage = open_storage(uri)
        if not storage.exists(INDEX):
            raise UserError(
                f"{uri}: holds no activation store (no {INDEX}); `sae-ray store CONFIG --to {uri}` makes one"
            )
        try:
            data = storage.read(INDEX)
            index = json.loads(data)
            if index["format"] != FORMAT:
                raise UserError(f"{storage.url(INDEX)}: has format {index['format']}, this version reads {FORMAT}")
            store = cls(uri, index)
            store._committed = hashlib.sha256(data).hexdigest()
            return store
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{storage.url(INDEX)}: is not the index of an activation store") from error

    def write_index(self) -> None:
        """Raises UserError: it cannot be written, or another writer has since."""
        index = {
            "format": FORMAT,
            "settings": self.settings,
            "columns": self.columns,
            "dtype": self.dtype,
            "chunks": dict(sorted(self.chunks.items())),
        }
        data = json.dumps(index, indent=1).encode()
        self._committed = self.storage.commit(INDEX, data, after=self._committed)

    # -- does it fit a run ------------------------------------------------------------------------------

    def check(self, cfg: RunConfig) -> None:
        """Raises UserError: the store holds another stream than the config asks for; names the keys."""
        wanted = stream_settings(cfg)
        differ = [
            f"{key} is {self.settings.get(key)!r} there, {wanted.get(key)!r} here"
            for key in sorted(wanted.keys() | self.settings.keys())
            if self.settings.get(key) != wanted.get(key)
        ]
        if cfg.model.dtype not in ("auto", self.dtype):
            differ.append(f"model.dtype is {self.dtype!r} there, {cfg.model.dtype!r} here")
        held = ", ".join(self.columns)
        differ += [
            f"hook {point.name} is not there, only {held}" for point in cfg.hooks if point.name not in self.columns
        ]
        if differ:
            raise UserError(f"{self.uri}: holds another activation stream: {'; '.join(differ[:5])}")

    @property
    def train_blocks(self) -> int:
        """Train blocks from the first up to the first one that is missing."""
        count = 0
        while chunk_key("train", count) in self.chunks:
            count += 1
        return count

    def steps(self, cfg: RunConfig) -> int:
        """How many training steps the store's train blocks are."""
        size, steps = cfg.activations.mix_blocks, 0
        for first in range(0, self.train_blocks - size + 1, size):
            keys = [chunk_key("train", block_id) for block_id in range(first, first + size)]
            steps += batch_count(sum(self.chunks[key]["tokens"] for key in keys), cfg.trainer.batch_tokens)
        return steps

    def blocks_needed(self, cfg: RunConfig) -> int:
        """About how many train blocks a run's steps are; a whole number of mix windows."""
        size, held = cfg.activations.mix_blocks, self.train_blocks
        steps, windows = self.steps(cfg), held // size
        if steps >= cfg.total_steps:
            return held
        missing = cfg.total_steps - steps
        per_window = steps / windows if windows else 1.0
        return size * (windows + -int(-missing // per_window))

    def check_enough(self, cfg: RunConfig) -> None:
        """Raises UserError: the run would need train blocks that are not there; says how many."""
        if (steps := self.steps(cfg)) < cfg.total_steps:
            needed = self.blocks_needed(cfg)
            raise UserError(
                f"activations.store = {self.uri}: its {self.train_blocks} train blocks are {steps} steps, the run has "
                f"{cfg.total_steps}; `sae-ray store CONFIG --to {self.uri} --blocks {needed}` adds what is missing"
            )

    # -- blocks -----------------------------------------------------------------------------------------

    def holds(self, split: Split, block_id: int) -> bool:
        return chunk_key(split, block_id) in self.chunks

    def entry(self, split: Split, block_id: int) -> dict[str, Any]:
        """sha256, bytes, tokens, sequence_tokens."""
        return self.chunks[chunk_key(split, block_id)]

    def read(self, split: Split, block_id: int, hooks: list[str]) -> dict[str, Any]:
        """The block dict, with the columns of `hooks`, in this order, as a live producer would give it.

        Raises:
            UserError: the chunk is missing or corrupt (it is named).
        """
        data = self.storage.read(chunk_key(split, block_id), self.entry(split, block_id)["sha256"])
        arrays, metadata = arrays_of(data)
        block: dict[str, Any] = {**arrays, **json.loads(metadata[_PLAIN])}
        stored = block["columns"]
        if list(stored) != hooks:
            block["acts"] = np.concatenate([block["acts"][:, slice(*stored[hook])] for hook in hooks], axis=1)
        block["columns"], width = {}, 0
        for hook in hooks:
            first, last = stored[hook]
            block["columns"][hook] = (width, width + last - first)
            width += last - first
        return block
