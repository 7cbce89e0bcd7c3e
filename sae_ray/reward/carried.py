"""What a judging round takes over from the rounds before it: whom to judge, which explanations stand, which verdicts
still teach. The desk asks here and passes on; with the default config nothing is taken over.

What a round leaves is saved under its number, so that a round which is judged again, after a crash, starts from the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sae_ray.config import RLAIFConfig
from sae_ray.reward import history, verdict_memory
from sae_ray.reward.choosing import choose_by_value
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.evidence import ContextScan
from sae_ray.reward.history import LatentHistory, Measured, UnitRows, text_id
from sae_ray.reward.reexplaining import KeptExplanations
from sae_ray.reward.rounds import Judge
from sae_ray.reward.sharing import newest_holder_each
from sae_ray.reward.verdict_memory import VerdictMemory
from sae_ray.storage import Storage


class Rewarded(Protocol):
    """What this needs of a `composition.LatentReward`."""

    @property
    def latent(self) -> int: ...
    @property
    def explanation(self) -> str: ...
    @property
    def interpretability(self) -> float: ...
    @property
    def standard_error(self) -> float: ...
    @property
    def credit_weight(self) -> float: ...


class CarriedOver:
    """One per desk. Call `start` first in every round, then `begin` with its scan, and `finish` with its batch."""

    def __init__(self, config: RLAIFConfig, storage: Storage):
        self._config, self._storage = config, storage
        self.on = config.choose == "value" or config.keep_rounds > 0 or config.reexplain_cosine is not None
        self.history = LatentHistory()
        self._memory = VerdictMemory(config.keep_rounds, config.half_life_steps)
        self._number = 0
        self._kept: frozenset[int] = frozenset()
        self._now: UnitRows | None = None
        self._told: dict[str, Any] = {}

    def start(self, number: int) -> None:
        """Recalls what the rounds before `number` have left."""
        self._number, self._kept, self._now, self._told = number, frozenset(), None, {}
        if self.on:
            self.history = LatentHistory.load(self._storage, number)
            self._memory.load(self._storage, number)

    def choose(
        self,
        counts_M: np.ndarray,
        n_contexts: int,
        need: int,
        now: UnitRows,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """The round's latents by value of information.

        Args:
            now: of `history.latents()`.
        """
        config = self._config
        known = self.history.known(now)
        latents = choose_by_value(counts_M, n_contexts, config.latents, need, config.max_context_share, known, rng)
        self._told["new_latents"] = int((~np.isin(latents, known.latents)).sum())
        return latents

    def to_scan(self, latents: np.ndarray) -> np.ndarray:
        """The round's latents, and those whose earlier verdicts still teach."""
        return np.union1d(latents, self._memory.latents(self._number)) if self._config.keep_rounds else latents

    def begin(self, latents: np.ndarray, scan: ContextScan, now: UnitRows) -> None:
        """Decides which explanations stand.

        Args:
            latents: to be judged in this round.
            scan, now: of `to_scan(latents)`.
        """
        self._now = now
        cosine, overlap = self._config.reexplain_cosine, self._config.reexplain_overlap
        if cosine is None:
            return
        column = {latent: place for place, latent in enumerate(scan.latents.tolist())}
        self._kept = frozenset(
            latent
            for latent in latents.tolist()
            if self.history.stands(latent, now, scan.act_CN[:, column[latent]] > 0, cosine, overlap)
        )
        self._told["explanations_kept"] = len(self._kept)

    def explainer(self, judge: Judge) -> Judge:
        """The judge, without new explanations for latents whose explanation stands."""
        return KeptExplanations(judge, self._kept) if self._kept else judge

    def finish(self, batch: RewardBatch, rewards: Sequence[Rewarded], scan: ContextScan) -> RewardBatch:
        """What the ranks are to learn from, earlier rounds' verdicts with it; remembers the round.

        Args:
            rewards: one for each of `batch.latents`.
        """
        if not self.on or self._now is None:
            return batch
        found = {reward.latent: reward for reward in rewards}
        now = self._now
        joined = batch
        if self._config.keep_rounds:
            turned = {
                latent: self.history.turned(latent, now) for latent in self._memory.latents(self._number).tolist()
            }
            explanation = {latent: text_id(reward.explanation) for latent, reward in found.items()}
            joined = self._memory.join(batch, explanation, scan, turned)
            joined = newest_holder_each(joined, self._memory.explanations(), batch.latents, scan, now)
            self._memory.save(self._storage)
            self._told["rows_kept"] = len(joined.row_latent) - len(batch.row_latent)
            self._told["latents_kept"] = len(joined.latents) - len(batch.latents)
        measured = {
            latent: Measured(r.interpretability, r.standard_error, r.credit_weight, r.explanation)
            for latent, r in found.items()
        }
        self.history.update(measured, self._kept, now, scan)
        self.history.save(self._storage, self._number)
        return joined

    def forget(self, committed_rounds: int) -> None:
        """Removes what no round will ask for, also after a crash, which goes back to the first that is not committed.

        Several rounds may lie between two commits: the newest round's own number says nothing of that.
        """
        for file, before in (
            (history.FILE, committed_rounds - 1),
            (verdict_memory.FILE, committed_rounds - self._config.keep_rounds),
        ):
            for number in range(before - 1, -1, -1):
                if not self._storage.exists(file.format(number)):
                    break
                self._storage.delete(file.format(number))

    def summary(self) -> dict[str, Any]:
        """Counts for the round's entry in the log; empty where nothing is carried over."""
        return self._told
