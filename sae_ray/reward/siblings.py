"""Whose texts a judged latent is told apart by: the latents that lie closest to it in the whole dictionary.

Few latents are judged in a round, and the one that a broad explanation would take in is seldom among them. So for each
judged latent the NEIGHBOURS closest by decoder cosine are asked of all tp shards, and in which contexts they are
active. They are neither explained nor judged, and are not in the round's scan. A latent's siblings are these and the
scanned latent that responds most alike, closest first by the larger of decoder cosine and Jaccard index of the active
contexts, as in `evidence.siblings.find_siblings`. All NEIGHBOURS are needed where the first one is a twin: it is active
where the latent is, and has no text to offer.

What it costs a round, with N judged latents of M, D wide, T evidence tokens in C contexts, a second call and a third to
each rank beside the scan's:

    cosines        2 N M D FLOPs over all shards; 2 D bytes a judged latent are sent to every rank
    their firing   2 T D FLOPs and C / 8 bytes a neighbour: with NEIGHBOURS = 2 twice the scan's own 2 T D N, but a
                   quarter byte for each context and judged latent beside the scan's 12, as bits

Suffixes: N judged latents, n neighbours, C contexts, F latents whose firing was asked for, W bytes of a set of
contexts, D width.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.history import UnitRows

NEIGHBOURS = 2


@dataclass(frozen=True)
class Neighbourhood:
    """What lies close to the judged latents."""

    latents: np.ndarray  # int64 [N], ascending
    id_Nn: np.ndarray  # int64: closest first; -1 where there are fewer
    cosine_Nn: np.ndarray  # float32
    asked_F: np.ndarray  # int64, ascending: neighbours that are not in the round's scan
    bits_FW: np.ndarray  # uint8: contexts in which each is active, packed

    def siblings(self, scan: ContextScan, column: int, alike: int | None) -> list[np.ndarray]:
        """In which contexts each sibling of a judged latent is active, bool [C]; the closest first.

        Args:
            column: of the latent, in `scan`.
            alike: column of the scanned latent that responds most alike; None: there is none.
        """
        own_C, row = scan.act_CN[:, column] > 0, int(np.searchsorted(self.latents, scan.latents[column]))
        cosine_of = {
            other: cosine
            for other, cosine in zip(self.id_Nn[row].tolist(), self.cosine_Nn[row].tolist(), strict=True)
            if other >= 0
        }
        if alike is not None:
            # Not a decoder neighbour: no closer by cosine than any of those, so it counts by its firing.
            cosine_of.setdefault(int(scan.latents[alike]), -1.0)
        closeness, found = [], []
        for other, cosine in cosine_of.items():
            active_C = self._active(scan, other)
            either = int((own_C | active_C).sum())
            closeness.append(max(cosine, int((own_C & active_C).sum()) / max(1, either)))
            found.append(active_C)
        return [found[place] for place in np.argsort(-np.array(closeness), kind="stable")]

    def _active(self, scan: ContextScan, latent: int) -> np.ndarray:
        column = int(np.searchsorted(scan.latents, latent))
        if column < len(scan.latents) and scan.latents[column] == latent:
            return np.asarray(scan.act_CN[:, column] > 0)
        bits_W = self.bits_FW[np.searchsorted(self.asked_F, latent)]
        return np.unpackbits(bits_W, count=len(scan.act_CN)).astype(bool)


async def look_around(
    ranks: list[Any],
    evidence: list[Any],
    context_tokens: int,
    latents: np.ndarray,
    scan: ContextScan,
    unit: UnitRows,
) -> Neighbourhood:
    """Asks the ranks.

    Args:
        ranks: which together hold all latents.
        latents: int64 [N], ascending: the judged ones, all of them in `scan` and `unit`.
    """
    rows_ND = unit.decoder_ND[np.searchsorted(unit.latents, latents)]
    parts = await asyncio.gather(
        *(rank.nearest_latents.remote(latents.tolist(), rows_ND, NEIGHBOURS) for rank in ranks)
    )
    id_Nn, cosine_Nn = (np.concatenate([part[i] for part in parts], axis=1) for i in range(2))
    nearest_Nn = np.argsort(-cosine_Nn, axis=1, kind="stable")[:, :NEIGHBOURS]
    id_Nn, cosine_Nn = (np.take_along_axis(each, nearest_Nn, axis=1) for each in (id_Nn, cosine_Nn))
    asked_F = np.setdiff1d(id_Nn[id_Nn >= 0], scan.latents)
    answers = await asyncio.gather(*(rank.firing.remote(evidence, context_tokens, asked_F.tolist()) for rank in ranks))
    ids, bits_FW = (np.concatenate([answer[i] for answer in answers]) for i in range(2))
    return Neighbourhood(latents, id_Nn, cosine_Nn, asked_F, bits_FW[np.argsort(ids, kind="stable")])
