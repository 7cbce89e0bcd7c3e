"""The producer: given a block id, the block. It holds no state that a block depends on."""

from __future__ import annotations

import os
import time
from typing import Any

import ray
import torch

from sae_ray.activations.block import Block
from sae_ray.activations.subject import SubjectLM, load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.corpus import BlockReader, Split


class ActivationProducer:
    """Becomes a Ray actor in `stream.py`. Works without Ray, which the tests and `evaluate` use."""

    def __init__(self, config_json: str) -> None:
        # Loading waits for `ready`: an error raised here would reach the driver as the death of an actor.
        self._cfg = RunConfig.model_validate_json(config_json)
        self._subject: SubjectLM | None = None
        self._reader: BlockReader | None = None

    def ready(self) -> dict[str, Any]:
        """Load the model and open the corpus.

        Returns: d_in, dtype, pid, node_id, load_seconds.
        Raises:
            UserError: what is wrong with the model, the hook or the corpus.
        """
        start = time.monotonic()
        cfg = self._cfg
        torch.set_num_threads(cfg.activations.threads)
        device = "cuda" if cfg.activations.gpus > 0 else "cpu"
        self._subject = SubjectLM(cfg.model, cfg.hook, device)
        self._reader = BlockReader(cfg, load_tokenizer(cfg.model))
        return {
            "d_in": self._subject.d_in,
            "dtype": str(self._subject.dtype).removeprefix("torch."),
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id() if ray.is_initialized() else "",
            "load_seconds": time.monotonic() - start,
        }

    def produce(self, split: Split, block_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A block and what it cost, as (meta, block dict).

        meta: split, block_id, tokens (kept), sequence_tokens (run through the model), seconds,
        corpus_seconds (read, tokenize, pack), forward_seconds.
        """
        if self._subject is None or self._reader is None:
            self.ready()
        assert self._subject is not None
        assert self._reader is not None
        start = time.monotonic()
        tokens = self._reader.block(split, block_id)
        read = time.monotonic()
        acts_SLD = self._subject.forward(torch.from_numpy(tokens.tokens_SL))
        if acts_SLD.is_cuda:
            torch.cuda.synchronize()
        ran = time.monotonic()
        block = Block.from_activations(block_id, tokens, acts_SLD)
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
