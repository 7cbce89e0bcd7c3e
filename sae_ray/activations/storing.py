"""`sae-ray store`: the block stream, through the real producers, into an activation store.

The producers write the chunks where they make them; the driver keeps the index. Nothing but numbers comes
back, so the size of a store is bounded by its storage alone.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from rich.console import Console

from sae_ray.activations.producer import ActivationProducer
from sae_ray.activations.store import INDEX, ActivationStore, chunk_key, stream_settings, write_chunk
from sae_ray.activations.stream import BlockStream
from sae_ray.config import RunConfig
from sae_ray.corpus.reader import Split
from sae_ray.errors import RunInterrupted, UserError, printable
from sae_ray.session import Deadline, Interrupt, ray_session
from sae_ray.storage import absolute, is_written_whole, open_storage, probe

INDEX_EVERY_S = 5.0
SAY_EVERY_S = 10.0
POLL_S = 1.0


class StoringProducer(ActivationProducer):
    """A producer that writes each block as a chunk and hands back what the index says of it."""

    def __init__(self, config_json: str, uri: str) -> None:
        super().__init__(config_json)
        self._storage = open_storage(uri)
        # A producer that replaces a dead one looks at the index as it is then; older entries only cost a rewrite.
        self._before = ActivationStore.open(uri).chunks if self._storage.exists(INDEX) else {}

    def produce(self, split: Split, block_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A chunk that is there whole is kept; meta["chunk"] is its index entry."""
        began = time.monotonic()
        key = chunk_key(split, block_id)
        if (entry := self._before.get(key)) and is_written_whole(self._storage, key, entry["sha256"]):
            seconds = time.monotonic() - began
            times = {"seconds": seconds, "corpus_seconds": 0.0, "forward_seconds": 0.0}
            return {"split": split, "block_id": block_id, **times, **entry, "chunk": entry, "kept": True}, {}
        meta, block = super().produce(split, block_id)
        entry = write_chunk(self._storage, split, block)
        entry |= {"tokens": meta["tokens"], "sequence_tokens": meta["sequence_tokens"]}
        columns = {hook: list(place) for hook, place in block["columns"].items()}
        return {**meta, "chunk": entry, "columns": columns, "kept": False}, {}


class StoreWriter:
    """A store while it is written.

    Args:
        cfg: without `activations.store`, so that the blocks are made and not read.
        uri: a folder or `s3://bucket/prefix`.
    Raises:
        UserError: `uri` cannot be written, or holds another stream.
    """

    def __init__(self, cfg: RunConfig, uri: str, console: Console, interrupt: Interrupt):
        self.cfg, self.uri, self.console, self.interrupt = cfg, uri, console, interrupt
        probe(uri, "--to")
        self.store: ActivationStore | None = None
        if open_storage(uri).exists(INDEX):
            self.store = ActivationStore.open(uri)
            self.store.check(cfg)
            wanted = [point.name for point in cfg.hooks]
            if list(self.store.columns) != wanted:
                held = ", ".join(self.store.columns)
                raise UserError(f"{uri}: holds {held}, this config's hook points are {', '.join(wanted)}; name another")
        self.kept = self.written = 0
        self._indexed = self._said = time.monotonic()
        self._stream = BlockStream(cfg, producer=StoringProducer, extra=(absolute(uri),), train_blocks=0)

    def write(self, splits: list[Split], n_blocks: int | None) -> None:
        """Writes what is missing of the first blocks of `splits`; Ray runs.

        Args:
            n_blocks: how many of each split; None: as many as the config's run takes.
        Raises:
            UserError: a chunk cannot be written, or the blocks cannot be made.
            RunInterrupted: Ctrl-C; what was written counts.
        """
        try:
            self._stream.start()
            if self.store is not None and self.store.dtype != self._stream.dtype:
                raise UserError(
                    f"{self.uri}: holds {self.store.dtype} activations, model.dtype means {self._stream.dtype} here"
                )
            for split in splits:
                self._write_split(split, n_blocks)
        except BaseException:
            with suppress(UserError):  # there may be no room for it either; the error that led here is the one to see
                self._write_index()
            raise
        finally:
            self._stream.stop()
        self._write_index()

    def size(self) -> str:
        """For a person: what is there now."""
        chunks = self.store.chunks.values() if self.store is not None else ()
        tokens, size = sum(c["tokens"] for c in chunks), sum(c["bytes"] for c in chunks)
        per_token = f", {size / tokens:,.0f} bytes per token" if tokens else ""
        return f"{len(chunks)} blocks, {tokens:,} tokens, {size / 1e6:,.1f} MB{per_token}"

    # -- inside -----------------------------------------------------------------------------------------

    def _write_split(self, split: Split, n_blocks: int | None) -> None:
        activations, stream = self.cfg.activations, self._stream
        limit_s = activations.lease_timeout_s * (1 + activations.max_restarts)
        asked = done = 0
        pending: set[int] = set()
        deadline = Deadline(limit_s, f"a {split} block")
        while True:
            wanted = n_blocks if n_blocks is not None else self._needed(split, done)
            while asked < wanted and len(pending) < activations.window_blocks:
                stream.fetch(split, [asked])
                pending.add(asked)
                asked += 1
            if not pending:
                return
            stream.pump(time.monotonic())
            ready, _ = ray.wait(stream.pending_refs(), timeout=POLL_S, fetch_local=False)
            for ref in ready:
                stream.on_ready(ref, time.monotonic())
            for block_id in [block_id for block_id in pending if stream.fetched(split, [block_id])]:
                self._take(stream.fetched_meta(split, block_id))
                stream.release(split, [block_id])
                pending.remove(block_id)
                done += 1
                deadline = Deadline(limit_s, f"a {split} block")
            deadline.check()
            self._housekeeping(f"{split}: {done} of {wanted} blocks")
            if self.interrupt.requested:
                raise RunInterrupted(f"stopped; {self.uri} holds {self.size()}; the same command goes on")

    def _take(self, meta: dict[str, Any]) -> None:
        if self.store is None:
            settings = stream_settings(self.cfg)
            index = {"settings": settings, "columns": meta["columns"], "dtype": self._stream.dtype, "chunks": {}}
            self.store = ActivationStore(self.uri, index)
        self.store.chunks[chunk_key(meta["split"], meta["block_id"])] = meta["chunk"]
        self.kept, self.written = self.kept + meta["kept"], self.written + (not meta["kept"])

    def _housekeeping(self, doing: str) -> None:
        now = time.monotonic()
        if now - self._indexed > INDEX_EVERY_S:
            self._write_index()
        if now - self._said > SAY_EVERY_S:
            self._said = now
            self.console.print(f"{doing}; in all {self.size()}", soft_wrap=True)

    def _write_index(self) -> None:
        if self.store is not None:
            self.store.write_index()
        self._indexed = time.monotonic()

    def _needed(self, split: Split, done: int) -> int:
        """Blocks of a split that the config's run takes; train blocks are known only as their tokens are counted."""
        if split == "evidence":
            return self.cfg.rlaif.evidence_blocks
        if split == "heldout":
            return self.cfg.evaluation.blocks
        if self.store is None or done < self.cfg.activations.mix_blocks:
            return self.cfg.activations.mix_blocks
        return self.store.blocks_needed(self.cfg)


def store_blocks(cfg: RunConfig, uri: str, n_blocks: int | None, splits: list[Split], verbose: bool = False) -> None:
    """`sae-ray store`: writes blocks to `uri`, on a Ray as the config says, and prints the size."""
    console = Console()
    with Interrupt() as interrupt:
        writer = StoreWriter(cfg, uri, console, interrupt)
        with ray_session(cfg.ray, verbose):
            console.print(
                f"{cfg.activations.most_producers} producers write to {printable(uri)}", soft_wrap=True, markup=False
            )
            writer.write(splits, n_blocks)
    told = f"{uri}: {writer.size()}; {writer.written} written, {writer.kept} kept"
    console.print(printable(told), soft_wrap=True, markup=False)
