"""Held-out detection: does what a judge reads off an explanation tell where a latent is active?

Explanations come from the evidence split, verdicts from the held-out split. Every score stands beside two
nulls: the explanation of another latent on the same texts (shuffled), and latents that are random directions
with the same densities, explained and judged by the same procedure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sae_ray.activations.block import Block
from sae_ray.config import RunConfig
from sae_ray.judge.scores import mean_estimate, soft_f1
from sae_ray.reward.contexts import ContextTexts
from sae_ray.reward.evidence import (
    POSITIVE,
    ContextLayout,
    ContextScan,
    LatentPlan,
    Quota,
    choose_latents,
    density_matched_threshold,
    layout_contexts,
    make_plans,
    plan_latent,
    scan_contexts,
    sibling_columns,
)
from sae_ray.reward.pool_judge import PoolJudge
from sae_ray.reward.rounds import Candidate, Choice, Detection, compete, detect
from sae_ray.sae.inference import TrainedSAE

MIN_POSITIVES = 4  # active held-out contexts below which a latent's AUROC would say nothing
EXAMPLES = 6


@dataclass(frozen=True)
class SplitView:
    """The blocks of one split, laid out as contexts: what main reads there."""

    raw_TD: torch.Tensor
    layout: ContextLayout
    texts: ContextTexts

    @classmethod
    def of(cls, config: RunConfig, stored: list[dict[str, Any]]) -> SplitView:
        blocks = [Block.from_numpy_dict(block) for block in stored]
        sequences, length = blocks[0].tokens_SL.shape
        layout = layout_contexts(
            [(block.seq_T, block.pos_T) for block in blocks], sequences, length, config.judge.context_tokens
        )
        return cls(
            torch.cat([block.acts_TD(torch.float32, config.hook.name) for block in blocks]),
            layout,
            ContextTexts(config, stored),
        )

    def scan(self, sae: TrainedSAE, latents: np.ndarray) -> ContextScan:
        rows = torch.from_numpy(latents)
        W_ND, b_N = sae.W_enc_MD[rows], sae.b_enc_M[rows]
        threshold_N = sae.threshold.to(W_ND.dtype).expand(sae.d_sae)[rows]
        return scan_contexts(self.raw_TD * sae.input_scale, self.layout, latents, W_ND, b_N, sae.centre_D, threshold_N)

    def activations(self, sae: TrainedSAE, latent: int, context: int) -> list[float]:
        """Activation of each position of a context, 0 where inactive or not kept."""
        here = torch.nonzero(self.layout.context_T == context).view(-1)
        f_T = sae.encode_latent(self.raw_TD[here], latent)
        out = [0.0] * len(self.texts.pieces(context))
        for offset, value in zip(self.layout.offset_T[here].tolist(), f_T.tolist(), strict=True):
            if offset < len(out):
                out[offset] = round(value, 4)
        return out


async def measure_detection(
    config: RunConfig,
    versions: dict[str, TrainedSAE],
    evidence: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    bank: list[dict[str, Any]],
    judge: PoolJudge,
    say: Callable[[str], None] = lambda _: None,
    detector: PoolJudge | None = None,
) -> dict[str, Any]:
    """Detection of every version, both nulls, and paired differences between versions.

    Args:
        judge: the run's own, who explains what has no explanation yet and chooses among candidates.
        detector: who reads the held-out texts; None: the run's own judge.
    Returns:
        The `detection`, `paired` and `latents` parts of `evaluation.json`.
    """
    detector = detector or judge
    rng = np.random.default_rng([config.seed, 11])
    seen, unseen = SplitView.of(config, evidence), SplitView.of(config, heldout)
    first = next(iter(versions.values()))
    judged = sorted({row["latent"] for row in bank if row["chosen"] and row["purpose"] == "score"})
    latents = np.array(judged[: config.evaluation.latents], dtype=np.int64)
    if not len(latents):
        latents = _unjudged_latents(config, first, seen, rng)
    evidence_scans = {name: seen.scan(sae, latents) for name, sae in versions.items()}
    explanations = {name: explanations_by_bank(bank, scan) for name, scan in evidence_scans.items()}
    for name, scan in evidence_scans.items():
        missing = [int(latent) for latent in latents if int(latent) not in explanations[name]]
        if missing:
            say(f"explaining {len(missing)} latents of {name}")
            explanations[name] |= await _explain(config, scan, missing, seen, judge)

    table: dict[str, Any] = {}
    by_latent: dict[int, dict[str, Any]] = {
        int(latent): {"latent": int(latent), "versions": {}, "examples": {}} for latent in latents
    }
    for name, sae in versions.items():
        say(f"judging {name} on held-out texts")
        scan = unseen.scan(sae, latents)
        choices = _heldout_choices(config, scan, explanations[name])
        found, verdicts = await _detect(choices, unseen.texts, detector, rng)
        table[name] = summary(found)
        for choice, detection in zip(choices, found, strict=True):
            entry, latent = by_latent[choice.plan.latent], choice.plan.latent
            column = int(np.flatnonzero(scan.latents == latent)[0])
            entry["versions"][name] = _latent_entry(choice, detection, scan, column)
            entry["examples"][name] = _examples(choice, verdicts, unseen, sae, latent, scan, column)
    if config.evaluation.random_directions:
        say("judging random directions of the same densities")
        densities = (evidence_scans[next(iter(versions))].act_CN > 0).sum(0)
        found = await _random_directions(config, first, densities, seen, unseen, judge, detector, rng)
        table["random_directions"] = summary(found)
    entries = [entry for entry in by_latent.values() if entry["versions"]]
    return {"detection": table, "paired": paired_differences(entries, list(versions)), "latents": entries}


def explanations_by_bank(bank: list[dict[str, Any]], scan: ContextScan) -> dict[int, Candidate]:
    """For each latent, the banked explanation that fits this version's activity best on the evidence split.

    Verdicts do not depend on the SAE, so every version can choose among all explanations without asking again.
    """
    column_of = {int(latent): column for column, latent in enumerate(scan.latents)}
    chosen = {(row["latent"], row["explanation"]): row["explainer"] for row in bank if row["chosen"]}
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {key: [] for key in chosen}
    for row in bank:
        key = (row["latent"], row["explanation"])
        if key in rows and row["purpose"] != "shuffled" and row["score"] is not None:
            rows[key].append(row)
    found: dict[int, Candidate] = {}
    for latent, column in column_of.items():
        candidates = [key for key in rows if key[0] == latent and rows[key]]
        if candidates:
            best = max(candidates, key=lambda key: _fit(rows[key], scan.act_CN[:, column]))
            found[latent] = Candidate(best[1], chosen[best])
    return found


def _fit(rows: list[dict[str, Any]], act_C: np.ndarray) -> float:
    """F1 of banked verdicts against where a latent is active."""
    return soft_f1(
        np.array([row["probability"] for row in rows]),
        np.array([act_C[row["context"]] > 0 for row in rows]),
        np.array([row["weight"] for row in rows]),
    )


def _unjudged_latents(config: RunConfig, sae: TrainedSAE, view: SplitView, rng: np.random.Generator) -> np.ndarray:
    counts = np.zeros(sae.d_sae, dtype=np.int64)
    for start in range(0, sae.d_sae, 512):
        ids = np.arange(start, min(start + 512, sae.d_sae))
        counts[ids] = (view.scan(sae, ids).act_CN > 0).sum(0)
    need = config.rlaif.positives + config.rlaif.explainer_examples
    return choose_latents(
        counts, view.layout.n_contexts, config.evaluation.latents, need, config.rlaif.max_context_share, rng
    )


async def _explain(
    config: RunConfig, scan: ContextScan, latents: list[int], view: SplitView, judge: PoolJudge
) -> dict[int, Candidate]:
    judge.bind(view.texts, scan)
    plans = [plan for plan in make_plans(config, scan) if plan.latent in set(latents)]
    choices, _ = await compete(plans, {}, view.texts, judge, lambda *args, **kwargs: {})
    return {choice.plan.latent: choice.explanation for choice in choices}


def _heldout_choices(config: RunConfig, scan: ContextScan, explanations: dict[int, Candidate]) -> list[Choice]:
    """Held-out contexts for each explained latent; all of them score, none of them chose."""
    settings = config.evaluation
    per_kind = max(1, settings.negatives // 3)
    quota = Quota(settings.positives, per_kind, per_kind, settings.negatives - 2 * per_kind, explainer=0)
    siblings = sibling_columns(scan, np.arange(len(scan.latents)))
    choices = []
    for column, latent in enumerate(scan.latents.tolist()):
        if latent not in explanations or (scan.act_CN[:, column] > 0).sum() < MIN_POSITIVES:
            continue
        alike = siblings[column]
        of_alike = [] if alike is None else [scan.act_CN[:, alike] > 0]
        plan = plan_latent(scan, column, of_alike, quota, (config.seed, 13))
        verdicts = [replace(verdict, select=False) for verdict in plan.verdicts]
        choices.append(Choice(replace(plan, verdicts=verdicts), explanations[latent]))
    return choices


async def _detect(
    choices: list[Choice], texts: ContextTexts, judge: PoolJudge, rng: np.random.Generator
) -> tuple[list[Detection], dict[tuple[int, int], float]]:
    """Detections, and P(explanation holds) by (latent, context)."""
    probabilities: dict[tuple[int, int], float] = {}

    def note(plan: LatentPlan, candidate: Candidate, verdict: Any, raw: float | None, **about: Any) -> dict[str, Any]:
        if raw is not None and about["purpose"] == "score":
            probabilities[plan.latent, verdict.context] = judge.probability(candidate.text, raw)
        return {}

    found, _ = await detect(choices, texts, judge, note, rng)
    return found, probabilities


async def _random_directions(
    config: RunConfig,
    sae: TrainedSAE,
    densities: np.ndarray,
    seen: SplitView,
    unseen: SplitView,
    judge: PoolJudge,
    detector: PoolJudge,
    rng: np.random.Generator,
) -> list[Detection]:
    n = config.evaluation.random_directions
    W_ND = torch.from_numpy(rng.normal(size=(n, sae.d_in))).to(sae.W_enc_MD)
    W_ND = W_ND / W_ND.norm(dim=1, keepdim=True)
    ids, zeros_N = np.arange(n), torch.zeros(n).to(W_ND)
    raw = scan_contexts(seen.raw_TD * sae.input_scale, seen.layout, ids, W_ND, zeros_N, sae.centre_D, zeros_N)
    wanted = rng.choice(densities, size=n)
    threshold_N = torch.from_numpy(density_matched_threshold(raw.margin_CN, wanted)).to(W_ND)
    # A threshold below zero would let the ReLU cut first; shifting the bias keeps the density.
    shift_N = (1e-3 - threshold_N).clamp(min=0)
    scans = [
        scan_contexts(
            view.raw_TD * sae.input_scale, view.layout, ids, W_ND, shift_N, sae.centre_D, threshold_N + shift_N
        )
        for view in (seen, unseen)
    ]
    explanations = await _explain(config, scans[0], ids.tolist(), seen, judge)
    choices = _heldout_choices(config, scans[1], explanations)
    found, _ = await _detect(choices, unseen.texts, detector, rng)
    return found


def _latent_entry(choice: Choice, found: Detection, scan: ContextScan, column: int) -> dict[str, Any]:
    return {
        "auroc": _finite(found.auroc),
        "standard_error": _finite(found.standard_error),
        "low": _finite(found.low),
        "high": _finite(found.high),
        "shuffled": _finite(found.shuffled),
        "explanation": choice.explanation.text,
        "explainer": choice.explanation.explainer,
        "density": float((scan.act_CN[:, column] > 0).mean()),
        "n_verdicts": found.n_verdicts,
    }


def _examples(
    choice: Choice,
    verdicts: dict[tuple[int, int], float],
    view: SplitView,
    sae: TrainedSAE,
    latent: int,
    scan: ContextScan,
    column: int,
) -> list[dict[str, Any]]:
    """The strongest judged positives, and a near miss, with per-token activations."""
    positives = [v.context for v in choice.plan.verdicts if v.kind == POSITIVE]
    positives.sort(key=lambda context: -scan.act_CN[context, column])
    others = [(v.context, v.kind) for v in choice.plan.verdicts if v.kind != POSITIVE][:1]
    shown = [(context, POSITIVE) for context in positives[: EXAMPLES - len(others)]] + others
    return [
        {
            "tokens": view.texts.pieces(context),
            "activations": view.activations(sae, latent, context),
            "verdict_probability": verdicts.get((latent, context)),
            "kind": kind,
        }
        for context, kind in shown
    ]


def summary(found: list[Detection]) -> dict[str, Any]:
    """Mean AUROC over latents and its bootstrap interval, the same for the shuffled null."""
    own = [d.auroc for d in found if np.isfinite(d.auroc)]
    null = [d.shuffled for d in found if np.isfinite(d.shuffled)]
    mean, low, high = _mean(own)
    shuffled, shuffled_low, shuffled_high = _mean(null)
    return {
        "auroc": mean, "low": low, "high": high, "shuffled": shuffled, "shuffled_low": shuffled_low,
        "shuffled_high": shuffled_high, "n_latents": len(own),
    }  # fmt: skip


def _mean(values: list[float]) -> tuple[float | None, float | None, float | None]:
    if not values:
        return None, None, None
    estimate = mean_estimate(values)
    return estimate.value, _finite(estimate.low), _finite(estimate.high)


def paired_differences(entries: list[dict[str, Any]], versions: list[str]) -> list[dict[str, Any]]:
    """Mean AUROC difference over the latents that both versions have, with bootstrap intervals."""
    pairs = [("rlaif", "control"), ("rlaif", "before"), ("control", "before")]
    out = []
    for a, b in pairs:
        if a in versions and b in versions:
            differences = [
                entry["versions"][a]["auroc"] - entry["versions"][b]["auroc"]
                for entry in entries
                if all((entry["versions"].get(v) or {}).get("auroc") is not None for v in (a, b))
            ]
            mean, low, high = _mean(differences)
            out.append({"name": f"{a} - {b}", "difference": mean, "low": low, "high": high, "n": len(differences)})
    return out


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
