"""The sections of a run config about what a judged round rewards, and about the alarms that watch the rewards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sae_ray.config.sections import Fraction, Positive, Section

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RewardWeights(Section):
    """Of the parts of a latent's reward, each in standard deviations of its own; 0: not measured, and nothing is asked
    for it. The verdicts that choose explanations and say whether to trust them are asked under any weights."""

    interpretability: Weight = Field(
        1,
        description="detection AUROC minus that of a shuffled explanation; at 0 the latter is asked about only for "
        "estimators that weigh latents by trust: all but selection_bonus",
    )
    description: Weight = Field(
        0, description="minus the bits of the shortest explanation that is as good, latents compared at equal score"
    )
    atomicity: Weight = Field(0, description="minus the share of the decoder row that is composed of shared atoms")
    splitting: Weight = Field(0, description="minus duplicates, splitting and shared explanations")
    causality: Weight = Field(0, description="judged text of the language model, steered along the decoder row")
    logit_effect: Weight = Field(0, description="decoder row against the tokens that follow; asks no judge")

    @model_validator(mode="after")
    def _something_counts(self) -> RewardWeights:
        if not any(self.model_dump().values()):
            raise ValueError("rlaif.rewards.weights: every weight is 0, so there is nothing to reward")
        return self

    @property
    def combined(self) -> bool:
        """Whether anything but interpretability counts: then the parts are combined into one advantage."""
        return any(weight for part, weight in self.model_dump().items() if part != "interpretability")


class AtomicityConfig(Section):
    """The dictionary that decoder rows are composed of (`reward.atomicity`)."""

    atoms: Positive | None = Field(None, description="null: a twentieth of the latents, at most 4096")
    per_code: Positive = Field(4, description="atoms that a row is composed of, at most")
    rounds: Positive = Field(24, description="of fitting the atoms, anew in every judged round")


class CausalityConfig(Section):
    """How the language model is steered (`reward.steering`), and where the actor that does it runs."""

    prompts: Annotated[int, Field(ge=2)] = Field(4, description="beginnings of evidence texts that are continued")
    prompt_tokens: Positive = Field(8, description="of each beginning")
    target_kl: Annotated[float, Field(gt=0)] = Field(
        0.5, description="nats by which steering moves the next token's distribution, mean over the prompts"
    )
    tolerance: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="of that, relative")
    positions: Literal["all", "last"] = Field("all", description="tokens of the prompt that are steered")
    tokens: Positive = Field(24, description="of a continuation")
    samples: Positive = Field(2, description="continuations of each prompt")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    rows: Positive = Field(64, description="sequences of one forward pass, at most")
    cpus: float = Field(0.5, gt=0, description="logical CPUs of the actor")
    gpus: float = Field(0, ge=0)


class RewardsConfig(Section):
    weights: RewardWeights = RewardWeights()
    memory: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="share of a part's running baseline and scale that a round leaves in place"
    )
    clip: Annotated[float, Field(gt=0)] = Field(4, description="standard deviations beyond which a part is cut")
    min_coverage: Fraction = Field(0.3, description="share of the weight below which a latent has no reward")
    atomicity: AtomicityConfig = AtomicityConfig()
    causality: CausalityConfig = CausalityConfig()
    threads: Positive = Field(1, description="of the processes that compute parts: the desk, the steered model")


class AlarmLimits(Section):
    cool: Annotated[float, Field(gt=0)] = Field(description="severity from which on gamma is lowered")
    stop: Annotated[float, Field(gt=0)] = Field(description="severity at which gamma is 0 for good")


class AlarmsConfig(Section):
    """Signs that the reward rises by the judge's weakness (`reward.alarms`). A stop is lifted by `enabled: false`."""

    enabled: bool = Field(True, description="watch each round: how often and on what judged latents fire is free")
    duplicates: bool = Field(
        False, description="also the share of latents with a near twin: each round the desk fetches the whole decoder"
    )
    held_out: bool = Field(
        False, description="also the gap to judges.heldout, which is then deployed for the whole run and asked as well"
    )
    limits: dict[str, AlarmLimits] = Field(
        default_factory=dict, description="by alarm, where not reward.alarms.DEFAULT_LIMITS"
    )
    reference_rounds: Positive = Field(1, description="first rounds, which later ones are compared with")
    gap_tolerance: Annotated[float, Field(ge=0)] = Field(0.01, description="growth of the gap that is not suspicious")
    recovery: Annotated[float, Field(gt=0, le=1)] = Field(0.25, description="most that gamma's factor rises per round")

    @property
    def asks_held_out(self) -> bool:
        return self.enabled and self.held_out

    @field_validator("limits")
    @classmethod
    def _limits_make_sense(cls, value: dict[str, AlarmLimits]) -> dict[str, AlarmLimits]:
        from sae_ray.reward.alarms import DEFAULT_LIMITS

        for name, limits in value.items():
            key = f"rlaif.alarms.limits.{name}"
            if name not in DEFAULT_LIMITS:
                raise ValueError(f"{key}: no such alarm; known: {', '.join(DEFAULT_LIMITS)}")
            if not limits.cool < limits.stop:
                raise ValueError(f"{key}: cool {limits.cool} must be below stop {limits.stop}")
        return value
