"""A small world that a whole round can be judged on without Ray, a language model or vLLM.

Token i is the word "w<i>"; latent m fires on word m and nothing else. Two ranks hold 12 latents each. The judge says
that a text shows an explanation where it holds its first word.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_ray.config import RunConfig
from sae_ray.reward.evidence import ContextScan, LatentPlan, layout_contexts, scan_contexts
from sae_ray.reward.overlap import nearest_to
from sae_ray.reward.rounds import Candidate

WORDS, LATENTS, RANKS, WIDTH = 60, 24, 2, 16
BLOCKS, SEQUENCES, LENGTH, CONTEXT = 2, 40, 16, 8


def run_config(folder: Path, **rlaif: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "world",
            "runs_dir": str(folder),
            "seed": 5,
            "hook": {"layer": 2},
            "corpus": {"context_length": LENGTH},
            "judge": {"context_tokens": CONTEXT},
            "sae": {"d_sae": LATENTS, "k": 4},
            "trainer": {"tp": RANKS},
            "rlaif": {
                "latents": 12, "evidence_blocks": BLOCKS, "positives": 8, "near_misses": 4, "siblings": 4, "randoms": 4,
                "explainer_examples": 3, "max_context_share": 0.9, **rlaif,
            },
        }
    )  # fmt: skip


class Tokenizer:
    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


class Remote:
    """A method as an actor's handle has it; counts its calls."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.calls = call, 0

    async def remote(self, *args: Any) -> Any:
        self.calls += 1
        return self.call(*args)


class Rank:
    def __init__(self, world: World, first: int, last: int) -> None:
        self.world, self.first, self.last = world, first, last
        self.count_contexts = Remote(lambda *_: (self.scan_of(np.arange(first, last)).act_CN > 0).sum(0))
        self.scan = Remote(lambda _, __, latents: self.scan_of(self.own(latents)))
        self.decoder_rows = Remote(lambda latents: (self.own(latents), world.W_dec[self.own(latents)]))
        self.firing = Remote(lambda _, __, latents: self.firing_of(self.own(latents)))
        self.nearest_latents = Remote(self.nearest_of)
        self.unit_rows = Remote(self.unit_rows_of)

    def unit_rows_of(self, latents: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own = self.own(latents)
        decoder = self.world.W_dec[own] / np.linalg.norm(self.world.W_dec[own], axis=1, keepdims=True)
        return own, np.eye(WORDS, dtype=np.float16)[own], decoder.astype(np.float16)

    def firing_of(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return latents, np.packbits(self.scan_of(latents).act_CN.T > 0, axis=1)

    def nearest_of(self, latents: list[int], rows_ND: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        shard = (self.first, torch.from_numpy(self.world.W_dec[self.first : self.last]))
        near = nearest_to(torch.from_numpy(rows_ND), np.array(latents), [shard], n)
        return near.id_mn, near.cosine_mn

    def own(self, latents: list[int]) -> np.ndarray:
        ids = np.asarray(latents, dtype=np.int64)
        return ids[(ids >= self.first) & (ids < self.last)]

    def scan_of(self, latents: np.ndarray) -> ContextScan:
        world, n = self.world, len(latents)
        W_ND = torch.zeros(n, WORDS)
        W_ND[torch.arange(n), torch.from_numpy(world.word_M[latents])] = 2.0
        zeros = torch.zeros(n)
        threshold_N = torch.from_numpy(world.threshold_M[latents]).float()
        return scan_contexts(world.x_TD, world.layout, latents, W_ND, zeros, torch.zeros(WORDS), threshold_N)


class World:
    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.tokens_BSL = rng.integers(0, WORDS, (BLOCKS, SEQUENCES, LENGTH)).astype(np.int32)
        seq, pos = np.nonzero(np.ones((SEQUENCES, LENGTH), dtype=bool))
        self.blocks = [{"tokens_SL": tokens_SL, "pos_T": pos} for tokens_SL in self.tokens_BSL]
        self.layout = layout_contexts([(seq, pos)] * BLOCKS, SEQUENCES, LENGTH, CONTEXT)
        x_TD = np.eye(WORDS)[self.tokens_BSL.reshape(-1)] + 0.05 * rng.normal(size=(self.tokens_BSL.size, WORDS))
        self.x_TD = torch.from_numpy(x_TD).float()
        self.threshold_M = np.full(LATENTS, 1.0)
        self.word_M = np.arange(LATENTS)  # that each latent fires on
        self.W_dec = rng.normal(size=(LATENTS, WIDTH)).astype(np.float32)
        # 3 and 15 lie close, on two ranks; 4 and 5 are twins.
        self.W_dec[15] = self.W_dec[3] + 0.8 * rng.normal(size=WIDTH)
        self.W_dec[5] = self.W_dec[4] + 0.02 * rng.normal(size=WIDTH)
        size = LATENTS // RANKS
        self.ranks = [Rank(self, r * size, (r + 1) * size) for r in range(RANKS)]

    def fires_CM(self) -> np.ndarray:
        """bool: which latents fire in which context; by the words alone."""
        tokens_CS = self.tokens_BSL.reshape(-1, CONTEXT)
        return np.stack([(tokens_CS == latent).any(axis=1) for latent in range(LATENTS)], axis=1)

    @property
    def evidence(self) -> list[Any]:
        """References of the blocks, to be awaited."""

        class Ref:
            def __init__(self, block: dict[str, Any]) -> None:
                self.block = block

            def __await__(self) -> Any:
                yield from ()
                return self.block

        return [Ref(block) for block in self.blocks]


class WorldJudge:
    """What a desk and its parts ask of `PoolJudge`. Verdicts are right but for some noise of the pair's own."""

    rates = (0.1, 0.1)
    last_error = None

    def __init__(self, noise: float = 1.0, seed: int = 0) -> None:
        self.noise, self.seed = noise, seed
        self.judge = type("Calibrated", (), {"on_file": False, "name": "world"})()
        self.asked: list[tuple[str, str]] = []

    async def score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        self.asked += pairs
        return [self.raw(text, explanation) for text, explanation in pairs]

    def raw(self, text: str, explanation: str) -> float:
        shows = explanation.split()[0] in text.split()
        rng = np.random.default_rng([self.seed, zlib.crc32(f"{text}|{explanation}".encode())])
        return (1.0 if shows else -1.0) + self.noise * float(rng.normal())

    async def explain(self, plan: LatentPlan) -> list[Candidate]:
        own = f"w{plan.latent}"
        return [Candidate(f"{own} and what stands around it", "llm"), Candidate(own, "lexical")]

    def probability(self, explanation: str, raw: float) -> float:
        return 1 / (1 + float(np.exp(-raw)))

    async def priors(self, explanations: list[str]) -> list[float | None]:
        return [-2.0 * len(explanation.split()) - 1 for explanation in explanations]

    async def check_drift(self) -> None:
        return None

    def bind(self, texts: Any, scan: ContextScan) -> None:
        pass

    def usage(self) -> dict[str, Any]:
        return {"failed": 0.0, "done": float(len(self.asked))}

    def about(self) -> dict[str, str]:
        return {"judge": "world", "judge_identity": "w", "prompt_version": "0", "mode": "likelihood"}

    def progress(self) -> dict[str, Any]:
        return {"queue": 0, "verdicts": len(self.asked), "verdicts_per_s": None}
