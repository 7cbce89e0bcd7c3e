"""The typed run config: unknown keys refused, resolved YAML out.

Every section is a pydantic model whose fields carry their unit in the description. `config_file` reads one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from sae_ray.variants import SAESpec

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class RayConfig(Section):
    address: str = Field(
        "local",
        description="local (own Ray), auto (join the one on this machine), host:port, ray://host:port",
    )
    local_cpus: Positive | None = Field(None, description="logical CPUs of an own Ray; null counts the machine's")
    object_store_mb: Positive | None = Field(
        None, description="object store of an own Ray, MiB; null takes Ray's default"
    )
    wait_s: Seconds = Field(
        300, description="how long any actor may take to start before the run says what it waits for"
    )

    @field_validator("address")
    @classmethod
    def _known_form(cls, value: str) -> str:
        if value in ("local", "auto") or re.fullmatch(r"(ray://)?[\w.\-\[\]:]+:\d+", value):
            return value
        raise ValueError("allowed: local, auto, HOST:PORT or ray://HOST:PORT")


class ModelConfig(Section):
    name: str = Field("smollm2-135m-instruct", description="embedded model, Hugging Face id or folder")
    dtype: Dtype = Field("auto", description="auto: bfloat16 where the hardware multiplies it natively, else float32")
    trust_remote_code: bool = False


class HookConfig(Section):
    layer: Annotated[int, Field(ge=0)] = Field(description="0-based transformer layer; later layers are never computed")
    site: Literal["resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_in", "mlp_out"] = Field(
        "resid_post", description="resid_mid: after attention; mlp_in: what the MLP reads, behind its norm"
    )

    @property
    def name(self) -> str:
        """TransformerLens-style hook name, as SAELens writes it into `cfg.json`."""
        # TransformerLens's hook_mlp_in lies before the norm: this one is its bridge's `mlp.hook_in`.
        return f"blocks.{self.layer}." + ("mlp.hook_in" if self.site == "mlp_in" else f"hook_{self.site}")

    @property
    def depth(self) -> tuple[int, int]:
        """Order in which a forward pass reaches hook points."""
        return self.layer, ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post").index(self.site)


class CorpusConfig(Section):
    kind: Literal["installed-docs", "text", "jsonl", "parquet", "hf"] = "installed-docs"
    paths: list[str] = Field(default_factory=list, description="files or globs, for text, jsonl and parquet")
    text_field: str = Field("text", description="field that holds the text, for jsonl, parquet and hf")
    dataset: str | None = Field(None, description="Hugging Face dataset id, for hf")
    subset: str | None = None
    split: str = "train"
    context_length: Positive = Field(128, description="tokens per sequence")
    shuffle: bool = Field(True, description="seeded shuffle of the documents (of a buffer of them, for hf)")
    max_documents: Positive | None = None
    pack: bool = Field(True, description="join documents end to end; false gives each its own padded sequences")

    @model_validator(mode="after")
    def _source_given(self) -> CorpusConfig:
        if self.kind in ("text", "jsonl", "parquet") and not self.paths:
            raise ValueError(f"corpus.kind {self.kind} needs corpus.paths")
        if self.kind == "hf" and not self.dataset:
            raise ValueError("corpus.kind hf needs corpus.dataset")
        return self


class ActivationsConfig(Section):
    producers: Positive = Field(2, description="actors that run the LM forward; their number never changes a loss")
    block_sequences: Positive = Field(16, description="sequences per block: one forward, one lease")
    mix_blocks: Positive = Field(4, description="blocks whose tokens are permuted together before batching")
    window_blocks: Positive = Field(12, description="blocks leased or held and not yet trained, at most")
    lease_timeout_s: Seconds = 120
    max_restarts: Positive = Field(10, description="producer deaths before the run gives up")
    mask_special_tokens: bool = True
    mask_first_tokens: Annotated[int, Field(ge=0)] = Field(
        1, description="positions dropped at the start of a sequence (attention sinks)"
    )
    cpus: float = Field(0.5, gt=0, description="logical CPUs per producer")
    gpus: float = Field(0, ge=0)
    threads: Positive = 1
    store: str | None = Field(
        None,
        description="read blocks from this activation store (folder or s3://bucket/prefix, made by `sae-ray store`) "
        "instead of running the model",
    )

    @model_validator(mode="after")
    def _window_holds_two_mixes(self) -> ActivationsConfig:
        if self.window_blocks < 2 * self.mix_blocks:
            raise ValueError(
                f"activations.window_blocks {self.window_blocks} must be at least twice mix_blocks {self.mix_blocks}, "
                "so that one mix is produced while another is trained"
            )
        return self


def _known_architecture(name: str) -> str:
    from sae_ray.sae.architectures import REGISTRY  # torch: not for `--help`

    if name not in REGISTRY:
        raise ValueError(f"{name!r} is unknown; known: {', '.join(REGISTRY)}")
    return name


class SAEConfig(Section):
    architecture: Annotated[str, AfterValidator(_known_architecture)] = "batchtopk"
    d_sae: Positive = 4608
    k: Positive = Field(
        32, description="active latents per token (batchtopk, matryoshka: on average; jumprelu: the L0 aimed at)"
    )
    k_start: Positive | None = Field(None, description="k at the first step, annealed to k; null starts at k")
    k_anneal_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps over which k_start becomes k")
    margin: Annotated[float, Field(ge=0)] = Field(
        0, description="topk: latents this far below a token's k-th largest are active too"
    )
    groups: list[Fraction] = Field(
        default_factory=lambda: [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0],
        description="matryoshka: prefixes of the latents that must reconstruct alone, as shares of d_sae",
    )
    sparsity: Literal["l1", "l2", "hoyer", "p_norm", "cross"] = Field(
        "l1",
        description="penalty on a token's activations f: sum f, ||f||_2, Hoyer-square, sum f^p, (sum f)^2 - sum f^2",
    )
    sparsity_coef: Annotated[float, Field(ge=0)] = Field(
        0, description="weight of the penalty: relu_l1 and gated need it, jumprelu may have it"
    )
    sparsity_warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="linear ramp of sparsity_coef")
    sparsity_p: Annotated[float, Field(gt=0, le=2)] = Field(0.5, description="p of p_norm")
    bandwidth: Annotated[float, Field(gt=0)] = Field(
        0.2, description="jumprelu: width of the straight-through kernel, as a share of a latent's threshold"
    )
    threshold_lr: Annotated[float, Field(gt=0)] = Field(
        0.05, description="jumprelu: learning rate of the thresholds (of the size of activations), never decayed"
    )
    input_norm: Literal["none", "sqrt_d", "rms"] = Field(
        "sqrt_d", description="scalar on the inputs; sqrt_d: mean norm sqrt(d_in); rms: mean squared norm d_in"
    )
    subtract_b_dec: bool = Field(True, description="encode x - b_dec; a transcoder never does")
    b_dec_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    decoder_norm: Literal["unit", "free"] = Field("unit", description="unit: rows are renormalised after every step")
    init_norm: Annotated[float, Field(gt=0)] = Field(
        round(3**-0.5, 4),
        description="norm of the encoder's rows (and the decoder's, if free) at the start (benchmarks/init_norm.py)",
    )
    init_from: str | None = Field(
        None, description="an SAE folder or file of any format that `sae-ray import` reads, to fine-tune"
    )
    aux_k: Annotated[int, Field(ge=0)] = Field(
        64, description="dead latents that AuxK revives per token; 0 turns it off"
    )
    aux_coef: Annotated[float, Field(ge=0)] = 1 / 32
    aux_pool: Positive = Field(
        512, description="dead latents that AuxK chooses from in one step: about as many, drawn anew each step"
    )
    dead_after_tokens: Positive = Field(100_000, description="a latent silent for this many tokens is dead")
    resample_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between resamplings of dead latents (while the learning rate is constant); 0: never"
    )

    @model_validator(mode="after")
    def _fits_its_architecture(self) -> SAEConfig:
        from sae_ray.sae.architectures import REGISTRY

        for key in ("k", "k_start"):
            if (value := getattr(self, key)) is not None and value > self.d_sae:
                raise ValueError(f"sae.{key} {value} is larger than sae.d_sae {self.d_sae}")
        kind = REGISTRY[self.architecture]
        kind.check(self)
        if self.k_start is not None and not kind.ranks:
            ranking = ", ".join(name for name, other in REGISTRY.items() if other.ranks)
            raise ValueError(f"sae.k_start is for {ranking}, not for {self.architecture}")
        if self.margin and self.architecture != "topk":
            raise ValueError(f"sae.margin is for topk, not for {self.architecture}")
        if self.groups != sorted(set(self.groups)) or not self.groups or self.groups[-1] != 1 or self.groups[0] <= 0:
            raise ValueError(f"sae.groups {self.groups} must rise from above 0 to 1")
        return self


class TrainerConfig(Section):
    dp: Positive = 1
    tp: Positive = 2
    batch_tokens: Positive = Field(1024, description="tokens per step over all dp ranks")
    steps: Positive = Field(400, description="steps of the reconstruction phase")
    lr: Annotated[float, Field(gt=0)] = 4e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    decay: Literal["linear", "cosine"] = "linear"
    decay_fraction: Fraction = Field(
        0.2, description="last share of the reconstruction phase over which lr falls to lr_final"
    )
    lr_final: Annotated[float, Field(ge=0)] = Field(
        1e-4, description="lr at the end of the reconstruction phase, kept in the RLAIF phase"
    )
    optimizer: Literal["adam", "adamw", "adam8bit", "signum"] = "adam"
    weight_decay: Annotated[float, Field(ge=0)] = Field(0, description="decoupled; for adamw, adam8bit and signum")
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 turns clipping off")
    dtype: Literal["float32", "float64"] = "float32"
    autocast: Literal["none", "bfloat16"] = Field(
        "none", description="bfloat16: the encoder's products in bf16; parameters, sums and the optimiser stay in dtype"
    )
    compile: bool = Field(False, description="torch.compile the elementwise parts (needs a C++ compiler on CPU)")
    log_every: Positive = 10
    checkpoint_every: Positive = Field(100, description="steps between commits (taken at the next window's end)")
    keep_checkpoints: Positive = 2
    checkpoint_dir: str | None = Field(
        None, description="where checkpoints go: a folder all nodes share, or s3://bucket/prefix; null: the run folder"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="trainer group rebuilds before the run gives up")
    step_timeout_s: Seconds = Field(600, description="how long a window may train before the run says a rank hangs")
    cpus: float = Field(0.5, gt=0, description="logical CPUs per rank")
    gpus: float = Field(0, ge=0)
    threads: Positive = 1


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


class JudgeConfig(Section):
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
        300, description="a replica whose engine has work and finishes nothing for this long is replaced"
    )
    max_attempts: Positive = 5
    max_in_flight: Positive = Field(8, description="calls one caller keeps open")
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="after")
    def _one_way_to_a_judge(self) -> JudgeConfig:
        from sae_ray.judge.roles import check_judge

        check_judge(self)
        return self


class RLAIFConfig(Section):
    enabled: bool = True
    steps: Positive = Field(200, description="steps of the RLAIF phase, after the reconstruction phase")
    rounds: Positive = Field(2, description="evidence, explanation and verdict rounds")
    latents: Positive = Field(32, description="latents judged per round")
    evidence_blocks: Positive = Field(16, description="blocks of the evidence split that contexts are drawn from")
    positives: Positive = Field(12, description="judged active contexts per latent and round")
    near_misses: Annotated[int, Field(ge=0)] = 6
    siblings: Annotated[int, Field(ge=0)] = 6
    randoms: Annotated[int, Field(ge=0)] = 6
    explainer_examples: Positive = Field(8, description="active contexts shown to the explainer, never judged")
    candidates: Positive = Field(
        2, description="explanations from the language model that compete, besides the lexical one"
    )
    estimator: Literal["teacher_gate", "bank_gate"] = "teacher_gate"
    gamma: Annotated[float, Field(ge=0)] = Field(0.3, description="weight of the credit loss; 0 costs nothing")
    slope: Annotated[float, Field(gt=0)] = Field(
        10, description="logit slope of the gate, in units of a latent's threshold"
    )
    shrink: Fraction = Field(
        0.5, description="teacher direction: 1 keeps the SAE's own, 0 the whitened mean difference"
    )
    half_life_steps: Positive = Field(400, description="age at which a reward counts half")
    max_staleness_steps: Positive = Field(
        60, description="steps the trainer may run ahead of a requested round before it waits for the rewards"
    )
    round_timeout_s: Seconds = Field(900, description="how long a round may take before the run says the judges hang")
    max_context_share: Fraction = Field(0.5, description="latents active in more contexts than this are not judged")
    control: bool = Field(False, description="train a copy with gamma 0 on the same batches, to compare with")


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

    blocks: Positive = Field(64, description="blocks of the evidence split that the evidence comes from")
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
    seed: int = 0
    runs_dir: str = "runs"
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
    def _every_sae_fits(self) -> RunConfig:
        from sae_ray.variants import check_specs

        check_specs(self)
        return self

    @model_validator(mode="after")
    def _every_judge_fits(self) -> RunConfig:
        from sae_ray.judge.roles import judges_of

        judges_of(self)
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
