"""A judge that has been measured on planted items of the corpus, ready to be asked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import RunConfig
from sae_ray.corpus import open_corpus, split_of
from sae_ray.judge import planting
from sae_ray.judge.calibration import Calibration, calibrate
from sae_ray.judge.levels import Levelled
from sae_ray.judge.prompts import PROMPT_VERSION
from sae_ray.judge.roles import Role, judges_of
from sae_ray.storage import Storage

PLANTED_DOCUMENTS = 1500
REFERENCE_TEXTS = 8


class Calibrated:
    """A judge with its calibration, as scorers see it (`scorers.base.Verdicts`): every verdict has its explanation's
    level taken out, as those that it was calibrated on."""

    def __init__(self, client: Any, references: list[str], calibration: Calibration, report: dict[str, Any]):
        self._client, self._levelled = client, Levelled(client, references)
        self.calibration, self.report = calibration, report

    async def score(
        self, pairs: Sequence[tuple[str, str]], mode: Any = None, use_cache: bool = True
    ) -> list[float | None]:
        return await self._levelled.score(pairs, mode or self.calibration.mode, use_cache=use_cache)

    async def generate(self, prompts: list[str], *args: Any, **kwargs: Any) -> list[list[str] | None]:
        return await self._client.generate(prompts, *args, **kwargs)


async def calibrated(config: RunConfig, role: Role, client: Any, storage: Storage) -> Calibrated:
    """The judge of a role with the calibration on file, if it is of this judge and these prompts, else a new one.

    Raises:
        JudgeAtChance: no allowed mode beats chance.
    """
    settings = config.judge.calibration
    tokenizer = load_tokenizer(config.model)
    found = (d for d in open_corpus(config.corpus).documents(config.seed) if split_of(d) == "evidence")
    documents = list(itertools.islice(found, PLANTED_DOCUMENTS))
    step = max(1, len(documents) // REFERENCE_TEXTS)
    references = [
        tokenizer.decode(tokenizer.encode(document)[: config.judge.context_tokens], skip_special_tokens=True)
        for document in documents[::step][:REFERENCE_TEXTS]
    ]
    settings_of_judge = judges_of(config)[role]
    name = settings_of_judge.endpoint_model or settings_of_judge.endpoint or settings_of_judge.model
    key = f"calibration-{role}.json"
    if storage.exists(key):
        report = json.loads(storage.read(key))
        if report["judge"] == name and report["prompt_version"] == PROMPT_VERSION:
            return Calibrated(client, references, Calibration.from_dict(report["calibration"]), report)
    items = planting.plant_items(
        documents,
        settings.concepts,
        settings.texts_per_concept,
        config.judge.context_tokens,
        tokenizer,
        settings.seed,
    )
    calibration = await calibrate(Levelled(client, references), items, config.judge)
    report = {
        "judge": name,
        "prompt_version": PROMPT_VERSION,
        "mode": calibration.mode,
        "modes": {
            name: {
                "auroc": each.auroc.value,
                "low": each.auroc.low,
                "high": each.auroc.high,
                "false_positive_rate": each.false_positive,
                "false_negative_rate": each.false_negative,
                "n": each.items,
            }
            for name, each in calibration.modes.items()
        },
        "calibration": calibration.to_dict(),
    }
    storage.write(key, json.dumps(report, indent=1).encode())
    return Calibrated(client, references, calibration, report)
