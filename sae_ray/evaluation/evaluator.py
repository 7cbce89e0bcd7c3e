"""The evaluator: one async actor that measures a run's SAEs where the model and the judges are."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
import torch

from sae_ray import logs
from sae_ray.activations.block import Block
from sae_ray.config import RunConfig
from sae_ray.corpus.reader import TokenBlock
from sae_ray.errors import UserError
from sae_ray.evaluation.core import PlacedSAE, ce_recovered, core_metrics
from sae_ray.evaluation.detection import measure_detection
from sae_ray.judge.pool import PoolWatch
from sae_ray.judge.roles import SCORER, judges_of
from sae_ray.reward.bank import VerdictBank
from sae_ray.reward.pool_judge import HELDOUT, PoolJudge
from sae_ray.sae.inference import TrainedSAE
from sae_ray.storage import LocalStorage
from sae_ray.trainer import checkpoint

# Versions of a run's SAE that are compared: the pinned end of reconstruction, and the two copies after RLAIF.
BEFORE, RLAIF, CONTROL = "before", "rlaif", "control"


def find_versions(config: RunConfig) -> dict[str, TrainedSAE]:
    """The versions of a run's main SAE, by name. Without an RLAIF phase there is only `before`.

    Raises:
        UserError: no committed checkpoint, or a corrupt one (the file is named).
    """
    folder = checkpoint.home(config)
    versions: dict[str, TrainedSAE] = {}
    for step, path in checkpoint.committed(folder):
        manifest = checkpoint.read_manifest(path)
        if manifest["pin"] == "reconstruction" or step <= config.trainer.steps:
            versions[BEFORE] = _load(path, "main")
    latest = checkpoint.latest(folder)
    if latest is None:
        raise UserError(f"{folder}: holds no committed checkpoint; train the run first")
    manifest = checkpoint.read_manifest(latest)
    if manifest["step"] > config.trainer.steps:
        versions[RLAIF] = _load(latest, "main")
        if "control" in manifest["copies"]:
            versions[CONTROL] = _load(latest, "control")
    return versions


def find_variants(config: RunConfig) -> dict[str, TrainedSAE]:
    """The other SAEs of a run, by name, as its last checkpoint holds them.

    Raises:
        UserError: no committed checkpoint, or a corrupt one (the file is named).
    """
    folder = checkpoint.home(config)
    latest = checkpoint.latest(folder)
    if latest is None:
        raise UserError(f"{folder}: holds no committed checkpoint; train the run first")
    return {variant.name: _load(latest, variant.name) for variant in config.saes}


def find_saes(config: RunConfig) -> dict[str, PlacedSAE]:
    """Versions of main, then the other SAEs of a run, each with its hook points."""
    specs = config.specs()
    found = [(name, sae, specs["main"]) for name, sae in find_versions(config).items()]
    found += [(name, sae, specs[name]) for name, sae in find_variants(config).items()]
    return {name: PlacedSAE(sae, spec.hook, spec.hook_out) for name, sae, spec in found}


def _load(path: Any, which: str) -> TrainedSAE:
    return TrainedSAE.from_checkpoint(*checkpoint.load_full(path, which))


class Evaluator:
    """Measures the SAEs of a run; `evaluation.run` makes it an actor.

    Args:
        keys: of judges elsewhere, see `judge.pool.endpoint_keys`.
    """

    def __init__(self, config_json: str, keys: Mapping[str, str] | None = None):
        os.environ.update(keys or {})
        self.config = RunConfig.model_validate_json(config_json)
        logs.start_actor(self.config, "evaluator")
        torch.set_num_threads(self.config.evaluation.threads)
        self.saes = find_saes(self.config)
        variants = self.config.specs()
        self.versions = {name: placed.sae for name, placed in self.saes.items() if name not in variants}
        self._doing = "loading"
        self._judges: list[PoolJudge] = []
        self._watch = PoolWatch(self.config)

    def progress(self) -> dict[str, Any]:
        """What it is at (`detail`), and the judging's live counters."""
        self._watch.look()
        return {"detail": self._doing, **together([judge.progress() for judge in self._judges])}

    async def core(self, heldout: list[ray.ObjectRef]) -> dict[str, dict[str, Any]]:
        """FVU, L0, dead share and CE recovered of every SAE, on held-out blocks."""
        blocks = [Block.from_numpy_dict(await ref) for ref in heldout]
        return await asyncio.to_thread(self._core, blocks)

    def _core(self, blocks: list[Block]) -> dict[str, dict[str, Any]]:
        self._doing = "CE loss recovered"
        tokens = first_sequences(blocks, self.config.evaluation.ce_sequences)
        recovered = ce_recovered(self.config.model, tokens, self.saes)
        out: dict[str, dict[str, Any]] = {}
        for name, placed in self.saes.items():
            self._doing = f"FVU and L0 of {name}"
            core, ce = core_metrics(blocks, placed), recovered[name]
            out[name] = {
                "architecture": placed.sae.architecture,
                "d_sae": placed.sae.d_sae,
                "hook": placed.hook.name,
                "hook_out": placed.hook_out and placed.hook_out.name,
                "fvu": core.fvu,
                "l0": core.l0,
                "dead_fraction": core.dead_fraction,
                "tokens": core.tokens,
                "ce_clean": ce.clean,
                "ce_sae": ce.sae,
                "ce_mean_ablation": ce.mean_ablation,
                "ce_zero_ablation": ce.zero_ablation,
                "ce_recovered_mean": ce.recovered_vs_mean,
                "ce_recovered_zero": ce.recovered_vs_zero,
                "ce_tokens": ce.tokens,
            }
        return out

    async def detection(self, evidence: list[ray.ObjectRef], heldout: list[ray.ObjectRef]) -> dict[str, Any]:
        """Held-out detection of every version of main with both nulls; the judges must serve.

        The verdicts are the held-out judge's if the run has one, else the scorer's; `judge` of the result says whose.

        Raises:
            JudgeAtChance: a judge that is asked has no calibration yet, and none of its verdict modes beats chance.
        """
        began = time.monotonic()
        judge = detector = PoolJudge(self.config)
        if HELDOUT in judges_of(self.config):
            detector = PoolJudge(self.config, HELDOUT)
        self._judges = list(dict.fromkeys((judge, detector)))
        bank = VerdictBank(LocalStorage(self.config.run_dir)).read()
        self._doing = "judge calibration"
        for each in self._judges:
            await each.calibrate()
            each.preload(bank)

        def say(what: str) -> None:
            self._doing = what

        stored = [[await ref for ref in refs] for refs in (evidence, heldout)]
        found = await measure_detection(self.config, self.versions, stored[0], stored[1], bank, judge, say, detector)
        report = detector.judge.report
        return found | {
            "judge": {
                "model": detector.judge.name,
                "role": SCORER if detector is judge else HELDOUT,
                **{key: report[key] for key in ("mode", "auroc")},
            },
            "verdicts": self.progress()["verdicts"],
            "seconds": {"detection": round(time.monotonic() - began, 1)},
        }


def together(counters: list[dict[str, Any]]) -> dict[str, Any]:
    """The live counters of several judges as one's; a rate that nobody has is None."""
    if len(counters) < 2:
        return counters[0] if counters else {}
    rates = [each["verdicts_per_s"] for each in counters if each["verdicts_per_s"] is not None]
    return {
        "queue": sum(each["queue"] for each in counters),
        "verdicts": sum(each["verdicts"] for each in counters),
        "verdicts_per_s": sum(rates) if rates else None,
    }


def first_sequences(blocks: list[Block], n: int) -> list[TokenBlock]:
    """Token blocks that together hold the first n sequences."""
    out, left = [], n
    for block in blocks:
        if left > 0:
            out.append(TokenBlock(block.tokens_SL[:left], block.keep_SL[:left]))
            left -= len(block.tokens_SL)
    return out
