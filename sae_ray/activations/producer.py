"""The producer: given a block id, the block. It holds no state that a block depends on."""

from __future__ import annotations

import os
import time
from typing import Any

import ray
import torch

from sae_ray import logs
from sae_ray.activations.block import Block
from sae_ray.activations.store import ActivationStore
from sae_ray.activations.subject import SubjectLM, load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.corpus import BlockReader, Split
from sae_ray.errors import UserError


class ActivationProducer:
    """Becomes a Ray actor in `stream.py`. Works without Ray, which the tests and `evaluate` use."""

    def __init__(self, config_json: str) -> None:
        # Loading waits for `ready`: an error raised here would reach the driver as the death of an actor.
        self._cfg = RunConfig.model_validate_json(config_json)
        logs.start_actor(self._cfg, "producer")
        self._subject: SubjectLM | None = None
        self._reader: BlockReader | None = None
        self._store: ActivationStore | None = None

    def ready(self) -> dict[str, Any]:
        """Load the model and open the corpus; with an activation store only that, until a block is not in it.

        Returns: widths (hook name -> width), dtype, pid, node_id, load_seconds; with a store stored_train_blocks.
        Raises:
            UserError: what is wrong with the model, a hook or the corpus.
        """
        start = time.monotonic()
        if self._cfg.activations.store is not None:
            self._store = ActivationStore.open(self._cfg.activations.store)
            self._store.check(self._cfg)
            places = self._store.columns
            widths = {point.name: places[point.name][1] - places[point.name][0] for point in self._cfg.hooks}
            about = {"widths": widths, "dtype": self._store.dtype, "stored_train_blocks": self._store.train_blocks}
        else:
            subject = self._load()
            about = {"widths": subject.widths, "dtype": str(subject.dtype).removeprefix("torch.")}
        return {
            **about,
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id() if ray.is_initialized() else "",
            "load_seconds": time.monotonic() - start,
        }

    def _load(self) -> SubjectLM:
        cfg = self._cfg
        torch.set_num_threads(cfg.activations.threads)
        device = "cuda" if cfg.activations.gpus > 0 else "cpu"
        self._subject = SubjectLM(cfg.model, cfg.hooks, device)
        self._reader = BlockReader(cfg, load_tokenizer(cfg.model))
        dtype = str(self._subject.dtype).removeprefix("torch.")
        if self._store is not None and self._store.dtype != dtype:
            raise UserError(
                f"model.dtype = {cfg.model.dtype}: means {dtype} here, activations.store {self._store.uri} holds "
                f"{self._store.dtype}; name that, or store the evidence and heldout blocks too"
            )
        return self._subject

    def produce(self, split: Split, block_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A block and what it cost, as (meta, block dict).

        meta: split, block_id, tokens (kept), sequence_tokens (run through the model), seconds,
        corpus_seconds (read, tokenize, pack), forward_seconds.
        """
        if self._store is not None and self._store.holds(split, block_id):
            return self._stored(self._store, split, block_id)
        if self._subject is None or self._reader is None:
            self._load()
        assert self._subject is not None
        assert self._reader is not None
        start = time.monotonic()
        tokens = self._reader.block(split, block_id)
        read = time.monotonic()
        acts = self._subject.forward(torch.from_numpy(tokens.tokens_SL))
        if self._subject.device.type == "cuda":
            torch.cuda.synchronize()
        ran = time.monotonic()
        block = Block.from_activations(block_id, tokens, acts)
        meta = {
            "split": split,
            "block_id": block_id,
            "tokens": block.n_tokens,
            "sequence_tokens": tokens.tokens_SL.size,
            "corpus_seconds": read - start,
            "forward_seconds": ran - read,
            "seconds": time.monotonic() - start,
        }
        return meta, block.to_numpy_dict()

    def _stored(self, store: ActivationStore, split: Split, block_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
        start = time.monotonic()
        block = store.read(split, block_id, [point.name for point in self._cfg.hooks])
        entry = store.entry(split, block_id)
        meta = {
            "split": split,
            "block_id": block_id,
            "tokens": entry["tokens"],
            "sequence_tokens": entry["sequence_tokens"],
            "corpus_seconds": 0.0,
            "forward_seconds": 0.0,
            "seconds": time.monotonic() - start,
        }
        return meta, block
