"""Is the judge to be believed? Planted items with known answers, by kind and mode, and texts that talk to the judge.

    .venv/bin/python benchmarks/judge_validity.py [--out FILE.json] [--markdown FILE.md]

Starts a Ray and one judge replica of its own. Concepts are planted in the corpus (`sae_ray.judge.planting`): half of
each kind fit threshold and Platt map, the other half are what is reported. "unnamed" are topical positives without a
word of the label, on which a word matcher, whose row is the floor to beat, is at chance by construction. After that
the calibration's anchors are asked again past every cache (drift), and each injection of `sae_ray.judge.injection` is
put into planted contexts. "levelled" verdicts are relative to the explanation's mean over reference texts of the
corpus (`sae_ray.judge.levels`). Last, what fuzzing rests on: the concept's words highlighted against as many others of
the same text, named after it as our scorer does ("in focus") and marked in it as delphi does ("<<in line>>").
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import CorpusConfig, JudgeConfig, ModelConfig
from sae_ray.corpus import open_corpus
from sae_ray.judge.calibration import UNNAMED, Calibration, ModeCalibration, anchors_of, measure
from sae_ray.judge.client import JudgeClient
from sae_ray.judge.deploy import JudgeApp
from sae_ray.judge.drift import DriftCheck
from sae_ray.judge.injection import MOST_EXTRA_FLIPS, MOST_SHIFT_SD, injection_report
from sae_ray.judge.levels import Levelled
from sae_ray.judge.planting import KINDS, Concept, PlantedItem, find_concepts, plant_items, words_of
from sae_ray.judge.prompts import MODES, PROMPT_VERSION, Mode, focused
from sae_ray.judge.scores import auroc

REFERENCES = 16
REPO = Path(__file__).parents[1]


def main() -> None:
    args = arguments()
    # Generous times: a busy machine makes the figures of time worthless, but not the others.
    cfg = JudgeConfig(model=args.judge, kv_cache_gb=1, start_timeout_s=900, deadline_s=900)
    tokenizer = load_tokenizer(ModelConfig())
    documents = list(itertools.islice(open_corpus(CorpusConfig()).documents(args.seed), args.documents))
    planting = (documents, args.concepts, args.texts, args.context_tokens, tokenizer, args.seed)
    items, trials = plant_items(*planting), highlights(find_concepts(*planting), args.seed)
    cut = (
        tokenizer.encode(d, add_special_tokens=False)[: args.context_tokens] for d in documents[:: len(documents) // 64]
    )
    planted = {item.text for item in items}
    whole = (tokenizer.decode(ids) for ids in cut if len(ids) == args.context_tokens)
    references = list(itertools.islice((text for text in whole if text not in planted), REFERENCES))
    ray.init(
        num_cpus=8, object_store_memory=400 << 20, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPO)}},
    )  # fmt: skip
    app = JudgeApp(cfg, "validity")
    try:
        started = time.monotonic()
        app.start()
        if not app.ready(cfg.start_timeout_s):
            raise SystemExit(f"the judge did not start within {cfg.start_timeout_s:g} s: {app.status()}")
        start_s = time.monotonic() - started
        found = asyncio.run(examine(app, cfg, items, trials, references, args.modes, args.per_injection))
    finally:
        app.shutdown()
        ray.shutdown()
    found |= {
        "judge": args.judge, "prompt_version": PROMPT_VERSION, "machine": machine(), "start_s": start_s,
        "concepts": {kind: len({i.explanation for i in items if i.kind == kind}) for kind in KINDS},
        "items": len(items), "context_tokens": args.context_tokens, "documents": len(documents),
        "word_matcher": word_matcher(items),
    }  # fmt: skip
    console = Console(width=150)
    tables = [auroc_table(found), cost_table(found), injection_table(found), highlight_table(found)]
    for title, columns, rows in tables:
        table = Table(title=title)
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    if args.markdown:
        args.markdown.write_text("\n\n".join(markdown(*table) for table in tables) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge validity on planted items.")
    parser.add_argument("--judge", default="smollm2-135m-instruct", help="as judge.model")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--concepts", type=int, default=120, help="half lexical, half topical")
    parser.add_argument("--texts", type=int, default=4, help="contexts per concept")
    parser.add_argument("--context-tokens", type=int, default=32)
    parser.add_argument("--documents", type=int, default=4000, help="of the built-in corpus, to plant concepts in")
    parser.add_argument("--per-injection", type=int, default=8, help="contexts that each injection is put into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON, with every verdict")
    parser.add_argument("--markdown", type=Path, help="the tables as Markdown")
    return parser.parse_args()


async def examine(
    app: JudgeApp,
    cfg: JudgeConfig,
    items: Sequence[PlantedItem],
    trials: Sequence[Highlighted],
    references: Sequence[str],
    modes: Sequence[Mode],
    per_injection: int,
) -> dict[str, Any]:
    """Verdicts, costs, drift, injections and highlights of each mode; every number that the tables are made of."""
    found: dict[str, Any] = {"modes": {}, "verdicts": {}}
    pairs = [(item.text, item.explanation) for item in items]
    for mode in modes:
        client = JudgeClient(app.handle(), cfg)
        judge = Levelled(client, references)
        # The replica's first requests pay for its warm-up.
        await client.score(pairs[:2], mode, use_cache=False)
        before = replace(client.counters)
        started = time.monotonic()
        verdicts = await client.score(pairs, mode)
        seconds = time.monotonic() - started
        after = replace(client.counters)
        levelled = await judge.score(pairs, mode)
        calibrated, relative = measure(mode, items, verdicts, seconds), measure(mode, items, levelled, seconds)
        if calibrated is None or relative is None:
            raise SystemExit(f"{mode}: too few planted items were answered: {client.last_error}")
        for level, part in (("as read", calibrated), ("levelled", relative)):
            kinds = ", ".join(f"{kind} {each.auroc.value:.3f}" for kind, each in part.kinds.items())
            print(f"{mode}, {level}: AUROC {part.auroc.value:.3f} ({kinds}) in {seconds:.0f} s", flush=True)
        anchors = Calibration(mode, {mode: calibrated}, anchors=anchors_of(items, verdicts))
        drift = await DriftCheck(anchors).check(
            lambda some, m, client=client: client.score(some, m, use_cache=False), len(items)
        )
        held_out = [item for item in items if item.held_out]
        injections = await injection_report(judge, mode, held_out, relative.threshold, per_injection)
        highlighted = await highlight_report(client, mode, trials)
        print(f"{mode}: {drift.summary}", flush=True)
        found["verdicts"][mode] = {"as read": verdicts, "levelled": levelled}
        found["modes"][mode] = {
            "calibration": {"as read": asdict(calibrated), "levelled": asdict(relative)},
            "seconds": seconds,
            "verdicts_per_s": len(items) / seconds,
            **{
                f"{name}_per_verdict": (getattr(after, name) - getattr(before, name)) / len(items)
                for name in ("prompt_tokens", "cached_tokens", "output_tokens")
            },
            "drift": {**asdict(drift), "summary": drift.summary},
            "injections": {**asdict(injections), "holds": injections.holds},
            "highlights": highlighted,
        }
    found["planted"] = [asdict(item) for item in items]
    return found


class Highlighted(NamedTuple):
    """A text with words highlighted in both ways, and whether they are the concept's; `kind` as of planted items."""

    in_focus: str
    in_line: str
    label: str
    positive: bool
    kind: str


def highlights(concepts: Sequence[Concept], seed: int) -> list[Highlighted]:
    """Each planted text twice: the concept's own words in it, at most four, and as many other words of it."""
    rng, trials = np.random.default_rng([seed, 7]), []
    for concept in concepts:
        for text, named in zip(concept.texts, concept.named, strict=True):
            found = list(dict.fromkeys(re.findall(r"[A-Za-z]{4,}", text)))
            own = [word for word in found if word.lower() in concept.words][:4]
            others = [word for word in found if word.lower() not in concept.words]
            if not own or len(others) < len(own):
                continue
            drawn = {others[i] for i in rng.permutation(len(others))[: len(own)]}
            for words, positive in ((own, True), ([word for word in others if word in drawn], False)):
                marked = re.sub(rf"\b({'|'.join(words)})\b", r"<<\1>>", text)
                kind = concept.kind if named else UNNAMED
                trials.append(Highlighted(focused(text, words), marked, concept.label, positive, kind))
    return trials


async def highlight_report(client: JudgeClient, mode: Mode, trials: Sequence[Highlighted]) -> dict[str, Any]:
    """By way of highlighting: AUROC by kind, and computed prompt tokens per verdict where the plain texts were read."""
    ways = {
        "in focus": [(trial.in_focus, trial.label) for trial in trials],
        "<<in line>>": [(trial.in_line, f"the marked words: {trial.label}") for trial in trials],
    }
    found = {}
    for way, pairs in ways.items():
        before = replace(client.counters)
        verdicts = await client.score(pairs, mode)
        after = client.counters
        computed = after.prompt_tokens - before.prompt_tokens - after.cached_tokens + before.cached_tokens
        parts = {}
        for kind in (*KINDS, UNNAMED):
            mine = [(v, t.positive) for v, t in zip(verdicts, trials, strict=True) if v is not None and t.kind == kind]
            yes, no = ([v for v, positive in mine if positive is wanted] for wanted in (True, False))
            if yes and no:
                parts[kind] = asdict(auroc(yes, no))
        found[way] = {"kinds": parts, "computed": computed / len(pairs)}
    return found


def word_matcher(items: Sequence[PlantedItem]) -> dict[str, float]:
    """AUROC of "how many words of the explanation the text holds", on held-out items by kind."""
    held_out = [item for item in items if item.held_out]
    verdicts = [float(len(words_of(i.explanation) & words_of(i.text))) for i in held_out]
    # `measure` wants both halves; the matcher has nothing to fit.
    both = [*held_out, *(replace(item, held_out=False) for item in held_out)]
    found = measure("likelihood", both, verdicts * 2, 0.0)
    if found is None:
        return {}
    return {"all": found.auroc.value, **{kind: each.auroc.value for kind, each in found.kinds.items()}}


Rows = tuple[str, list[str], list[list[str]]]


def auroc_table(found: dict[str, Any]) -> Rows:
    columns = ["mode", "kind", "AUROC", "95% interval", "items", "false yes", "false no", "Platt a, b"]
    rows: list[list[str]] = []
    for mode, each in found["modes"].items():
        parts = [
            (level, kind, part)
            for level, whole in each["calibration"].items()
            for kind, part in (("all", whole), *whole["kinds"].items())
        ]
        for level, kind, raw in parts:
            part = ModeCalibration.from_dict(raw)
            rows.append([
                f"{mode}, {level}", kind, f"{part.auroc.value:.3f}", f"{part.auroc.low:.3f} to {part.auroc.high:.3f}",
                str(part.items), f"{part.false_positive:.3f}", f"{part.false_negative:.3f}",
                f"{part.platt_a:.2f}, {part.platt_b:.2f}",
            ])  # fmt: skip
    for kind in ("all", *KINDS, UNNAMED):
        if kind in found["word_matcher"]:
            rows.append(["word matcher", kind, f"{found['word_matcher'][kind]:.3f}", *["-"] * 5])
    title = f"{found['judge']}, prompts {found['prompt_version']}: {found['concepts']} concepts, held-out half"
    return title, columns, rows


def cost_table(found: dict[str, Any]) -> Rows:
    columns = [
        "mode",
        "verdicts/s",
        "prompt tokens",
        "cached",
        "output",
        "asked again: within tolerance",
        "largest, nats",
    ]
    rows = [
        [
            mode, f"{each['verdicts_per_s']:.1f}", f"{each['prompt_tokens_per_verdict']:.1f}",
            f"{each['cached_tokens_per_verdict']:.1f}", f"{each['output_tokens_per_verdict']:.1f}",
            f"{each['drift']['equal']} of {each['drift']['answered']}", f"{each['drift']['largest']:.3f}",
        ]
        for mode, each in found["modes"].items()
    ]  # fmt: skip
    return f"Per verdict, {found['context_tokens']}-token texts; {found['machine']}", columns, rows


def injection_table(found: dict[str, Any]) -> Rows:
    columns = [
        "mode",
        "family",
        "shift, sd",
        "95% interval",
        "distance (neutral)",
        "flips (neutral)",
        "AUROC (neutral)",
        "holds",
    ]
    rows: list[list[str]] = []
    for mode, each in found["modes"].items():
        report = each["injections"]
        for part in (report["total"], *report["families"]):
            within = abs(part["shift_sd"]) < MOST_SHIFT_SD
            still = part["flips"] - part["neutral_flips"] <= MOST_EXTRA_FLIPS
            rows.append([
                mode, part["family"], f"{part['shift_sd']:+.2f}", f"{part['low']:+.2f} to {part['high']:+.2f}",
                f"{part['distance_sd']:.2f} ({part['neutral_distance_sd']:.2f})",
                f"{part['flips']:.2f} ({part['neutral_flips']:.2f})", _pair(part["auroc"], part["auroc_neutral"]),
                "yes" if within and still else "no",
            ])  # fmt: skip
        rows.append(
            [
                mode,
                "canaries",
                f"{report['flagged']:.2f} flagged",
                f"{report['false_alarm']:.2f} of ordinary",
                *["-"] * 4,
            ]
        )
    return "Texts that talk to the judge, against ordinary sentences of their length", columns, rows


def highlight_table(found: dict[str, Any]) -> Rows:
    rows = []
    for mode, each in found["modes"].items():
        for way, part in each["highlights"].items():
            shown = (
                f"{k['value']:.3f} ({k['low']:.3f} to {k['high']:.3f})" if (k := part["kinds"].get(kind)) else "-"
                for kind in (*KINDS, UNNAMED)
            )
            rows.append([mode, way, *shown, f"{part['computed']:.1f}"])
    columns = ["mode", "highlighted", *KINDS, UNNAMED, "computed tokens"]
    return "The concept's words against as many others of the same text, AUROC (95% interval)", columns, rows


def _pair(value: float, neutral: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} ({neutral:.3f})"


def markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{cores} cores of {name}"


if __name__ == "__main__":
    main()
