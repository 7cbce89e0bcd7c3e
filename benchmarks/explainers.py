"""Which explainer writes the better explanations, in which form of prompt and marks? Of one SAE, judged by one judge.

    .venv/bin/python benchmarks/explainers.py runs/quickstart/saelens [--latents 0:64] [--out FILE.json]

One `sae-ray judge` per form, with all explainers: the candidates of a latent are judged on the same texts, which no
explainer saw and which score nothing else. AUROC: those verdicts, active texts against others, mean over latents.
"against lexical": the same less the AUROC of the lexical candidate, which asks no language model, on latents that have
both. A phrase that two explainers wrote counts as the first one's. One candidate of each explainer (the likeliest), so
that all have one try; "clusters" one of each meaning, the best of which counts. "chosen": how often it won.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from sae_ray.evidence.types import QUANTILE, TOP
from sae_ray.judge.scores import auroc, mean_estimate
from sae_ray.judging import results
from sae_ray.storage import LocalStorage

FORMS = {
    "few-shot, <<word>>": ("few_shot", "delimiters"),
    "few-shot, blocks": ("few_shot", "blocks"),
    "few-shot, pairs": ("few_shot", "pairs"),
    "chat, <<word>>": ("chat", "delimiters"),
    "chat, blocks": ("chat", "blocks"),
}
LEXICAL = "lexical"


class Candidate(NamedTuple):
    latent: int
    explainer: str
    words: int
    auroc: float
    chosen: bool


def judge(sae: str, latents: str, prompting: str, marks: str, clusters: int, runs: Path) -> LocalStorage:
    settings = {
        "runs_dir": runs,
        "ray.address": "local",
        "ray.local_cpus": 8,
        "ray.object_store_mb": 800,
        "judge.mode": "likelihood",
        "judging.prompting": prompting,
        "judging.marks": marks,
        "judging.explainers": "[max_activating,contrastive,logits,clusters,lexical]",
        "judging.candidates": 1,
        "judging.clusters": clusters,
        "judging.scorers": "[detection]",
        "judging.null_share": 0,
        "judging.random_directions": 0,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    name = f"{prompting}-{marks}"
    command = [sys.executable, "-m", "sae_ray.cli", "judge", sae, "--latents", latents, "--name", name, *sets]
    subprocess.run(command, check=True)
    return LocalStorage(runs / name)


def candidates(storage: LocalStorage) -> list[Candidate]:
    """Every candidate that was judged, with its AUROC; the best of an explainer that had several for a latent."""
    verdicts: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    for row in results.read(storage, "verdicts"):
        if row["purpose"] == "select" and row["raw"] is not None:
            sides = verdicts.setdefault((row["latent"], row["explanation"]), ([], []))
            sides[row["stratum"] not in (TOP, QUANTILE)].append(row["raw"])
    best: dict[tuple[int, str], Candidate] = {}
    for row in results.read(storage, "explanations"):
        active, inactive = verdicts.get((row["latent"], row["explanation"]), ([], []))
        if not active or not inactive:
            continue
        explainer = row["explainer"].split("/")[0]
        value = auroc(active, inactive).value
        found = Candidate(row["latent"], explainer, len(row["explanation"].split()), value, row["chosen"])
        known = best.get((row["latent"], explainer))
        chosen = found.chosen or (known is not None and known.chosen)
        best[row["latent"], explainer] = (found if known is None or value > known.auroc else known)._replace(
            chosen=chosen
        )
    return list(best.values())


def rows_of(form: str, found: list[Candidate]) -> list[dict[str, Any]]:
    lexical = {each.latent: each.auroc for each in found if each.explainer == LEXICAL}
    rows = []
    for explainer in sorted({each.explainer for each in found}):
        mine = [each for each in found if each.explainer == explainer]
        against = [each.auroc - lexical[each.latent] for each in mine if each.latent in lexical]
        mean = mean_estimate([each.auroc for each in mine])
        paired = mean_estimate(against) if explainer != LEXICAL and against else None
        rows.append({
            "form": form, "explainer": explainer, "latents": len(mine), "auroc": asdict(mean),
            "against_lexical": paired and asdict(paired), "chosen": fmean(each.chosen for each in mine),
            "words": fmean(each.words for each in mine),
        })  # fmt: skip
    return rows


def shown(estimate: dict[str, float] | None, signed: bool = False) -> str:
    if estimate is None or math.isnan(estimate["value"]):
        return "-"
    sign = "+" if signed else ""
    return f"{estimate['value']:{sign}.3f} ({estimate['low']:{sign}.3f} to {estimate['high']:{sign}.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sae", help="folder of any format that we read, with the model and hook that it is of")
    parser.add_argument("--latents", default="0:64", help="as `sae-ray judge --latents`")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--clusters", type=int, default=2, help="meanings that `clusters` may split a latent into")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    costs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in args.forms:
            storage = judge(args.sae, args.latents, *FORMS[form], args.clusters, Path(folder))
            rows += rows_of(form, candidates(storage))
            costs[form] = json.loads(storage.read("summary.json"))
    table = Table("form", "explainer", "latents", "AUROC (95% interval)", "against lexical", "chosen", "words")
    for row in rows:
        table.add_row(
            row["form"], row["explainer"], str(row["latents"]), shown(row["auroc"]),
            shown(row["against_lexical"], signed=True), f"{row['chosen']:.0%}", f"{row['words']:.1f}",
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    for form, summary in costs.items():
        failures, latents = summary["cost"]["parse_failures"], summary["latents"]
        score = next(each for each in summary["scores"] if each["scorer"] == "detection")
        console.print(
            f"{form}: {failures:.0f} answers of {latents} latents did not parse; detection of the chosen on other "
            f"texts {score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
        )
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "summaries": costs}, indent=1))


if __name__ == "__main__":
    main()
