"""The typed run config: unknown keys refused, resolved YAML out.

Every section is a pydantic model whose fields carry their unit in the description. `config_file` reads one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from sae_ray.config.judging import (
    AutoscalingConfig,
    CalibrationConfig,
    EvaluationConfig,
    JudgeConfig,
    JudgingConfig,
    RLAIFConfig,
)
from sae_ray.config.rewards import AlarmsConfig, RewardsConfig, RewardWeights
from sae_ray.config.sections import (
    ActivationsConfig,
    CorpusConfig,
    Dtype,
    Fraction,
    HookConfig,
    ModelConfig,
    Positive,
    RayConfig,
    SAEConfig,
    Seconds,
    Section,
    Seed,
    TrainerConfig,
)
from sae_ray.logs import holds_credentials
from sae_ray.places import RunsDir

if TYPE_CHECKING:
    from sae_ray.variants import SAESpec

__all__ = [
    "ActivationsConfig",
    "AlarmsConfig",
    "AutoscalingConfig",
    "CalibrationConfig",
    "CorpusConfig",
    "Dtype",
    "EvaluationConfig",
    "Fraction",
    "HookConfig",
    "JudgeConfig",
    "JudgingConfig",
    "ModelConfig",
    "Positive",
    "RLAIFConfig",
    "RayConfig",
    "RewardWeights",
    "RewardsConfig",
    "RunConfig",
    "SAEConfig",
    "SAEVariant",
    "Seconds",
    "Section",
    "Seed",
    "TrainerConfig",
]


class SAEVariant(Section):
    """One more SAE on the same pass: what it does not name is as in the run's own sections."""

    name: str
    hook: dict[str, Any] = Field(default_factory=dict, description="keys of `hook` that differ")
    hook_out: dict[str, Any] | Literal["none"] | None = Field(
        None, description="keys of `hook_out` that differ; null: the run's; none: reconstructs its own hook point"
    )
    sae: dict[str, Any] = Field(default_factory=dict, description="keys of `sae` that differ")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="keys of `trainer` that differ, of those that are one SAE's own"
    )


class RunConfig(Section):
    """One run: everything that decides its numbers, and where it runs."""

    name: str
    seed: Seed = 0
    runs_dir: RunsDir = "runs"
    ray: RayConfig = RayConfig()
    model: ModelConfig = ModelConfig()
    hook: HookConfig
    hook_out: HookConfig | None = Field(None, description="transcoder: the hook point that is reconstructed")
    corpus: CorpusConfig = CorpusConfig()
    activations: ActivationsConfig = ActivationsConfig()
    sae: SAEConfig = SAEConfig()
    trainer: TrainerConfig = TrainerConfig()
    saes: list[SAEVariant] = Field(
        default_factory=list, description="more SAEs on the same blocks, beside `sae` (which is called main)"
    )
    judge: JudgeConfig = JudgeConfig()
    judges: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="further judges (explainer, heldout): the keys of `judge` that differ"
    )
    rlaif: RLAIFConfig = RLAIFConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    judging: JudgingConfig = JudgingConfig()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
            raise ValueError(
                "a run name is 1 to 100 letters, digits, '.', '_' or '-', and starts with a letter or digit"
            )
        return value

    @model_validator(mode="after")
    def _contexts_fit(self) -> RunConfig:
        if self.corpus.context_length % self.judge.context_tokens:
            raise ValueError(
                f"corpus.context_length {self.corpus.context_length} is not a multiple of "
                f"judge.context_tokens {self.judge.context_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _no_credentials(self) -> RunConfig:
        """The config is written down as it is, in the run folder and in every checkpoint, and sent to actors."""
        for key, text in _texts(self.model_dump()):
            if holds_credentials(text):
                raise ValueError(f"{key}: holds credentials (before the '@'); S3 takes them from AWS_... or a role")
        return self

    @model_validator(mode="after")
    def _every_sae_fits(self) -> RunConfig:
        from sae_ray.variants import check_specs

        check_specs(self)
        return self

    @model_validator(mode="after")
    def _every_judge_fits(self) -> RunConfig:
        from sae_ray.judge.roles import judges_of

        judges_of(self)
        return self

    @model_validator(mode="after")
    def _rewards_fit(self) -> RunConfig:
        rewards, d_sae = self.rlaif.rewards, self.sae.d_sae
        atoms, per_code = rewards.atomicity.atoms, rewards.atomicity.per_code
        if rewards.weights.atomicity and not per_code <= (d_sae if atoms is None else atoms) <= d_sae:
            raise ValueError(
                f"rlaif.rewards.atomicity: per_code {per_code} <= atoms {atoms} <= sae.d_sae {d_sae} must hold"
            )
        if self.rlaif.enabled and self.rlaif.alarms.asks_held_out and "heldout" not in self.judges:
            raise ValueError("rlaif.alarms.held_out: there is no held-out judge to ask; configure judges.heldout")
        return self

    def specs(self) -> dict[str, SAESpec]:
        """Every SAE that the run trains: "main" first, then `saes` in order."""
        from sae_ray.variants import specs_of

        return specs_of(self)

    @property
    def hooks(self) -> list[HookConfig]:
        """The hook points that a block holds, main's input first."""
        points = [point for spec in self.specs().values() for point in (spec.hook, spec.hook_out) if point]
        return list({point.name: point for point in points}.values())

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def total_steps(self) -> int:
        return self.trainer.steps + (self.rlaif.steps if self.rlaif.enabled else 0)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text below, those of untyped sections included."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _texts(value, f"{key}[{index}]")
