"""Verdicts of earlier rounds on the explanations that latents have now: kept, brought up to date, and taught again.

A verdict says whether a text shows an explanation. The language model is frozen, so neither the text, nor its
activations, nor the verdict ever age. What ages:

    row_active, row_token, row_margin   how the latent responds to the text: read anew from this round's scan
    row_weight                          see below
    credit_weight                       that the explanation is the latent's: a latent that was not judged this round
                                        keeps 2^(-age / half life) * cos of it, cos between its encoder row now and when
                                        it was judged. Where the explanation has changed, its verdicts are dropped.

Weights. Rows of round r carry w, the inverse of the probability that r drew them, and estimate any sum over contexts
without bias. So do the rows of all rounds together with weights lambda_r w, sum lambda_r = 1; lambda_r is the round's
share of the latent's rows. A context that several rounds drew becomes one row, of their summed weight. Strata have
moved since: the sums of the weights over contexts in which the latent is active now, and over the others, are scaled
to the counts that the scan knows (calibration to known totals: Deville and Sarndal 1992); before, weights of active
contexts are cut at MOST_OF_MEDIAN times the median of their latent's.

Suffixes: N latents, V rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from sae_ray.reward.composition import age_weight
from sae_ray.reward.credit.base import RewardBatch
from sae_ray.reward.evidence import ContextScan
from sae_ray.storage import Storage
from sae_ray.tensor_file import arrays_of, buffers_of

FILE = "loop/verdicts-{:04d}.safetensors"
# A text on which the latent has only begun to fire may stand for hundreds: it alone must not decide a mean.
MOST_OF_MEDIAN = 4.0
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class KeptRound:
    """What one round has found, as it found it."""

    latents: np.ndarray  # int64 [N], ascending
    explanation: np.ndarray  # int64 [N]: `history.text_id`, or any number that says the same
    trust: np.ndarray  # float32 [N]: credit weight, not divided by the number of trusted latents
    reward: np.ndarray  # float32 [N]: NaN where the round gave none
    row_latent: np.ndarray  # int64 [V]
    row_context: np.ndarray  # int64 [V]
    row_verdict: np.ndarray  # float32 [V]
    row_weight: np.ndarray  # float32 [V]
    about: np.ndarray  # int64 [2]: the round's number and the SAE's step

    @classmethod
    def of(cls, batch: RewardBatch, explanation: Mapping[int, int]) -> KeptRound:
        none = np.full(len(batch.latents), np.nan, dtype=np.float32)
        return cls(
            batch.latents,
            np.array([explanation[latent] for latent in batch.latents.tolist()], dtype=np.int64),
            (batch.credit_weight * max(1, int((batch.credit_weight > 0).sum()))).astype(np.float32),
            none if batch.reward is None else batch.reward.astype(np.float32),
            batch.row_latent,
            batch.row_context,
            batch.row_verdict,
            batch.row_weight,
            np.array([batch.round, batch.sae_step], dtype=np.int64),
        )

    @property
    def number(self) -> int:
        return int(self.about[0])


class VerdictMemory:
    """The last rounds' verdicts, at most `rounds` besides the newest."""

    def __init__(self, rounds: int, half_life_steps: float):
        self._rounds, self._half_life = rounds, half_life_steps
        self.kept: list[KeptRound] = []

    def latents(self, number: int) -> np.ndarray:
        """Latents that have kept verdicts when round `number` is judged: their responses are needed by `join`."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *(kept.latents for kept in self._before(number))]))

    def join(
        self,
        batch: RewardBatch,
        explanation: Mapping[int, int],
        scan: ContextScan,
        cosine: Mapping[int, float],
    ) -> RewardBatch:
        """A round's batch with what earlier ones still teach; the round itself is remembered for later ones.

        Args:
            explanation: a number for the explanation of each of `batch.latents`.
            scan: of `latents()` and `batch.latents`, at the same contexts as in the kept rounds.
            cosine: of each latent's encoder row now and when it was judged last; 1 for a latent that is left out.
        """
        earlier = self._before(batch.round)
        now = KeptRound.of(batch, explanation)
        self.kept = [*earlier, now]
        holders: dict[int, KeptRound] = {}  # the newest round that judged each latent
        for kept in self.kept:
            holders |= dict.fromkeys(kept.latents.tolist(), kept)
        latents = sorted(holders)
        meant = {latent: _at(holders[latent], "explanation", latent) for latent in latents}
        rows = _pooled([_rows(kept, meant) for kept in self.kept])
        active, token, margin = _responses(rows, scan)
        trust = np.array([self._trust(holders[latent], now, latent, cosine) for latent in latents])
        return replace(
            batch,
            latents=np.array(latents, dtype=np.int64),
            credit_weight=(trust / max(1, (trust > 0).sum())).astype(np.float32),
            row_latent=rows["latent"],
            row_context=rows["context"],
            row_verdict=rows["verdict"],
            row_active=active,
            row_weight=_calibrated(rows, active, scan),
            row_token=token,
            row_margin=margin,
            reward=None if batch.reward is None else np.array(
                [_at(holders[latent], "reward", latent) for latent in latents], dtype=np.float32
            ),
        )  # fmt: skip

    def explanations(self) -> dict[int, int]:
        """The newest explanation, as a number, of every latent that `join` gave a batch."""
        return {
            latent: explanation
            for kept in self.kept
            for latent, explanation in zip(kept.latents.tolist(), kept.explanation.tolist(), strict=True)
        }

    def _before(self, number: int) -> list[KeptRound]:
        """A round that is asked again replaces what it found before."""
        return [kept for kept in self.kept if number - self._rounds <= kept.number < number]

    def _trust(self, kept: KeptRound, now: KeptRound, latent: int, cosine: Mapping[int, float]) -> float:
        trust = float(_at(kept, "trust", latent))
        if kept is now:
            return trust
        age = float(now.about[1] - kept.about[1])
        return trust * age_weight(age, self._half_life) * max(0.0, cosine.get(latent, 1.0))

    # ------------------------------------------------------------------ files

    def save(self, storage: Storage) -> None:
        """Writes the newest round."""
        now = self.kept[-1]
        tensors = {f.name: torch.from_numpy(np.ascontiguousarray(getattr(now, f.name))) for f in fields(now)}
        storage.write(FILE.format(now.number), buffers_of(tensors))

    def load(self, storage: Storage, number: int) -> None:
        """As it was when round `number` was to be judged; what was not saved is left out."""
        self.kept = []
        for earlier in range(max(0, number - self._rounds), number):
            if storage.exists(FILE.format(earlier)):
                arrays, _ = arrays_of(storage.read(FILE.format(earlier)))
                self.kept.append(KeptRound(*(arrays[f.name] for f in fields(KeptRound))))


def _at(kept: KeptRound, name: str, latent: int) -> Any:
    return getattr(kept, name)[np.searchsorted(kept.latents, latent)].item()


def _rows(kept: KeptRound, meant: Mapping[int, int]) -> Arrays:
    """A round's rows on the explanations that latents have now."""
    same = [latent for latent in kept.latents.tolist() if _at(kept, "explanation", latent) == meant[latent]]
    keep = np.isin(kept.row_latent, np.array(same, dtype=np.int64))
    return {
        "latent": kept.row_latent[keep],
        "context": kept.row_context[keep],
        "verdict": kept.row_verdict[keep],
        "weight": kept.row_weight[keep].astype(np.float64),
    }


def _pooled(rounds: list[Arrays]) -> Arrays:
    """One row for each latent and context: weights shared out between rounds and summed, the newest verdict."""
    latent = np.concatenate([rows["latent"] for rows in rounds])
    _, place = np.unique(latent, return_inverse=True)
    total = np.bincount(place)
    weight, start = [], 0
    for rows in rounds:
        own = place[start : start + len(rows["latent"])]
        share = np.bincount(own, minlength=len(total)) / total
        weight.append(rows["weight"] * share[own])
        start += len(own)
    context = np.concatenate([rows["context"] for rows in rounds])
    pairs, of_row = np.unique(place * (int(context.max(initial=0)) + 1) + context, return_inverse=True)
    newest = np.zeros(len(pairs), dtype=np.int64)
    newest[of_row] = np.arange(len(of_row))  # later rounds come last
    return {
        "latent": latent[newest],
        "context": context[newest],
        "verdict": np.concatenate([rows["verdict"] for rows in rounds])[newest],
        "weight": np.bincount(of_row, np.concatenate(weight), len(pairs)),
    }


def _responses(rows: Arrays, scan: ContextScan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each row's latent is active in its context now, at which token, and by which margin."""
    column, context = np.searchsorted(scan.latents, rows["latent"]), rows["context"]
    return (
        scan.act_CN[context, column] > 0,
        scan.token_CN[context, column].astype(np.int64),
        scan.margin_CN[context, column].astype(np.float32),
    )


def _calibrated(rows: Arrays, active: np.ndarray, scan: ContextScan) -> np.ndarray:
    """Weights [V] whose sums over a latent's active, and over its inactive, contexts are those of the scan."""
    n_active = (scan.act_CN > 0).sum(0)
    counts = np.stack([np.isfinite(scan.margin_CN).sum(0) - n_active, n_active], axis=1).ravel()
    stratum = 2 * np.searchsorted(scan.latents, rows["latent"]) + active
    order = np.lexsort((rows["weight"], stratum))
    size = np.bincount(stratum, minlength=len(counts))
    middle = (size.cumsum() - size + size // 2).clip(max=max(0, len(order) - 1))
    median = rows["weight"][order][middle] if len(order) else np.zeros(len(counts))
    weight = np.where(active, np.minimum(rows["weight"], MOST_OF_MEDIAN * median[stratum]), rows["weight"])
    total = np.bincount(stratum, weight, len(counts))
    factor = np.divide(counts, total, out=np.ones(len(counts)), where=total > 0)
    return (weight * factor[stratum]).astype(np.float32)
