"""The run configs of `rlaif_real.py`: one base, arms that differ in a few keys of `rlaif`, one way of scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MATRYOSHKA, FIRST = "matryoshka", "rlaif"
BATCH_TOKENS, CONTEXT_TOKENS = 1016, 32

Config = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    base_steps, steps: of reconstruction, and of each arm. evidence_blocks teach, heldout_blocks score. judged: texts
    that a round asks about per latent (positives, near misses, siblings, randoms). texts: per class and scorer.
    simulated: latents whose activations are simulated, which costs a verdict a token.
    """

    layer: int
    d_sae: int
    k: int
    base_steps: int
    steps: int
    rounds: int
    latents: int
    evidence_blocks: int
    heldout_blocks: int
    judged: tuple[int, int, int, int]
    texts: int
    min_contexts: int
    simulated: int
    core_blocks: int
    ce_sequences: int
    max_context_share: float
    arms: tuple[str, ...]


FULL = Sizes(
    layer=9, d_sae=4608, k=32, base_steps=1000, steps=240, rounds=1, latents=40, evidence_blocks=48, heldout_blocks=64,
    judged=(40, 16, 16, 24), texts=16, min_contexts=12, simulated=8, core_blocks=12, ce_sequences=12,
    max_context_share=0.15, arms=("rlaif", "strong", "own_cuts", "shuffled", "own_shuffled", "random_negatives"),
)  # fmt: skip
SMOKE = Sizes(
    layer=2, d_sae=512, k=16, base_steps=40, steps=12, rounds=1, latents=6, evidence_blocks=12, heldout_blocks=12,
    judged=(6, 2, 2, 2), texts=6, min_contexts=8, simulated=6, core_blocks=2, ce_sequences=4,
    max_context_share=0.9, arms=("rlaif", "shuffled"),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where runs run and are kept. app: the judge that serves them all. store: activations that the arms share."""

    runs_dir: str = "runs"
    address: str = "local"
    app: str | None = None
    store: str | None = None


def arms(sizes: Sizes) -> dict[str, Config]:
    """The keys of `rlaif` in which each arm differs from the first."""
    return {
        FIRST: {},
        "strong": {"gamma": 0.3},
        "own_cuts": {"verdict_cut": "own"},
        "own_shuffled": {"verdict_cut": "own", "shuffle_verdicts": True},
        "shuffled": {"shuffle_verdicts": True},
        "random_negatives": {"near_misses": 0, "siblings": 0, "randoms": sum(sizes.judged[1:])},
    }


def base_config(sizes: Sizes, place: Place) -> Config:
    """Reconstruction alone, of both architectures on the same batches."""
    return {
        **_common("base", sizes, place),
        "seed": 0,
        "trainer": {
            "steps": sizes.base_steps, "batch_tokens": BATCH_TOKENS, "lr": 1e-3, "lr_final": 3e-4,
            "checkpoint_every": 200,
        },
        "saes": [{"name": MATRYOSHKA, "sae": {"architecture": "matryoshka"}}],
        "rlaif": {"enabled": False},
    }  # fmt: skip


def arm_config(name: str, sizes: Sizes, place: Place) -> Config:
    """From the base's file straight into RLAIF. The first arm has continued training and the Matryoshka beside it."""
    base = Path(place.runs_dir) / "base"
    config = _common(name, sizes, place)
    positives, near_misses, siblings, randoms = sizes.judged
    beside = {"architecture": "matryoshka", "init_from": str(base / f"saelens-{MATRYOSHKA}")}
    return {
        **config,
        "sae": {**config["sae"], "init_from": str(base / "saelens")},
        "trainer": {
            "steps": 0, "batch_tokens": BATCH_TOKENS, "lr_final": 3e-4, "warmup_steps": min(20, sizes.steps // 2),
            "checkpoint_every": 1000, "log_every": 5,
        },
        "saes": [{"name": MATRYOSHKA, "sae": beside}] if name == FIRST else [],
        "rlaif": {
            "steps": sizes.steps, "rounds": sizes.rounds, "latents": sizes.latents,
            "evidence_blocks": sizes.evidence_blocks, "positives": positives, "near_misses": near_misses,
            "siblings": siblings, "randoms": randoms, "max_context_share": sizes.max_context_share,
            # The trainer waits for each round, so that all arms choose the same latents of the same SAE.
            "max_staleness_steps": 0, "round_timeout_s": 3600, "control": name == FIRST, **arms(sizes)[name],
        },
    }  # fmt: skip


def store_config(sizes: Sizes, place: Place) -> Config:
    """What all arms read, and as many held-out blocks as scoring takes."""
    config = arm_config(FIRST, sizes, replace(place, store=None))
    return {**config, "name": "store", "evaluation": {**config["evaluation"], "blocks": sizes.heldout_blocks}}


def scoring_config(name: str, sizes: Sizes, place: Place, scorers: Sequence[str]) -> Config:
    """One policy for all SAEs: the same explainers, texts of the held-out split, the same number of them."""
    return {
        **_common(name, sizes, place),
        "trainer": {"steps": sizes.steps, "batch_tokens": BATCH_TOKENS},
        "rlaif": {"enabled": False},
        "judging": {
            "split": "heldout", "blocks": sizes.heldout_blocks, "scorers": list(scorers), "positives": sizes.texts,
            "negatives": sizes.texts, "min_contexts": sizes.min_contexts, "random_directions": 0,
        },
    }  # fmt: skip


def _common(name: str, sizes: Sizes, place: Place) -> Config:
    """Seed 1, which is not the base's: its texts come in another order."""
    stored = {} if place.store is None else {"store": place.store}
    return {
        "name": name,
        "seed": 1,
        "runs_dir": place.runs_dir,
        "ray": {"address": place.address},
        "hook": {"layer": sizes.layer},
        "corpus": {"context_length": 128},
        "activations": {"producers": 2, "block_sequences": 16, "mix_blocks": 4, "window_blocks": 12, **stored},
        "sae": {"d_sae": sizes.d_sae, "k": sizes.k},
        # By likelihood only: SmolLM2-135M answers yes/no questions at chance.
        # On a busy machine a verdict may take minutes; a missing one would be another latent's every time.
        "judge": {"mode": "likelihood", "context_tokens": CONTEXT_TOKENS, "app": place.app, "deadline_s": 1200},
        "evaluation": {"blocks": 2, "ce_sequences": 2, "latents": 0, "threads": 1},
    }
