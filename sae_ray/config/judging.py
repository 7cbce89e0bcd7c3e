"""The sections of a run config about judges: the pool, RLAIF, evaluation and `sae-ray judge`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sae_ray.config.loop import LoopConfig
from sae_ray.config.rewards import AlarmsConfig, RewardsConfig
from sae_ray.config.sections import Dtype, FencedSection, Fraction, Positive, Seconds, Section
from sae_ray.places import LocalPath


class AutoscalingConfig(Section):
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Positive = 1
    initial_replicas: Annotated[int, Field(ge=0)] = 1
    target_ongoing_requests: Positive = Field(8, description="ongoing calls per replica that autoscaling aims at")
    max_ongoing_requests: Positive = Field(16, description="ongoing calls a replica accepts")
    max_queued_requests: Annotated[int, Field(ge=-1)] = Field(
        -1, description="calls of one caller that wait for a replica; further ones are put off; -1: no limit"
    )
    upscale_delay_s: Seconds = 5
    downscale_delay_s: Seconds = 60
    upscaling_factor: Annotated[float, Field(gt=0)] = 4

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"judge.autoscaling: min_replicas {self.min_replicas} <= initial_replicas {self.initial_replicas} "
                f"<= max_replicas {self.max_replicas} must hold"
            )
        if self.max_queued_requests == 0:
            raise ValueError("judge.autoscaling: max_queued_requests 0 would refuse every call; -1 sets no limit")
        return self


class CalibrationConfig(Section):
    concepts: Positive = Field(12, description="planted concepts, found in the corpus itself")
    texts_per_concept: Positive = Field(4)
    min_auroc: Fraction = Field(0.6, description="a judge whose AUROC is not above this with its interval is at chance")
    seed: int = 0


class JudgeConfig(FencedSection):
    model: str = Field(
        "smollm2-135m-instruct", description="embedded model, Hugging Face id or folder that vLLM serves"
    )
    s3_mirror: str | None = Field(
        None, description="s3://bucket/prefix that holds the model's folder; replicas load it from there, not the Hub"
    )
    app: str | None = Field(
        None, description="a judge application that already serves, shared between runs; null deploys one"
    )
    endpoint: str | None = Field(
        None, description="base URL of a server that speaks OpenAI's API, asked instead of deploying: http://host/v1"
    )
    endpoint_model: str | None = Field(
        None, description="the model's name at judge.endpoint; null: the only one that it serves"
    )
    api_key_env: str | None = Field(
        None, description="environment variable that holds the key for judge.endpoint; the key itself stands nowhere"
    )
    trust_network: bool = Field(
        False, description="send the key to another machine over plain http://, though others may read it there"
    )
    dtype: Dtype = "auto"
    quantization: str | None = Field(None, description="vLLM's name of the model's quantisation, e.g. awq, fp8")
    lora: dict[str, str] = Field(default_factory=dict, description="LoRA adapters by name: folder or Hugging Face id")
    adapter: str | None = Field(None, description="the adapter of judge.lora that answers; null: the model itself")
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of vLLM's engine, except those that other keys decide"
    )
    trust_remote_code: bool = False
    mode: Literal["auto", "likelihood", "yes_no"] = Field("auto", description="auto: the mode that calibrates best")
    max_model_len: Positive = 2048
    context_tokens: Positive = Field(32, description="tokens of a judged text")
    cpus: float = Field(1, gt=0, description="logical CPUs per replica")
    gpus: float = Field(0, ge=0)
    tensor_parallel: Positive = 1
    threads: Positive = 2
    kv_cache_gb: Annotated[float, Field(gt=0)] = Field(1, description="KV cache of a CPU replica, GiB")
    start_timeout_s: Seconds = 300
    deadline_s: Seconds = Field(120, description="a request that has no answer by then, retries included, is missing")
    stall_timeout_s: Seconds = Field(
        300,
        description="a replica whose engine has work and finishes nothing for so long is replaced some 30 s later",
    )
    max_attempts: Positive = 5
    max_in_flight: Positive | None = Field(
        None,
        description="calls one caller keeps open; null: what all replicas that autoscaling may start aim at together",
    )
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    @property
    def calls_in_flight(self) -> int:
        """`max_in_flight`, decided."""
        return self.max_in_flight or self.autoscaling.max_replicas * self.autoscaling.target_ongoing_requests

    @property
    def replicas_worth(self) -> int:
        """How many replicas a caller can keep busy: who asks has as much work open."""
        return math.ceil(self.calls_in_flight / self.autoscaling.target_ongoing_requests)

    @model_validator(mode="after")
    def _one_way_to_a_judge(self) -> JudgeConfig:
        from sae_ray.judge.roles import check_judge

        check_judge(self)
        return self


class RLAIFConfig(LoopConfig):
    enabled: bool = True
    steps: Positive = Field(200, description="steps of the RLAIF phase, after the reconstruction phase")
    rounds: Positive = Field(2, description="evidence, explanation and verdict rounds")
    latents: Positive = Field(32, description="latents judged per round")
    evidence_blocks: Positive = Field(16, description="blocks of the evidence split that contexts are drawn from")
    positives: Positive = Field(12, description="judged active contexts per latent and round")
    near_misses: Annotated[int, Field(ge=0)] = 6
    siblings: Annotated[int, Field(ge=0)] = Field(
        6, description="contexts of the latents closest in the whole dictionary, itself inactive"
    )
    randoms: Annotated[int, Field(ge=0)] = 6
    explainer_examples: Positive = Field(8, description="active contexts shown to the explainer, never judged")
    candidates: Positive = Field(
        2, description="explanations from the language model that compete, besides the lexical one"
    )
    estimator: Literal[
        "teacher_gate",
        "bank_gate",
        "threshold",
        "selection_bonus",
        "reward_model",
        "evolution",
        "preference",
        "policy_gradient",
        "teacher_gate+policy_gradient",
    ] = Field(
        "teacher_gate",
        description="how verdicts become gradients: see sae_ray/reward/credit; policy_gradient learns from the steered "
        "generations of rewards.weights.causality",
    )
    gamma: Annotated[float, Field(ge=0)] = Field(
        0.03,
        description="weight of the credit loss; 0, and no rollout_gamma, teaches nothing, but rounds are judged all "
        "the same, to be watched (`enabled: false` asks no judge)",
    )
    rollout_gamma: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of policy_gradient, alone or beside another, instead of gamma; null: gamma"
    )
    slope: Annotated[float, Field(gt=0)] = Field(
        10, description="logit slope of the gate, in units of a latent's threshold"
    )
    shrink: Fraction | None = Field(
        None,
        description="teacher direction: 1 keeps the SAE's own, 0 the whitened mean difference; null: chosen for each "
        "latent by verdicts that did not shape it",
    )
    max_turn: Annotated[float, Field(gt=0)] = Field(
        1.5708,
        description="radians that credit may turn a latent's encoder and decoder row in a round if its evidence were "
        "unlimited; reconstruction may turn them further",
    )
    bonus: Annotated[float, Field(ge=0)] = Field(
        0.1, description="of selection_bonus: thresholds that an advantage of 1 is worth"
    )
    half_life_steps: Positive = Field(400, description="age at which a reward counts half")
    max_staleness_steps: Annotated[int, Field(ge=0)] = Field(
        60, description="steps the trainer may run ahead of a requested round before it waits for the rewards; 0: none"
    )
    round_timeout_s: Seconds = Field(900, description="how long a round may take before the run says the judges hang")
    max_context_share: Fraction = Field(0.5, description="latents active in more contexts than this are not judged")
    verdict_cut: Literal["planted", "own"] = Field(
        "planted",
        description="where a score is a yes: at probability 1/2 by the planted items, or where the explanation's own "
        "scores best tell the latent's active texts from random ones",
    )
    control: bool = Field(False, description="train a copy with gamma 0 on the same batches, to compare with")
    shuffle_verdicts: bool = Field(
        False, description="control: what teaches is the verdicts of each kind of text, dealt anew over the latents"
    )
    rewards: RewardsConfig = RewardsConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    replay_rewards: LocalPath | None = Field(
        None,
        description="a finished run's folder, whose rewards are applied where that run did instead of asking judges",
    )

    @model_validator(mode="after")
    def _rewards_are_used(self) -> RLAIFConfig:
        asked = self.rewards.weights.combined or self.rollout_gamma is not None or "policy_gradient" in self.estimator
        if not self.enabled or not asked:
            return self
        from sae_ray.reward.credit import ESTIMATORS  # torch: not for `--help`

        own = ESTIMATORS[self.estimator]
        if own.uses_rollouts and self.judged and not self.rewards.weights.causality:
            raise ValueError(
                f"rlaif.estimator {self.estimator}: learns from steered generations, which only the causality part has "
                "written and judged: give rlaif.rewards.weights.causality a weight"
            )
        if self.rollout_gamma is not None and not own.uses_rollouts:
            known = ", ".join(name for name, kind in ESTIMATORS.items() if kind.uses_rollouts)
            raise ValueError(
                f"rlaif.rollout_gamma {self.rollout_gamma:g}: rlaif.estimator {self.estimator} uses no rollouts; "
                f"estimators that do: {known}"
            )
        for part, weight in self.rewards.weights.model_dump().items():
            rollouts = part == "causality"
            if not weight or part == "interpretability" or own.uses_reward or (rollouts and own.uses_rollouts):
                continue
            using = [n for n, kind in ESTIMATORS.items() if kind.uses_reward or (rollouts and kind.uses_rollouts)]
            raise ValueError(
                f"rlaif.rewards.weights.{part}: rlaif.estimator {self.estimator} follows verdicts and uses no "
                f"reward, so this would be measured for nothing; estimators that use it: {', '.join(using)}"
            )
        return self

    @property
    def judged(self) -> bool:
        """Whether the run asks judges for its rewards, and does not take another run's."""
        return self.enabled and self.replay_rewards is None


class EvaluationConfig(Section):
    blocks: Positive = Field(8, description="held-out blocks for FVU, L0, dead latents and detection contexts")
    ce_sequences: Positive = Field(16, description="held-out sequences for the CE loss recovered")
    latents: Annotated[int, Field(ge=0)] = Field(
        32, description="latents whose detection is measured, the RLAIF-judged ones first; 0 asks no judge"
    )
    positives: Positive = 10
    negatives: Positive = 10
    random_directions: Annotated[int, Field(ge=0)] = Field(16, description="latents of the random-direction null")
    threads: Positive = 2
    timeout_s: Seconds = Field(1800, description="how long an evaluation may take before the run says it hangs")


class JudgingConfig(Section):
    """`sae-ray judge`: which evidence is collected, who explains, and what is measured."""

    blocks: Positive = Field(64, description="blocks that the evidence comes from")
    split: Literal["evidence", "heldout"] = Field(
        "evidence", description="texts that are judged on; heldout: for SAEs whose rewards came from the evidence split"
    )
    top: Positive = Field(20, description="strongest contexts kept per latent and side")
    quantiles: Positive = Field(10, description="activation quantile groups, each sampled alike")
    per_quantile: Positive = Field(6, description="contexts kept per quantile group and side")
    near_misses: Annotated[int, Field(ge=0)] = Field(20, description="inactive contexts closest below the threshold")
    randoms: Annotated[int, Field(ge=0)] = Field(40, description="random contexts in which the latent is inactive")
    siblings: Annotated[int, Field(ge=0)] = Field(20, description="contexts of the most alike latents, itself inactive")
    min_contexts: Positive = Field(12, description="active contexts below which a latent is not judged")
    explainers: list[str] = Field(default_factory=lambda: ["max_activating", "lexical"], min_length=1)
    prompting: Literal["auto", "chat", "few_shot"] = Field(
        "auto", description="how explanations are asked for; auto: by chat if the judge is good at yes/no questions"
    )
    marks: Literal["delimiters", "blocks", "pairs"] = Field(
        "delimiters", description="how active tokens are marked: <<word>>, Unicode blocks, or token and value"
    )
    shown: Positive = Field(8, description="examples that an explainer sees")
    candidates: Positive = Field(2, description="explanations asked of the language model per latent and explainer")
    clusters: Positive = Field(1, description="meanings that a polysemantic latent may be split into")
    scorers: list[str] = Field(default_factory=lambda: ["detection", "fuzzing"], min_length=1)
    positives: Positive = Field(20, description="active texts per latent and scorer")
    negatives: Positive = Field(20, description="inactive texts per latent and scorer: near misses, siblings, randoms")
    null_share: Fraction = Field(
        0.5, description="share of the texts on which another latent's explanation is judged too (the shuffled null)"
    )
    stop_at_stderr: Annotated[float, Field(ge=0)] = Field(
        0, description="a latent is judged on no more texts once its score's standard error is this; 0: always on all"
    )
    random_directions: Annotated[int, Field(ge=0)] = Field(16, description="latents of the random-direction null")
    baselines: list[Literal["residual relu", "residual abs", "residual shift", "mlp relu", "mlp abs", "mlp shift"]] = (
        Field(default_factory=list, description="neurons of the language model that are judged in the same way")
    )
    baseline_neurons: Positive = Field(16, description="neurons of each baseline")
    shards: Positive = Field(1, description="actors that collect evidence, each of a part of the latents")
    embedder: str = Field("all-minilm-l6-v2", description="embedding judge: embedded model, Hugging Face id or folder")
    batch_latents: Positive = Field(16, description="latents judged and committed together")
    batch_timeout_s: Seconds = Field(1800, description="how long a batch may take before it is said that judges hang")
