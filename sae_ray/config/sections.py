"""The sections of a run config about Ray, the model, the corpus, the stream, the SAE and its trainer."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from sae_ray.places import LocalPath, Place

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class RayConfig(Section):
    address: str = Field(
        "local",
        description="local (own Ray), auto (join the one on this machine), host:port, ray://host:port",
    )
    trust_network: bool = Field(
        False, description="join a cluster on another machine without a token, though others may reach it"
    )
    local_cpus: Positive | None = Field(None, description="logical CPUs of an own Ray; null counts the machine's")
    object_store_mb: Positive | None = Field(
        None, description="object store of an own Ray, MiB; null takes Ray's default"
    )
    wait_s: Seconds = Field(
        300, description="how long any actor may take to start before the run says what it waits for"
    )
    may_grow: bool = Field(
        True,
        description="whether a joined cluster may get more nodes, by an autoscaler or because they still start; false: "
        "a run that its nodes can never hold ends at once",
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


_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.\-]{0,61}[A-Za-z0-9])?"


def _custom_resource(name: str) -> str:
    key = {"cpu": "cpus", "gpu": "gpus"}.get(name.lower())
    if key is not None or name.lower() in ("memory", "object_store_memory") or not re.fullmatch(_NAME, name):
        raise ValueError("is no custom resource" + (f": set {key} beside it" if key else ""))
    return name


def _label_name(name: str) -> str:
    if not re.fullmatch(rf"([A-Za-z0-9.\-]{{1,253}}/)?{_NAME}", name):
        raise ValueError("is no label's name; one looks like sae-ray/role")
    return name


def _label_value(asked: str) -> str:
    if not re.fullmatch(rf"!?({_NAME}|in\({_NAME}(, ?{_NAME})*\))", asked):
        raise ValueError("selects nothing; expected a, !a, in(a, b) or !in(a, b)")
    return asked


class FencedSection(Section):
    """Of actors that may be kept to some nodes, and other actors away from those."""

    resources: dict[Annotated[str, AfterValidator(_custom_resource)], Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="custom resources that each asks for, so that it goes where they are offered"
    )
    label_selector: dict[Annotated[str, AfterValidator(_label_name)], Annotated[str, AfterValidator(_label_value)]] = (
        Field(
            default_factory=dict,
            description="labels of the nodes that may hold it: {sae-ray/role: judge}; also !judge, in(a, b), !in(a, b)",
        )
    )


class ProducerRange(Section):
    min: Positive
    max: Positive


def _number_or_range(value: Any) -> int | ProducerRange:
    """One message for both forms, where pydantic would give one for each."""
    if isinstance(value, ProducerRange) or (type(value) is int and value > 0):
        return value
    if isinstance(value, dict) and value.keys() <= {"min", "max"}:
        least, most = value.get("min", 1), value.get("max")
        if type(least) is type(most) is int and 0 < least <= most:
            return ProducerRange(min=least, max=most)
    where = "activations.producers: " if isinstance(value, dict) else ""
    raise ValueError(f"{where}expected a number above 0, or {{min: 1, max: 8}} with min <= max")


def _written(value: int | ProducerRange) -> Any:
    return value if isinstance(value, int) else value.model_dump()


class ActivationsConfig(FencedSection):
    producers: Annotated[int | ProducerRange, PlainValidator(_number_or_range), PlainSerializer(_written)] = Field(
        2,
        description="actors that run the LM forward; their number never changes a loss. {min: 1, max: 8}: as many as "
        "keep the trainer busy",
    )
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
    store: Place | None = Field(
        None,
        description="read blocks from this activation store (folder or s3://bucket/prefix, made by `sae-ray store`) "
        "instead of running the model",
    )

    @property
    def least_producers(self) -> int:
        return self.producers if isinstance(self.producers, int) else self.producers.min

    @property
    def most_producers(self) -> int:
        return self.producers if isinstance(self.producers, int) else self.producers.max

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
    init_from: LocalPath | None = Field(
        None, description="an SAE folder or file of any format that `sae-ray import` reads, to fine-tune"
    )
    export: Literal["same", "saelens", "sparsify", "dictionary_learning", "gemma_scope"] | None = Field(
        "same",
        description="format that the run ends by writing; same: that of init_from, in its units (saelens without one); "
        "null: none",
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


class TrainerConfig(FencedSection):
    dp: Positive = 1
    tp: Positive = 2
    batch_tokens: Positive = Field(1024, description="tokens per step over all dp ranks")
    steps: Annotated[int, Field(ge=0)] = Field(
        400, description="steps of the reconstruction phase; 0: RLAIF begins at once, with sae.init_from"
    )
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
    checkpoint_dir: Place | None = Field(
        None, description="where checkpoints go: a folder all nodes share, or s3://bucket/prefix; null: the run folder"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="trainer group rebuilds before the run gives up")
    step_timeout_s: Seconds = Field(600, description="how long a window may train before the run says a rank hangs")
    cpus: float = Field(0.5, gt=0, description="logical CPUs per rank")
    gpus: float = Field(0, ge=0)
    threads: Positive = 1
