"""A judge that has been measured on planted items of the run's corpus, ready to be asked.

The calibration lies in the run's folder, one file per judge. It stands as long as it is of this judge, of these prompts
and of a mode that the config allows; otherwise the judge is measured again.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import JudgeConfig, RunConfig
from sae_ray.corpus import open_corpus, split_of
from sae_ray.judge import planting
from sae_ray.judge.calibration import Calibration, JudgeAtChance, calibrate
from sae_ray.judge.client import Judge
from sae_ray.judge.levels import Levelled
from sae_ray.judge.prompts import PROMPT_VERSION, Mode
from sae_ray.judge.roles import Role, judges_of
from sae_ray.judge.verdict_cache import judge_identity
from sae_ray.storage import Storage

PLANTED_DOCUMENTS = 1500
REFERENCE_TEXTS = 8
# Of errors about a judge: a key of its section, but not a host that is called judge.
_KEY = re.compile(r"(?<![\w./@-])judge\.(?=[a-z0-9_]+\b)")


class Calibrated:
    """A judge with its calibration, as scorers see it (`scorers.base.Verdicts`): every verdict has its explanation's
    level taken out, as those that it was calibrated on.

    Attributes:
        references: the texts of the corpus whose verdicts are an explanation's level.
        report: what the file says, see `report_of`.
        on_file: whether the calibration is an earlier session's; else the judge was measured just now.
    """

    def __init__(
        self,
        client: Judge,
        references: list[str],
        calibration: Calibration,
        report: dict[str, Any],
        on_file: bool = False,
    ):
        self._client, self._levelled = client, Levelled(client, references)
        self.references, self.calibration, self.report, self.on_file = references, calibration, report, on_file

    @property
    def name(self) -> str:
        """What answers, for people: a model's name, or what the server calls it."""
        return str(self.report["judge"])

    @property
    def identity(self) -> str:
        """What answers, for comparing: see `verdict_cache.judge_identity`."""
        return str(self.report["identity"])

    async def score(
        self, pairs: Sequence[tuple[str, str]], mode: Any = None, use_cache: bool = True
    ) -> list[float | None]:
        return await self._levelled.score(pairs, mode or self.calibration.mode, use_cache=use_cache)

    async def again(self, pairs: Sequence[tuple[str, str]], mode: Mode) -> list[float | None]:
        """As `score`, past every cache: what the judge says now (`drift.Ask`)."""
        return await self.score(pairs, mode, use_cache=False)

    async def generate(self, prompts: list[str], *args: Any, **kwargs: Any) -> list[list[str] | None]:
        return await self._client.generate(prompts, *args, **kwargs)


async def calibrated(
    config: RunConfig, role: Role, client: Judge, storage: Storage, key: str | None = None
) -> Calibrated:
    """The judge of a role with the calibration on file, if that still stands, else a new one, which is written.

    Args:
        client: asks that judge.
        key: the file, below `storage`; None: `calibration-<role>.json`.
    Raises:
        JudgeAtChance: no allowed mode beats chance.
        UserError: the judge's server cannot be asked, or does not say which model answers.
    """
    judge, key = judges_of(config)[role], key or f"calibration-{role}.json"
    settings = judge.calibration
    tokenizer = load_tokenizer(config.model)
    found = (d for d in open_corpus(config.corpus).documents(config.seed) if split_of(d) == "evidence")
    documents = list(itertools.islice(found, PLANTED_DOCUMENTS))
    step = max(1, len(documents) // REFERENCE_TEXTS)
    references = [
        tokenizer.decode(tokenizer.encode(document)[: config.judge.context_tokens], skip_special_tokens=True)
        for document in documents[::step][:REFERENCE_TEXTS]
    ]
    name, identity = await name_of(judge, client), judge_identity(judge)
    if judge.endpoint is not None:
        client.known_as(name)
    if storage.exists(key):
        report = json.loads(storage.read(key))
        if stands(report, name, identity, judge):
            return Calibrated(client, references, Calibration.from_dict(report["calibration"]), report, on_file=True)
    items = planting.plant_items(
        documents,
        settings.concepts,
        settings.texts_per_concept,
        config.judge.context_tokens,
        tokenizer,
        settings.seed,
    )
    try:
        # Under the name that answers: a judge at chance is reported by it, not by a model that nobody asked.
        calibration = await calibrate(Levelled(client, references), items, judge.model_copy(update={"model": name}))
    except JudgeAtChance as error:
        raise JudgeAtChance(said_of(config, role, error)) from None
    report = report_of(calibration, name, identity)
    storage.write(key, json.dumps(report, indent=1).encode())
    return Calibrated(client, references, calibration, report)


async def name_of(judge: JudgeConfig, client: Judge) -> str:
    """The model that answers, as reports and banked verdicts name it, with its adapter.

    A server that was given no `endpoint_model` is asked what it serves: with another model it is another judge.
    """
    if judge.endpoint is not None:
        return judge.endpoint_model or str((await client.describe())["model"])
    name = judge.s3_mirror or judge.model
    return name if judge.adapter is None else f"{name} + {judge.adapter}"


def stands(report: dict[str, Any], name: str, identity: str, judge: JudgeConfig) -> bool:
    """Whether a calibration on file is of this judge, of today's prompts, and of a mode that the config allows.

    Files of versions that noted no identity do not stand: nobody knows whose they are.
    """
    of = (report.get("judge"), report.get("identity"), report.get("prompt_version"))
    return of == (name, identity, PROMPT_VERSION) and judge.mode in ("auto", report.get("mode"))


def report_of(calibration: Calibration, name: str, identity: str) -> dict[str, Any]:
    """What a calibration file says: the judge, the mode chosen and its AUROC, every mode's figures, a summary in one
    line, and under `calibration` all that it takes to go on with it."""
    modes = {
        mode: {
            "auroc": each.auroc.value,
            "low": each.auroc.low,
            "high": each.auroc.high,
            "false_positive_rate": each.false_positive,
            "false_negative_rate": each.false_negative,
            "n": each.items,
            "missing": each.missing,
            "seconds": round(each.seconds, 2),
        }
        for mode, each in calibration.modes.items()
    }
    told = ", ".join(
        f"{mode} AUROC {each['auroc']:.2f} ({each['low']:.2f} to {each['high']:.2f})" for mode, each in modes.items()
    )
    return {
        "judge": name,
        "identity": identity,
        "mode": calibration.mode,
        "auroc": calibration.chosen.auroc.value,
        "prompt_version": PROMPT_VERSION,
        "summary": f"judge {name} on planted items: {told}; the run uses {calibration.mode}",
        "modes": modes,
        "calibration": calibration.to_dict(),
    }


def said_of(config: RunConfig, role: Role, error: Exception) -> str:
    """An error about a judge section, with the keys under which this role's are found: `judges.heldout.model`."""
    return _KEY.sub(f"judges.{role}.", str(error)) if role in config.judges else str(error)
