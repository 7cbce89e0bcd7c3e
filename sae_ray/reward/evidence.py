"""Which texts a latent is judged on: scanning contexts, choosing latents, planning verdicts.

A context is `context_tokens` consecutive positions of one sequence. Contexts of a list of blocks are numbered
`(block * S + sequence) * (L // context_tokens) + chunk`, so that an index means the same thing on every
rank. All functions are pure; tensors stay where their caller lives.

Suffixes: T kept tokens, C contexts, N scanned latents, D d_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_ray.config import RunConfig

if TYPE_CHECKING:
    from sae_ray.reward.siblings import Neighbourhood

POSITIVE, NEAR_MISS, SIBLING, RANDOM = "positive", "near_miss", "sibling", "random"
COLUMNS_AT_ONCE = 512  # of correlations: no square of all scanned latents is ever held


@dataclass(frozen=True)
class ContextLayout:
    """Where each kept token of a list of blocks lies."""

    context_T: torch.Tensor  # int64: context index of each kept token
    offset_T: torch.Tensor  # int64: position of the token inside its context
    n_contexts: int
    context_tokens: int


@dataclass(frozen=True)
class ContextScan:
    """How strongly each of N latents responds to each of C contexts."""

    latents: np.ndarray  # int64 [N], global latent ids
    act_CN: np.ndarray  # float32: largest activation after the gate, 0 where inactive
    margin_CN: np.ndarray  # float32: largest pre-activation minus threshold; -inf where no token is kept
    token_CN: np.ndarray  # int32: kept-token index (over all blocks) of that largest pre-activation

    @staticmethod
    def merge(scans: list[ContextScan]) -> ContextScan:
        """Joins the scans of all tp shards, latents in ascending order."""
        latents = np.concatenate([scan.latents for scan in scans])
        order = np.argsort(latents, kind="stable")
        return ContextScan(
            latents[order],
            np.concatenate([scan.act_CN for scan in scans], axis=1)[:, order],
            np.concatenate([scan.margin_CN for scan in scans], axis=1)[:, order],
            np.concatenate([scan.token_CN for scan in scans], axis=1)[:, order],
        )


def layout_contexts(
    blocks: list[tuple[np.ndarray, np.ndarray]], sequences: int, length: int, context_tokens: int
) -> ContextLayout:
    """Lays out the contexts of `blocks`.

    Args:
        blocks: (seq_T, pos_T) of each block, in order.
        sequences, length: S and L, the same for every block.
    """
    chunks = length // context_tokens
    context, offset = [], []
    for index, (seq_T, pos_T) in enumerate(blocks):
        context.append((index * sequences + seq_T.astype(np.int64)) * chunks + pos_T // context_tokens)
        offset.append(pos_T.astype(np.int64) % context_tokens)
    return ContextLayout(
        torch.from_numpy(np.concatenate(context)),
        torch.from_numpy(np.concatenate(offset)),
        len(blocks) * sequences * chunks,
        context_tokens,
    )


def max_per_context(value_TN: torch.Tensor, layout: ContextLayout) -> torch.Tensor:
    """Largest value of each context, [C, N]; -inf where a context has no kept token."""
    out_CN = value_TN.new_full((layout.n_contexts, value_TN.shape[1]), -torch.inf)
    if layout.context_tokens == 1:  # nothing to compare, which a scatter is slow to find out
        return out_CN.index_copy_(0, layout.context_T, value_TN)
    return out_CN.scatter_reduce_(0, layout.context_T[:, None].expand_as(value_TN), value_TN, "amax")


def scan_contexts(
    x_TD: torch.Tensor,
    layout: ContextLayout,
    latents: np.ndarray,
    W_enc_ND: torch.Tensor,
    b_enc_N: torch.Tensor,
    b_dec_D: torch.Tensor,
    threshold_N: torch.Tensor,
) -> ContextScan:
    """Responses of N latents to all contexts; `x_TD` is the scaled SAE input."""
    pre_TN = torch.addmm(b_enc_N - W_enc_ND @ b_dec_D, x_TD.to(W_enc_ND.dtype), W_enc_ND.T)
    best_CN = max_per_context(pre_TN, layout)
    is_best_TN = pre_TN == best_CN[layout.context_T]
    token_T = torch.arange(len(pre_TN), dtype=torch.int64)[:, None]
    token_CN = torch.zeros(best_CN.shape, dtype=torch.int64).scatter_reduce_(
        0,
        layout.context_T[:, None].expand_as(pre_TN),
        torch.where(is_best_TN, token_T, torch.zeros_like(token_T)),
        "amax",
    )
    active_CN = (best_CN >= threshold_N) & (best_CN > 0)
    return ContextScan(
        np.asarray(latents, dtype=np.int64),
        torch.where(active_CN, best_CN, torch.zeros_like(best_CN)).float().numpy(),
        (best_CN - threshold_N).float().numpy(),
        token_CN.to(torch.int32).numpy(),
    )


def choose_latents(
    counts_M: np.ndarray, n_contexts: int, n: int, need: int, max_share: float, rng: np.random.Generator
) -> np.ndarray:
    """Latents to judge: enough active contexts to be judged on, not active everywhere, spread over densities.

    Args:
        counts_M: contexts in which each latent is active.
        need: fewest active contexts a latent must have.
        max_share: largest share of contexts it may be active in.
    Returns:
        Sorted global latent ids, at most `n`.
    """
    eligible = np.flatnonzero((counts_M >= need) & (counts_M <= max_share * n_contexts))
    if len(eligible) <= n:
        return eligible
    by_density = eligible[np.lexsort((rng.random(len(eligible)), counts_M[eligible]))]
    strata = np.array_split(by_density, n)
    return np.sort(np.array([rng.choice(stratum) for stratum in strata]))


@dataclass(frozen=True)
class PlannedVerdict:
    context: int
    kind: str
    weight: float  # inverse sampling propensity: contexts of its stratum that this one stands for
    select: bool  # True: used to choose the explanation; False: used to score the chosen one


@dataclass(frozen=True)
class LatentPlan:
    latent: int
    explainer: list[int]  # contexts shown to the explainer, strongest first; never judged
    verdicts: list[PlannedVerdict]
    unjudged: list[int]  # all active contexts that are not judged, strongest first: free for token statistics


@dataclass(frozen=True)
class Quota:
    """How many contexts of each kind a latent gets."""

    positives: int
    near_misses: int
    siblings: int
    randoms: int
    explainer: int


def make_plans(
    config: RunConfig,
    scan: ContextScan,
    number: int | None = None,
    latents: np.ndarray | None = None,
    near: Neighbourhood | None = None,
) -> list[LatentPlan]:
    """Plans for every latent that still has positives on both halves.

    Args:
        number: of the round, of which each draws its own texts where verdicts are kept; None: not one of the rounds.
        latents: of those that were scanned; None: all.
        near: what lies close to these latents in the whole decoder; None: siblings are scanned latents only.
    """
    settings = config.rlaif
    quota = Quota(
        settings.positives, settings.near_misses, settings.siblings, settings.randoms, settings.explainer_examples
    )
    draw = (config.seed, 10, number) if settings.keep_rounds and number is not None else None
    wanted = np.arange(len(scan.latents)) if latents is None else np.searchsorted(scan.latents, latents)
    alike = sibling_columns(scan, wanted) if quota.siblings else [None] * len(wanted)

    def plan(column: int, other: int | None) -> LatentPlan:
        siblings = [] if other is None else [scan.act_CN[:, other] > 0]
        if near is not None:
            siblings = near.siblings(scan, column, other)
        return plan_latent(scan, column, siblings, quota, (config.seed, 9), draw)

    plans = [plan(column, other) for column, other in zip(wanted.tolist(), alike, strict=True)]
    return [plan for plan in plans if _judgeable(plan)]


def _judgeable(plan: LatentPlan) -> bool:
    sides = {(verdict.select, verdict.kind == POSITIVE) for verdict in plan.verdicts}
    return len(sides) == 4 and bool(plan.explainer)


def plan_latent(
    scan: ContextScan,
    column: int,
    siblings: Sequence[np.ndarray],
    quota: Quota,
    seed: tuple[int, ...],
    draw: tuple[int, ...] | None = None,
) -> LatentPlan:
    """Chooses the explainer's examples and the contexts that one latent is judged on.

    Positives are spread over activation quantiles. Negatives are near misses (largest margin under the
    threshold), contexts of its siblings (their texts tell a specific explanation from a broad one; of the closest alone
    where it has enough of them), and random ones. Explainer and judged contexts are disjoint.

    Every context carries a fixed random key, and the lowest keys are taken: two versions of a latent that are
    active in nearly the same contexts are judged on nearly the same texts, so that differences between them are
    not drowned by the draw. Keys of random contexts are shared by all latents: the judge reads each text once.

    Weights sum to all contexts with a kept token: a kind that is not asked for is no stratum of its own, and its
    contexts are among the random ones.

    Args:
        siblings: in which contexts each of them is active, bool [C], the closest first.
        draw: a seed of the judged contexts' own, another one in each round: verdicts on other texts are what a round
            can add. One half of a latent's active contexts, the same in every round, is then for explainers and the
            other for judges, so that no round judges what an explainer of another has seen.
    """
    n_contexts = len(scan.act_CN)
    latent = int(scan.latents[column])
    fixed_C = np.random.default_rng([*seed, latent]).random(n_contexts)
    own_C = fixed_C if draw is None else np.random.default_rng([*draw, latent]).random(n_contexts)
    shared_C = np.random.default_rng(draw or seed).random(n_contexts)
    act_C, margin_C = scan.act_CN[:, column], scan.margin_CN[:, column]
    active = np.flatnonzero(act_C > 0)
    active = active[np.argsort(-act_C[active], kind="stable")]
    explains, judged = active, active
    if draw is not None:
        half_C = np.random.default_rng([*seed, latent, 1]).random(n_contexts) < 0.5
        explains, judged = active[half_C[active]], active[~half_C[active]]
    explainer = _for_explainer(explains, quota.explainer, fixed_C)
    positives = _spread(judged[~np.isin(judged, explainer)], quota.positives, own_C)

    inactive = np.flatnonzero((act_C == 0) & np.isfinite(margin_C))
    by_margin = inactive[np.argsort(-margin_C[inactive], kind="stable")]
    near_pool = by_margin[: max(4 * quota.near_misses, len(inactive) // 20) if quota.near_misses else 0]
    near = _lowest(near_pool, quota.near_misses, own_C)
    free_C = (act_C == 0) & np.isfinite(margin_C)
    free_C[near_pool] = False
    of_sibling_C = np.zeros(n_contexts, dtype=bool)
    for active_C in siblings:
        if of_sibling_C.sum() < quota.siblings:
            of_sibling_C |= active_C & free_C
    sibling_pool = np.flatnonzero(of_sibling_C)
    from_siblings = _lowest(sibling_pool, quota.siblings, own_C)
    far_pool = np.setdiff1d(inactive, np.concatenate([near_pool, sibling_pool]))
    randoms = _lowest(far_pool, quota.randoms, shared_C)

    verdicts: list[PlannedVerdict] = []
    strata = [
        (positives, POSITIVE, len(active)),
        (near, NEAR_MISS, len(near_pool)),
        (from_siblings, SIBLING, len(sibling_pool)),
        (randoms, RANDOM, len(far_pool)),
    ]
    for contexts, kind, population in strata:
        weight = population / max(1, len(contexts))
        verdicts += [PlannedVerdict(int(c), kind, weight, select=index % 2 == 0) for index, c in enumerate(contexts)]
    unjudged = explains[~np.isin(explains, positives)]
    return LatentPlan(latent, explainer.tolist(), verdicts, unjudged.tolist())


def _for_explainer(active: np.ndarray, n: int, key_C: np.ndarray) -> np.ndarray:
    """Half the examples from the strongest quarter, half from all others; at most half of what there is."""
    n = min(n, len(active) // 2)
    top = active[: max(n, len(active) // 4)]
    first = _lowest(top, (n + 1) // 2, key_C)
    second = _lowest(np.setdiff1d(active, first), n - len(first), key_C)
    return active[np.isin(active, np.concatenate([first, second]))]


def _spread(ordered: np.ndarray, n: int, key_C: np.ndarray) -> np.ndarray:
    """The lowest key of each of n quantile groups of `ordered`, in order of key."""
    groups = [group for group in np.array_split(ordered, n) if len(group)]
    chosen = np.array([group[key_C[group].argmin()] for group in groups], dtype=np.int64)
    return chosen[np.argsort(key_C[chosen], kind="stable")]


def _lowest(pool: np.ndarray, n: int, key_C: np.ndarray) -> np.ndarray:
    return pool[np.argsort(key_C[pool], kind="stable")[:n]]


def sibling_columns(scan: ContextScan, columns: np.ndarray) -> list[int | None]:
    """For each of these columns, the column whose margins correlate most with its own; None where it is alone.

    Margins are centred once for all, not once for each latent: this is all that a round does which grows with the
    square of its latents.
    """
    if len(scan.latents) < 2:
        return [None] * len(columns)
    unit_CN = scan.margin_CN[np.isfinite(scan.margin_CN).all(axis=1)]
    unit_CN -= unit_CN.mean(0)
    unit_CN /= np.linalg.norm(unit_CN, axis=0) + 1e-9
    found: list[int | None] = []
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        some = columns[start : start + COLUMNS_AT_ONCE]
        correlation_Nn = unit_CN.T @ unit_CN[:, some]
        correlation_Nn[some, np.arange(len(some))] = -np.inf
        found += correlation_Nn.argmax(0).tolist()
    return found


def density_matched_threshold(pre_CN: np.ndarray, n_active: np.ndarray) -> np.ndarray:
    """Thresholds [N] at which column j is active in `n_active[j]` contexts (for random-direction nulls)."""
    ordered = -np.sort(-pre_CN, axis=0)
    row = np.clip(n_active, 1, len(ordered)) - 1
    return ordered[row, np.arange(pre_CN.shape[1])]
