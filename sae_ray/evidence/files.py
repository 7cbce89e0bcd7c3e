"""Evidence on disk: three Parquet files that any reader opens, and this one reads back as it was.

evidence/<kind>/latents.parquet     one row per latent: its statistics
evidence/<kind>/examples.parquet    one row per example: latent, side, context, stratum, weight, activations
evidence/<kind>/contexts.parquet    token ids of the contexts that examples refer to, each once
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.evidence.types import Contexts, EvidenceSet, Example, LatentEvidence, Side
from sae_ray.storage import Storage

_SIDES: tuple[Side, Side] = ("explain", "score")
_NUMBERS = ("density", "contexts_active", "max_activation", "firing_entropy", "unigram_share")
_LISTS = ("top_tokens", "promoted", "suppressed", "siblings")
_EXAMPLES = pa.schema(
    [
        ("latent", pa.int64()),
        ("side", pa.string()),
        ("context", pa.int64()),
        ("stratum", pa.string()),
        ("weight", pa.float64()),
        ("quantile", pa.int32()),
        ("margin", pa.float64()),
        ("sibling", pa.int64()),
        ("acts", pa.list_(pa.float32())),
    ]
)
_CONTEXTS = pa.schema([("context", pa.int64()), ("tokens", pa.list_(pa.int32()))])


def write_evidence(storage: Storage, prefix: str, found: EvidenceSet) -> None:
    """Writes a set below `prefix`; `latents.parquet` last, so that it is there only if all is."""
    examples = [
        {
            "latent": each.latent, "side": side, "context": e.context, "stratum": e.stratum, "weight": e.weight,
            "quantile": e.quantile, "margin": e.margin, "sibling": e.sibling, "acts": e.acts_S.tolist(),
        }
        for each in found.latents.values()
        for side in _SIDES
        for e in getattr(each, side)
    ]  # fmt: skip
    contexts = [{"context": c, "tokens": found.contexts.tokens[c].tolist()} for c in sorted(found.contexts.tokens)]
    about = {"n_tokens": found.n_tokens, "n_contexts": found.n_contexts, "skipped": found.skipped}
    latents = [
        {
            "latent": each.latent,
            **{name: float(getattr(each, name)) for name in _NUMBERS},
            **{name: json.dumps(getattr(each, name)) for name in _LISTS},
        }
        for each in found.latents.values()
    ]
    schema = pa.schema(
        [("latent", pa.int64()), *((n, pa.float64()) for n in _NUMBERS), *((n, pa.string()) for n in _LISTS)],
        metadata={"about": json.dumps(about)},
    )
    _write(storage, f"{prefix}/examples.parquet", pa.Table.from_pylist(examples, _EXAMPLES))
    _write(storage, f"{prefix}/contexts.parquet", pa.Table.from_pylist(contexts, _CONTEXTS))
    _write(storage, f"{prefix}/latents.parquet", pa.Table.from_pylist(latents, schema))


def is_written(storage: Storage, prefix: str) -> bool:
    return storage.exists(f"{prefix}/latents.parquet")


def read_evidence(storage: Storage, prefix: str, tokenizer: Any) -> EvidenceSet:
    """What `write_evidence` wrote.

    Args:
        tokenizer: of the subject model.
    """
    table = _read(storage, f"{prefix}/latents.parquet")
    about = json.loads(table.schema.metadata[b"about"])
    latents: dict[int, LatentEvidence] = {}
    for row in table.to_pylist():
        values: dict[str, Any] = {name: float("nan") if row[name] is None else row[name] for name in _NUMBERS}
        values |= {name: tuple(tuple(item) for item in json.loads(row[name])) for name in _LISTS}
        latents[row["latent"]] = LatentEvidence(row["latent"], **values)
    sides: dict[tuple[int, str], list[Example]] = {}
    for row in _read(storage, f"{prefix}/examples.parquet").to_pylist():
        example = Example(
            row["context"], np.array(row["acts"], dtype=np.float32), row["stratum"], row["weight"], row["quantile"],
            row["margin"], row["sibling"],
        )  # fmt: skip
        sides.setdefault((row["latent"], row["side"]), []).append(example)
    for latent, each in latents.items():
        explain, score = (tuple(sides.get((latent, side), ())) for side in _SIDES)
        latents[latent] = replace(each, explain=explain, score=score)
    contexts = _read(storage, f"{prefix}/contexts.parquet").to_pylist()
    tokens = {row["context"]: np.array(row["tokens"], dtype=np.int32) for row in contexts}
    skipped = {int(latent): why for latent, why in about["skipped"].items()}
    return EvidenceSet(latents, Contexts(tokens, tokenizer), about["n_tokens"], about["n_contexts"], skipped)


def _write(storage: Storage, key: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write(key, buffer.getvalue())


def _read(storage: Storage, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read(key)))
