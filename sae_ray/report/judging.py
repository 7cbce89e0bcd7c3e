"""`render_judging`: a judging's folder in, one HTML page out that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from sae_ray import __version__
from sae_ray.activations.subject import load_tokenizer
from sae_ray.config_file import load_config
from sae_ray.evidence.files import is_written, read_evidence
from sae_ray.evidence.types import EvidenceSet, LatentEvidence
from sae_ray.judging import results
from sae_ray.judging.gather import evidence_prefix
from sae_ray.report.features import Example, example_of
from sae_ray.report.render import FILE_NAME, AurocAxis, asset, environment
from sae_ray.storage import LocalStorage

N_SHOWN = 8
TEXTS_SHOWN = 5


@dataclass(frozen=True)
class JudgedLatent:
    """A latent as the page lists it; `scores` by scorer, `texts` only of those shown in full."""

    latent: int
    explanation: str
    explainer: str
    density: float
    scores: dict[str, dict[str, Any]]
    rank: float | None  # first scorer's value minus its shuffled null
    texts: list[Example]
    promoted: list[str]
    siblings: list[int]


def render_judging(folder: Path) -> Path:
    """Writes `folder/report.html` from what is committed there. Returns its path."""
    storage = LocalStorage(folder)
    config = load_config(folder / "judging.yaml")
    summary = json.loads(storage.read("summary.json"))
    rows = results.latest(results.read(storage, "scores"))
    prefix = evidence_prefix(results.LATENT)
    found = read_evidence(storage, prefix, load_tokenizer(config.model)) if is_written(storage, prefix) else None
    latents = _latents(rows, found, config.judging.scorers[0])
    shown = _shown(latents)
    verdicts = _verdicts(storage, {latent.latent for latent in shown}, config.judging.scorers[0])
    script = asset("page.js")
    page = (
        environment()
        .get_template("judging.html.j2")
        .render(
            style=Markup(asset("page.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            package_version=__version__,
            config=config,
            summary=summary,
            axis=_axis(summary["scores"]),
            tables=_tables(summary["scores"]),
            calibrations=_calibrations(storage),
            latents=latents,
            scorers=config.judging.scorers,
            best=[_full(latent, found, verdicts) for latent in shown[: len(shown) // 2 + len(shown) % 2]],
            worst=[_full(latent, found, verdicts) for latent in shown[len(shown) // 2 + len(shown) % 2 :]],
            skipped=len(found.skipped) if found else 0,
            config_text=config.to_yaml(),
        )
    )
    storage.write(FILE_NAME, page.encode("utf-8", errors="replace"))
    return folder / FILE_NAME


def _latents(
    rows: dict[tuple[str, int, str], dict[str, Any]], found: EvidenceSet | None, first: str
) -> list[JudgedLatent]:
    by_latent: dict[int, dict[str, dict[str, Any]]] = {}
    for (kind, latent, scorer), row in rows.items():
        if kind == results.LATENT:
            by_latent.setdefault(latent, {})[scorer] = row
    out = []
    for latent, scores in sorted(by_latent.items()):
        one = next(iter(scores.values()))
        known = found.latents.get(latent) if found else None
        main = scores.get(first, {})
        value, null = main.get("value"), main.get("shuffled")
        out.append(
            JudgedLatent(
                latent, one["explanation"], one["explainer"], known.density if known else math.nan, scores,
                None if value is None else value - (null if null is not None else main.get("chance") or 0),
                [], [text for text, _ in known.promoted[:6]] if known else [],
                [other for other, _, _ in known.siblings[:4]] if known else [],
            )
        )  # fmt: skip
    return out


def _shown(latents: list[JudgedLatent]) -> list[JudgedLatent]:
    """The best, then the worst by score over the shuffled null; none twice."""
    ranked = sorted((each for each in latents if each.rank is not None), key=lambda each: -(each.rank or 0))
    n = min(N_SHOWN, len(ranked) // 2)
    return ranked[:n] + ranked[len(ranked) - n :][::-1] if n else ranked


def _verdicts(storage: LocalStorage, latents: set[int], first: str) -> dict[tuple[int, int], float]:
    """(latent, context) -> the last calibrated verdict of the first scorer."""
    return {
        (row["latent"], row["context"]): row["probability"]
        for row in results.read(storage, "verdicts")
        if row["kind"] == results.LATENT
        and row["latent"] in latents
        and row["scorer"] == first
        and row["purpose"] == "score"
        and row["probability"] is not None
    }


def _full(judged: JudgedLatent, found: EvidenceSet | None, verdicts: dict[tuple[int, int], float]) -> JudgedLatent:
    if found is None or judged.latent not in found.latents:
        return judged
    latent = found.latents[judged.latent]
    positives = sorted(latent.positives("score"), key=lambda example: -float(example.acts_S.max()))
    # Texts that were judged come first: their verdict stands beside them.
    asked = [example for example in positives if (latent.latent, example.context) in verdicts]
    chosen = (asked + [example for example in positives if example not in asked])[:TEXTS_SHOWN]
    misses = [e for e in latent.negatives("score") if (latent.latent, e.context) in verdicts][:2]
    texts = [_text(example, latent, found, verdicts) for example in [*chosen, *misses]]
    return JudgedLatent(**{**vars(judged), "texts": texts})


def _text(example: Any, latent: LatentEvidence, found: EvidenceSet, verdicts: dict[tuple[int, int], float]) -> Example:
    pieces = found.contexts.pieces(example.context)
    row = {
        "tokens": pieces,
        "activations": example.acts_S[: len(pieces)].tolist(),
        "kind": example.stratum,
        "verdict_probability": verdicts.get((latent.latent, example.context)),
    }
    return example_of(row, latent.max_activation)


def _tables(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table per scorer; those whose chance is a half stand on the common axis."""
    out: dict[str, dict[str, Any]] = {}
    for row in scores:
        table = out.setdefault(row["scorer"], {"scorer": row["scorer"], "on_axis": _on_axis(row), "rows": []})
        table["rows"].append({**row, "auroc": row["mean"]})
    return list(out.values())


def _on_axis(row: dict[str, Any]) -> bool:
    return row["chance"] is not None and abs(row["chance"] - 0.5) < 1e-9


def _axis(scores: list[dict[str, Any]]) -> AurocAxis:
    values = [row[key] for row in scores if _on_axis(row) for key in ("low", "mean", "shuffled")]
    lowest = min((value for value in values if value is not None and np.isfinite(value)), default=0.5)
    return AurocAxis(max(0.0, min(0.4, math.floor(lowest * 10) / 10)))


def _calibrations(storage: LocalStorage) -> list[dict[str, Any]]:
    """Every role's modes on planted items."""
    out = []
    for role in ("scorer", "heldout"):
        if storage.exists(f"calibration-{role}.json"):
            report = json.loads(storage.read(f"calibration-{role}.json"))
            judge = str(report["judge"]).rsplit("/", 1)[-1]
            for mode, row in report["modes"].items():
                out.append({**row, "role": role, "judge": judge, "mode": mode, "used": mode == report["mode"]})
    return out
