"""What a round asks of the decoder: rows of the judged latents, the whole of it, and who lies close to whom.

Ranks are asked once, straight after the round's scan and only for what something needs: they train on meanwhile. A
neighbour's firings are scanned only where its row is close, which few are.

Suffixes: N judged latents, M all latents, O width of what the decoder writes, n neighbours, C contexts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.overlap import Neighbours, nearest_rows, with_cofiring

COSINE_LIMIT = 0.6  # from which on a row is close: `overlap.overlap_penalties`
TWIN_COSINE = 0.9  # from which on it is the same latent again, as the duplicates alarm counts
COUNTED = 4096  # latents whose twins are looked for: of all 262,144 of width 4096 it would be 6e14 operations a round

Scan = Callable[[np.ndarray], Awaitable[ContextScan]]


@dataclass(frozen=True)
class DecoderFacts:
    """latents: int64 [N], the scanned ones. rows_NO: theirs. whole_MO: all rows, None where nothing needs them. near:
    of the scanned latents, with co-firing, None likewise."""

    latents: np.ndarray
    rows_NO: torch.Tensor
    whole_MO: torch.Tensor | None = None
    near: Neighbours | None = None


async def look_at_decoder(
    ranks: list[Any], d_sae: int, scan: ContextScan, rescan: Scan, *, whole: bool, near: bool
) -> DecoderFacts:
    """Asks the ranks.

    Args:
        ranks: which together hold all latents.
        rescan: responses of other latents to the contexts of `scan`.
        whole, near: what is needed besides the scanned latents' rows.
    """
    latents = scan.latents
    if not (whole or near):
        return DecoderFacts(latents, await _rows(ranks, latents))
    whole_MO = await _rows(ranks, np.arange(d_sae))
    facts = DecoderFacts(latents, whole_MO[torch.from_numpy(latents)], whole_MO)
    return replace(facts, near=await _neighbours(whole_MO, scan, rescan)) if near else facts


async def _rows(ranks: list[Any], latents: np.ndarray) -> torch.Tensor:
    """Rows in the order of `latents`, which ascend; float32."""
    parts = await asyncio.gather(*(rank.decoder_rows.remote(latents.tolist()) for rank in ranks))
    ids = np.concatenate([part[0] for part in parts])
    order = np.argsort(ids, kind="stable")
    rows = np.concatenate([part[1] for part in parts])[order]
    return torch.from_numpy(rows).float()


async def _neighbours(whole_MO: torch.Tensor, scan: ContextScan, rescan: Scan) -> Neighbours:
    """Ids of the neighbours are latents; their Jaccard index is known where they are close."""
    n_judged = len(scan.latents)
    # The scanned latents stand first, so that they are a shard of their own.
    rest = np.setdiff1d(np.arange(len(whole_MO)), scan.latents)
    latent_at_M = np.concatenate([scan.latents, rest])
    ordered_MO = whole_MO[torch.from_numpy(latent_at_M)]
    near = await asyncio.to_thread(nearest_rows, ordered_MO[:n_judged], 0, [(0, ordered_MO)])
    close = np.unique(near.id_mn[near.cosine_mn > COSINE_LIMIT])
    others = np.sort(latent_at_M[close[close >= n_judged]])
    fires = [scan] if not len(others) else [scan, await rescan(others)]
    place_of_M = np.argsort(latent_at_M)
    context, place = [], []
    for each in fires:
        context_P, column_P = np.nonzero(each.act_CN > 0)
        context.append(context_P)
        place.append(place_of_M[each.latents[column_P]])
    near = with_cofiring(near, 0, np.concatenate(context), np.concatenate(place), len(whole_MO))
    # Of those that were not scanned because they are far, nothing is known, whatever the count of 0 says.
    known_mn = near.cosine_mn > COSINE_LIMIT
    jaccard_mn = np.where(known_mn, near.jaccard_mn, np.nan)
    id_mn = np.where(near.id_mn >= 0, latent_at_M[near.id_mn.clip(min=0)], -1)
    return replace(near, id_mn=id_mn, jaccard_mn=jaccard_mn)


def duplicate_share(whole_MO: torch.Tensor) -> float:
    """Share of latents whose row has a twin (cosine of TWIN_COSINE or more) among all. Rows that are zero have none.

    Of COUNTED latents, evenly spaced and the same in every round: a standard error of .002 at a share of .02, where
    the alarm's limits are a growth of .02 and .1. Fewer are all counted.
    """
    counted_n = torch.linspace(0, len(whole_MO) - 1, min(COUNTED, len(whole_MO))).round().long()
    # Under ids that no row has: then each row's nearest is itself, and the next would be its twin.
    near = nearest_rows(whole_MO[counted_n], -len(counted_n), [(0, whole_MO)], n=2)
    return float((near.cosine_mn[:, 1] >= TWIN_COSINE).mean())
