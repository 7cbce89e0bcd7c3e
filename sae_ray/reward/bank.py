"""The verdict bank: an append-only ledger of everything a judge said, as Parquet segments.

A verdict (text, explanation, judge, mode, prompt version) never goes stale, only the explanation does. A
segment is written atomically and never changed; a resumed run reads the bank back instead of asking again.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.storage import LocalStorage

SCHEMA = pa.schema(
    [
        ("round", pa.int32()),
        ("sae_step", pa.int64()),  # the step of the SAE whose evidence this is
        ("latent", pa.int64()),
        ("explanation", pa.string()),
        ("explainer", pa.string()),  # where the explanation came from: llm or lexical
        ("chosen", pa.bool_()),  # whether the explanation won its competition
        ("purpose", pa.string()),  # select | score | shuffled
        ("context", pa.int64()),  # index among the evidence split's contexts
        ("text", pa.string()),
        ("kind", pa.string()),  # positive | near_miss | sibling | random
        ("active", pa.bool_()),
        ("activation", pa.float32()),
        ("token", pa.int64()),  # kept-token index of the largest pre-activation
        ("margin", pa.float32()),  # largest pre-activation minus threshold
        ("weight", pa.float32()),  # inverse sampling propensity
        ("judge", pa.string()),
        ("judge_identity", pa.string()),  # `verdict_cache.judge_identity`; null in segments that do not say
        ("prompt_version", pa.string()),  # `prompts.PROMPT_VERSION`; null in segments that do not say
        ("mode", pa.string()),
        ("score", pa.float32()),  # raw verdict; null is missing, never 0
        ("probability", pa.float32()),  # after the judge's Platt map
    ]
)


# Columns that segments of earlier versions do not have.
_YOUNGER = ("judge_identity", "prompt_version", "margin")


class VerdictBank:
    """Segments under `bank/` of a run folder."""

    def __init__(self, storage: LocalStorage, prefix: str = "bank"):
        self._storage = storage
        self._prefix = prefix

    def segments(self) -> list[str]:
        return [key for key in self._storage.list(self._prefix) if key.endswith(".parquet")]

    def append(self, rows: list[dict[str, Any]]) -> str:
        """Commits one segment; returns its key."""
        last = max((int(key.rsplit("-", 1)[1].split(".")[0]) for key in self.segments()), default=0)
        key = f"{self._prefix}/segment-{last + 1:06d}.parquet"
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
        self._storage.write(key, buffer.getvalue())
        return key

    def read(self, segments: list[str] | None = None) -> list[dict[str, Any]]:
        """All rows of the given segments (all of them by default), in the order they were committed.

        Every row has every column: what an older segment does not say is None.
        """
        rows: list[dict[str, Any]] = []
        blank = dict.fromkeys(_YOUNGER)
        for key in self.segments() if segments is None else segments:
            rows += [blank | row for row in pq.read_table(io.BytesIO(self._storage.read(key))).to_pylist()]
        return rows
