"""Simplicity, third part: is what a latent stands for its own? Splitting, duplicates, shared explanations.

With close = clip((cosine - limit) / (1 - limit), 0, 1)
of two decoder rows and J the Jaccard index of their active contexts,

    duplicate = max over neighbours of close * J           two latents say one thing at the same time
    split     = max over neighbours of close * (1 - J)     two latents share one thing out between them

Neighbours come from all shards, block by block.

Suffixes: M latents (m: of this shard), D width, n neighbours per latent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_ray.reward.atomicity import unit_rows
from sae_ray.reward.specificity import normalised


@dataclass(frozen=True)
class Neighbours:
    """Of each latent of a shard the closest others by decoder cosine: ids int64 and cosine float32 [m, n], closest
    first; id -1 and cosine -inf where there are fewer. jaccard_mn: of active contexts, NaN where unknown."""

    id_mn: np.ndarray
    cosine_mn: np.ndarray
    jaccard_mn: np.ndarray
    cpu_s: float


def nearest_rows(
    W_dec_mD: torch.Tensor, first_latent: int, shards: Iterable[tuple[int, torch.Tensor]], n: int = 4
) -> Neighbours:
    """The n nearest of all latents to each one of this shard.

    Args:
        shards: (first latent, rows [*, D]) of every shard, this one among them; one after the other is enough.
    """
    return nearest_to(W_dec_mD, np.arange(first_latent, first_latent + len(W_dec_mD)), shards, n)


@torch.no_grad()
def nearest_to(
    W_dec_mD: torch.Tensor, latents: np.ndarray, shards: Iterable[tuple[int, torch.Tensor]], n: int
) -> Neighbours:
    """The n nearest of the shards' latents to each of some rows, holding 64 MB of cosines and 4096 rows at a time.

    Args:
        latents: int64 [m], what the rows are of: no latent is its own neighbour.
        shards: (first latent, rows [*, D]).
    """
    began = time.process_time()
    unit_mD, _ = unit_rows(W_dec_mD)
    device = unit_mD.device
    best_mn = torch.full((len(unit_mD), n), -torch.inf, device=device)
    id_mn = torch.full((len(unit_mD), n), -1, dtype=torch.int64, device=device)
    own = torch.from_numpy(latents).to(device)
    for first_other, other_mD in shards:
        for start in range(0, len(other_mD), 4096):
            unit_cD = unit_rows(other_mD[start : start + 4096].to(device))[0]
            for row in range(0, len(unit_mD), 2048):
                rows = slice(row, row + 2048)
                cosine_bc = unit_mD[rows] @ unit_cD.T
                ids_c = torch.arange(cosine_bc.shape[1], device=device) + first_other + start
                cosine_bc.masked_fill_(own[rows, None] == ids_c, -torch.inf)
                near = cosine_bc.topk(min(n, cosine_bc.shape[1]), dim=1)
                both = torch.cat([best_mn[rows], near.values], dim=1)
                ids = torch.cat([id_mn[rows], ids_c[near.indices]], dim=1)
                best_mn[rows], place = both.topk(n, dim=1)
                id_mn[rows] = ids.gather(1, place)
    id_mn = torch.where(torch.isfinite(best_mn), id_mn, -1)
    unknown_mn = np.full(tuple(id_mn.shape), np.nan)
    cosine_mn = best_mn.clamp(max=1).cpu().numpy()
    return Neighbours(id_mn.cpu().numpy(), cosine_mn, unknown_mn, time.process_time() - began)


def with_cofiring(
    near: Neighbours, first_latent: int, context_P: np.ndarray, latent_P: np.ndarray, n_latents: int
) -> Neighbours:
    """The neighbours with the Jaccard index of their active contexts, from all firings: pairs of a context and a
    latent of the whole SAE, in any order, repeated or not. A pair of which neither fires is unknown."""
    began = time.process_time()
    code_P = np.unique(context_P.astype(np.int64) * n_latents + latent_P.astype(np.int64))
    latent_P, context_P = code_P % n_latents, code_P // n_latents
    count_M = np.bincount(latent_P, minlength=n_latents)
    m, n = near.id_mn.shape
    own_P = (latent_P >= first_latent) & (latent_P < first_latent + m)
    row_P, context_P = latent_P[own_P] - first_latent, context_P[own_P]
    jaccard_mn = np.full((m, n), np.nan)
    for slot in range(n):
        other_m = near.id_mn[:, slot]
        wanted_P = context_P * n_latents + other_m[row_P]
        place_P = np.searchsorted(code_P, wanted_P).clip(max=max(0, len(code_P) - 1))
        hit_P = (other_m[row_P] >= 0) & (code_P[place_P] == wanted_P)
        both_m = np.bincount(row_P[hit_P], minlength=m)
        either_m = count_M[first_latent : first_latent + m] + count_M[other_m.clip(min=0)] - both_m
        known_m = (other_m >= 0) & (either_m > 0)
        jaccard_mn[known_m, slot] = both_m[known_m] / either_m[known_m]
    return replace(near, jaccard_mn=jaccard_mn, cpu_s=near.cpu_s + time.process_time() - began)


@dataclass(frozen=True)
class Overlap:
    """Penalties float64 [m], 0 to 1, as defined above. near: close to the nearest, whatever their firing. duplicate and
    split are NaN where a close neighbour's co-firing is unknown."""

    near: np.ndarray
    duplicate: np.ndarray
    split: np.ndarray


def overlap_penalties(near: Neighbours, cosine_limit: float = 0.6) -> Overlap:
    close_mn = np.clip((near.cosine_mn.astype(np.float64) - cosine_limit) / (1 - cosine_limit), 0, 1)
    close_mn[near.id_mn < 0] = 0
    # A neighbour that is not close costs nothing, whether it fires along or not.
    jaccard_mn = np.where(close_mn > 0, near.jaccard_mn, 0)
    return Overlap(close_mn.max(axis=1), (close_mn * jaccard_mn).max(axis=1), (close_mn * (1 - jaccard_mn)).max(axis=1))


def shared_explanations(explanations: dict[int, str]) -> dict[int, float]:
    """Penalty 1 - 1/n of a latent whose explanation n latents have (as `specificity.normalised`)."""
    same = {latent: normalised(text) for latent, text in explanations.items()}
    counts: dict[str, int] = {}
    for text in same.values():
        counts[text] = counts.get(text, 0) + 1
    return {latent: 1 - 1 / counts[text] for latent, text in same.items()}
