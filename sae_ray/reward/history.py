"""What is remembered of every latent that was ever judged: its reward, and how it lay when judged and when explained.

A latent takes about 6 bytes per dimension and one bit per evidence context. Saved with the run, so that a resumed run
chooses and keeps as one that was never interrupted.

Suffixes: N latents, D d_in, C contexts, W bytes of a set of contexts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_ray.reward.choosing import Known, spread_of, variance_after, variance_now
from sae_ray.reward.evidence import ContextScan
from sae_ray.storage import Storage
from sae_ray.tensor_file import arrays_of, buffers_of

FILE = "loop/judged-{:04d}.safetensors"  # as it was after that round


@dataclass(frozen=True)
class UnitRows:
    """Unit rows of the encoder and the decoder, float16 [N, D]: a cosine of two of them is right to 1e-3."""

    latents: np.ndarray  # int64 [N], ascending
    encoder_ND: np.ndarray
    decoder_ND: np.ndarray

    @classmethod
    def merge(cls, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> UnitRows:
        """Joins what the tp shards answered, latents in ascending order."""
        latents, encoder_ND, decoder_ND = (np.concatenate([part[i] for part in parts]) for i in range(3))
        order = np.argsort(latents, kind="stable")
        return cls(latents[order], encoder_ND[order], decoder_ND[order])

    def of(self, latent: int) -> np.ndarray | None:
        """[2, D], or None where it is not among them."""
        place = int(np.searchsorted(self.latents, latent))
        if place == len(self.latents) or self.latents[place] != latent:
            return None
        return np.stack([self.encoder_ND[place], self.decoder_ND[place]])


@dataclass(frozen=True)
class Measured:
    """What a round found of one latent."""

    reward: float
    error: float  # standard error
    trust: float  # how far gradients may trust its explanation
    explanation: str


@dataclass(frozen=True)
class Record:
    reward: float
    error: float
    variance: float  # of what was unknown of the reward when it had been judged (`choosing`)
    trust: float
    explanation: int  # `text_id`
    judged_D: np.ndarray  # encoder row when judged
    explained_2D: np.ndarray  # encoder and decoder row when explained
    firing_W: np.ndarray  # packed bits: contexts in which it was active when explained


class LatentHistory:
    """Records by global latent id."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}

    def latents(self) -> np.ndarray:
        return np.array(sorted(self.records), dtype=np.int64)

    def known(self, now: UnitRows) -> Known:
        """What `choosing` asks of the latents that were judged.

        Args:
            now: of all of `latents()`.
        """
        if not self.records:
            return Known.nothing()
        records = [self.records[latent] for latent in self.latents().tolist()]
        numbers = np.array([(r.reward, r.error, r.variance) for r in records], dtype=np.float64)
        cosine = np.array([self.turned(latent, now) for latent in self.latents()])
        return Known(self.latents(), numbers[:, 0], numbers[:, 1], numbers[:, 2], cosine)

    def turned(self, latent: int, now: UnitRows) -> float:
        """Cosine of a latent's encoder row now and when it was judged last; 0 where that is not known."""
        rows_2D, record = now.of(int(latent)), self.records.get(int(latent))
        return 0.0 if rows_2D is None or record is None else _cosine(rows_2D[0], record.judged_D)

    def stands(self, latent: int, now: UnitRows, active_C: np.ndarray, cosine: float, overlap: float) -> bool:
        """Whether a latent's explanation may be kept: it earns trust, and neither the latent's rows nor the contexts in
        which it is active have moved further than that from what was explained."""
        record, rows_2D = self.records.get(latent), now.of(latent)
        if record is None or rows_2D is None or record.trust <= 0:
            return False
        cosines = [_cosine(row, then) for row, then in zip(rows_2D, record.explained_2D, strict=True)]
        return min(cosines) >= cosine and set_cosine(np.packbits(active_C), record.firing_W) >= overlap

    def update(
        self,
        measured: Mapping[int, Measured],
        kept: frozenset[int],
        now: UnitRows,
        scan: ContextScan,
    ) -> None:
        """Takes in a round.

        Args:
            kept: latents that were not explained anew.
            now, scan: of all measured latents, as they were judged.
        """
        rewards = {latent: (record.reward, record.error) for latent, record in self.records.items()}
        rewards |= {latent: (found.reward, found.error) for latent, found in measured.items()}
        spread = spread_of(*np.array(list(rewards.values()), dtype=np.float64).reshape(-1, 2).T)
        for latent, found in measured.items():
            rows_2D = now.of(latent)
            if rows_2D is None:
                raise ValueError(f"latent {latent} was judged, but its rows are not given")
            before, explanation = self.records.get(latent), text_id(found.explanation)
            prior = spread
            if before is not None and before.explanation == explanation:
                turned = np.array(_cosine(rows_2D[0], before.judged_D))
                prior = float(variance_now(np.array(before.variance), turned, spread))
            variance = float(variance_after(np.array(prior), np.array(found.error)))
            record = Record(
                found.reward, found.error, variance, found.trust, explanation, rows_2D[0], rows_2D,
                np.packbits(scan.act_CN[:, int(np.searchsorted(scan.latents, latent))] > 0),
            )  # fmt: skip
            if before is not None and latent in kept:
                record = replace(record, explained_2D=before.explained_2D, firing_W=before.firing_W)
            self.records[latent] = record

    # ------------------------------------------------------------------ files

    def save(self, storage: Storage, number: int) -> None:
        """After round `number`; one that is judged again finds what was before it. Nothing is written where nothing is
        remembered."""
        records = [self.records[latent] for latent in self.latents().tolist()]
        if not records:
            return
        numbers = [(r.reward, r.error, r.variance, r.trust) for r in records]
        arrays = {
            "latents": self.latents(),
            "numbers": np.array(numbers, dtype=np.float64).reshape(-1, 4),
            "explanation": np.array([r.explanation for r in records], dtype=np.int64),
            "judged": np.stack([r.judged_D for r in records]),
            "explained": np.stack([r.explained_2D for r in records]),
            "firing": np.stack([r.firing_W for r in records]),
        }
        storage.write(
            FILE.format(number), buffers_of({name: torch.from_numpy(array) for name, array in arrays.items()})
        )

    @classmethod
    def load(cls, storage: Storage, number: int) -> LatentHistory:
        """As it was when round `number` was to be judged; empty where nothing was saved."""
        history = cls()
        if not number or not storage.exists(FILE.format(number - 1)):
            return history
        arrays, _ = arrays_of(storage.read(FILE.format(number - 1)))
        for row, latent in enumerate(arrays["latents"].tolist()):
            reward, error, variance, trust = arrays["numbers"][row].tolist()
            history.records[latent] = Record(
                reward, error, variance, trust, int(arrays["explanation"][row]), arrays["judged"][row],
                arrays["explained"][row], arrays["firing"][row],
            )  # fmt: skip
        return history


def text_id(text: str) -> int:
    """A number that stands for an explanation: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def set_cosine(a_W: np.ndarray, b_W: np.ndarray) -> float:
    """|both| / sqrt(|a| |b|) of two sets as packed bits; 0 where either is empty, or they are not of one universe."""
    if len(a_W) != len(b_W):
        return 0.0
    both, a, b = (float(np.bitwise_count(bits).sum()) for bits in (a_W & b_W, a_W, b_W))
    return both / (a * b) ** 0.5 if a and b else 0.0


def _cosine(a_D: np.ndarray, b_D: np.ndarray) -> float:
    """Of unit rows; 0 where they have not the same width."""
    return float(a_D.astype(np.float32) @ b_D.astype(np.float32)) if len(a_D) == len(b_D) else 0.0
