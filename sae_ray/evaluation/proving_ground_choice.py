"""How a run chooses explanations, in the proving ground: candidates that compete on verdicts, which err and cost.

Texts are planned by the run's own code (`reward.evidence`: positives, near misses, siblings and random ones, each with
its weight) and the winner is chosen by it (`reward.specificity`). Only the explainer is a stand-in: it names the
features that SHOWN active samples show more often than random ones, so a child, its parents and what fires with them.

Suffixes: T samples, M latents, F features.
"""

from __future__ import annotations

import numpy as np
import torch

from sae_ray.evaluation.synthetic_judge import SHOWN, OracleJudge
from sae_ray.reward.evidence import POSITIVE, ContextScan, Quota, plan_latent, sibling_columns
from sae_ray.reward.specificity import Judged, JudgedTexts, choose_specific, far_ratio

CANDIDATES = 4  # as `rlaif.candidates`
KINDS = 4  # of texts, as many of each


def choose(judge: OracleJudge, margin_TM: torch.Tensor, on_TF: torch.Tensor, verdicts: int) -> torch.Tensor:
    """The feature that each latent is taken for, int64 [M].

    Args:
        margin_TM: pre-activations less thresholds; a latent is active where it is at least 0. One that is not active
            often enough to be explained gets feature 0.
        verdicts: that the candidates of one latent may cost together.
    """
    margin = margin_TM.numpy()
    # An activation of 0 would be no activation.
    scan = ContextScan(
        np.arange(margin.shape[1]),
        np.where(margin >= 0, np.maximum(margin, np.finfo(np.float32).tiny), 0),
        margin,
        np.broadcast_to(np.arange(len(margin))[:, None], margin.shape),
    )
    each = verdicts // (CANDIDATES * KINDS)
    quota = Quota(each, each, each, each, SHOWN)
    seed = judge.verdicts_spent
    latents, offered, told, texts = [], [], [], []
    for latent, sibling in enumerate(sibling_columns(scan, scan.latents)):
        siblings = [] if sibling is None else [scan.act_CN[:, sibling] > 0]
        plan = plan_latent(scan, latent, siblings, quota, (seed,))
        if plan.explainer:
            context_V = torch.tensor([verdict.context for verdict in plan.verdicts], dtype=torch.int64)
            feature = judge.candidates(torch.tensor(plan.explainer), on_TF, CANDIDATES)
            verdict = judge.verdicts(context_V.repeat(CANDIDATES), feature.repeat_interleave(len(context_V)), on_TF)
            latents.append(latent)
            offered.append(feature)
            told.append(list(verdict.view(CANDIDATES, -1).numpy()))
            texts.append(
                JudgedTexts(
                    np.array([verdict.kind == POSITIVE for verdict in plan.verdicts], dtype=bool),
                    np.array([verdict.weight for verdict in plan.verdicts]),
                    np.array([verdict.kind for verdict in plan.verdicts]),
                )
            )
    ratio = far_ratio(zip(told, texts, strict=True))
    found_M = torch.zeros(margin.shape[1], dtype=torch.int64)
    for latent, feature, rows, judged in zip(latents, offered, told, texts, strict=True):
        chosen = choose_specific([Judged(row, 1.0) for row in rows], judged, ratio)
        found_M[latent] = feature[0 if chosen is None else chosen.index]
    return judge.misnamed(found_M)
