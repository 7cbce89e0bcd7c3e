"""What a judging has committed, batch by batch, and what it says together.

    results/part-000001.verdicts.parquet       one row per verdict
    results/part-000001.explanations.parquet   one row per candidate explanation
    results/part-000001.scores.parquet         one row per (latent, scorer); written last: the batch's commit point

A latent that was judged again on more texts has a later row; the last one counts.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.judge.explainers.base import Explanation
from sae_ray.judge.scorers.base import Score
from sae_ray.judge.scores import mean_estimate
from sae_ray.storage import Storage

FOLDER = "results"
LATENT, RANDOM_DIRECTION = "latent", "random_direction"
SCORES = pa.schema(
    [
        ("kind", pa.string()),  # latent, random_direction, or a baseline such as "residual relu"
        ("latent", pa.int64()),
        ("scorer", pa.string()),
        ("explanation", pa.string()),
        ("explainer", pa.string()),
        ("value", pa.float64()),  # null is missing, never 0
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("stderr", pa.float64()),
        ("shuffled", pa.float64()),  # the same with another latent's explanation
        ("chance", pa.float64()),
        ("n", pa.int64()),
        ("texts", pa.int64()),  # texts per class that were asked for
        ("extra", pa.string()),  # JSON: a scorer's further numbers
    ]
)
EXPLANATIONS = pa.schema(
    [
        ("kind", pa.string()),
        ("latent", pa.int64()),
        ("explanation", pa.string()),
        ("explainer", pa.string()),
        ("cluster", pa.int32()),
        ("chosen", pa.bool_()),
        ("f1", pa.float64()),  # at the natural prior, on the texts that chose
    ]
)
VERDICTS = pa.schema(
    [
        ("kind", pa.string()),
        ("latent", pa.int64()),
        ("scorer", pa.string()),
        ("explanation", pa.string()),
        ("context", pa.int64()),  # of the evidence; null where the text was written for the question
        ("text", pa.string()),  # only of such texts
        ("stratum", pa.string()),
        ("weight", pa.float64()),
        ("purpose", pa.string()),  # select | score | shuffled
        ("raw", pa.float64()),
        ("probability", pa.float64()),
    ]
)
_FILES = {"verdicts": VERDICTS, "explanations": EXPLANATIONS, "scores": SCORES}


def commit(storage: Storage, rows: dict[str, list[dict[str, Any]]]) -> int:
    """Writes one batch; it counts once its scores are there. Returns its number."""
    number = max(parts(storage), default=0) + 1
    for name, schema in _FILES.items():
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[name], schema=schema), buffer, compression="zstd")
        storage.write(f"{FOLDER}/part-{number:06d}.{name}.parquet", buffer.getvalue())
    return number


def parts(storage: Storage) -> list[int]:
    """Numbers of the committed batches."""
    found = (re.fullmatch(rf"{FOLDER}/part-(\d+)\.scores\.parquet", key) for key in storage.list(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def read(storage: Storage, name: str) -> list[dict[str, Any]]:
    """All committed rows of "scores", "explanations" or "verdicts", oldest first."""
    rows: list[dict[str, Any]] = []
    for number in parts(storage):
        data = storage.read(f"{FOLDER}/part-{number:06d}.{name}.parquet")
        rows += pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


def latest(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """(kind, latent, scorer) -> its last score row."""
    return {(row["kind"], row["latent"], row["scorer"]): row for row in rows}


def score_row(kind: str, score: Score, explanation: Explanation, texts: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "latent": score.latent,
        "scorer": score.scorer,
        "explanation": explanation.text,
        "explainer": explanation.explainer,
        **{name: _known(getattr(score, name)) for name in ("value", "low", "high", "stderr", "shuffled", "chance")},
        "n": score.n,
        "texts": texts,
        "extra": json.dumps({key: _known(value) for key, value in score.extra.items()}),
    }


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind and scorer: the mean over latents with its bootstrap interval, and the mean of its shuffled null.

    `median` is over the same latents; `n_latents` counts those whose score is known, `missing` the others.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (kind, _, scorer), row in latest(rows).items():
        groups.setdefault((scorer, kind), []).append(row)
    out = []
    for (scorer, kind), some in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != LATENT, item[0][1])):
        values = [row["value"] for row in some if row["value"] is not None]
        nulls = [row["shuffled"] for row in some if row["shuffled"] is not None]
        if not values:
            continue
        estimate = mean_estimate(values)
        chances = [row["chance"] for row in some if row["chance"] is not None]
        out.append(
            {
                "scorer": scorer,
                "kind": kind,
                "mean": estimate.value,
                "low": _known(estimate.low),
                "high": _known(estimate.high),
                "median": float(np.median(values)),
                "shuffled": float(np.mean(nulls)) if nulls else None,
                "chance": float(np.mean(chances)) if chances else None,
                "n_latents": len(values),
                "missing": len(some) - len(values),
            }
        )
    return out


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
