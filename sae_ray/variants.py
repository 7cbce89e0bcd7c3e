"""The SAEs of one run: its own sections are "main", each entry of `saes` is those sections with some keys changed.

All of them train on the same batches of the same blocks, so only what one SAE may have for itself can differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from sae_ray.config import (
    HookConfig,
    RunConfig,
    SAEConfig,
    SAEVariant,
    Section,
    TrainerConfig,
)
from sae_ray.config_file import explain, unknown_key

MAIN = "main"
# Names of the versions of main, which evaluations list beside the variants, and of the null beside them.
TAKEN = (MAIN, "control", "before", "rlaif", "random_directions")
# Keys of `trainer` that are one SAE's own; all others are about the batches or the processes, which are shared.
OWN_TRAINER_KEYS = (
    *("lr", "warmup_steps", "decay", "decay_fraction", "lr_final"),
    *("optimizer", "weight_decay", "betas", "grad_clip", "autocast"),
)

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class SAESpec:
    """One SAE of a run: what it reads, what it reconstructs (None: what it reads), and how it is trained."""

    hook: HookConfig
    hook_out: HookConfig | None
    sae: SAEConfig
    trainer: TrainerConfig

    @property
    def target(self) -> HookConfig:
        """The hook point that is reconstructed."""
        return self.hook_out or self.hook


def specs_of(run: RunConfig) -> dict[str, SAESpec]:
    """See `RunConfig.specs`.

    Raises:
        ValueError: a variant has an unknown or refused key or value; names it as `saes[1].sae.k`.
    """
    specs = {MAIN: SAESpec(run.hook, run.hook_out, run.sae, run.trainer)}
    for index, variant in enumerate(run.saes):
        specs[variant.name] = _merged(run, variant, index)
    return specs


def check_specs(run: RunConfig) -> None:
    """Refuses SAEs that cannot be trained together, or judged.

    Raises:
        ValueError: in words for the user.
    """
    seen: set[str] = set(TAKEN)
    for index, variant in enumerate(run.saes):
        where = f"saes[{index}].name {variant.name!r}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", variant.name):
            raise ValueError(
                f"{where}: a name is 1 to 40 letters, digits, '_' or '-', and starts with a letter or digit"
            )
        if variant.name in seen:
            taken = f"is one of {', '.join(TAKEN)}" if variant.name in TAKEN else "stands twice"
            raise ValueError(f"{where} {taken}; every SAE needs a name of its own")
        seen.add(variant.name)
    for index, spec in enumerate(run.specs().values()):
        where = f"saes[{index - 1}]." if index else ""
        _check_widths(spec, run.trainer.tp, where)
        if spec.hook_out is not None and spec.hook_out.depth <= spec.hook.depth:
            raise ValueError(
                f"{where}hook_out {spec.hook_out.name} does not lie behind {where}hook {spec.hook.name}: a transcoder "
                "reconstructs a later hook point"
            )
    _check_start(run)
    _check_judged(run)


def _merged(run: RunConfig, variant: SAEVariant, index: int) -> SAESpec:
    where = ("saes", index)
    for key in variant.trainer:
        if key not in OWN_TRAINER_KEYS:
            shared = f"is shared by all SAEs of a run; allowed here: {', '.join(OWN_TRAINER_KEYS)}"
            known = key in TrainerConfig.model_fields
            raise ValueError(
                f"saes[{index}].trainer.{key}: {shared if known else unknown_key(key, list(OWN_TRAINER_KEYS))}"
            )
    hook_out = run.hook_out
    if variant.hook_out == "none":
        hook_out = None
    elif variant.hook_out is not None:
        base = {} if hook_out is None else hook_out.model_dump()
        hook_out = _section(HookConfig, base | variant.hook_out, (*where, "hook_out"))
    return SAESpec(
        _section(HookConfig, run.hook.model_dump() | variant.hook, (*where, "hook")),
        hook_out,
        _section(SAEConfig, run.sae.model_dump() | variant.sae, (*where, "sae")),
        _section(TrainerConfig, run.trainer.model_dump() | variant.trainer, (*where, "trainer")),
    )


def _section(kind: type[SectionT], values: dict[str, Any], where: tuple[str | int, ...]) -> SectionT:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # ValueErrors are what pydantic, whose check calls this, turns into a message.
        raise ValueError(explain(error, where)) from None


def _check_widths(spec: SAESpec, tp: int, where: str) -> None:
    if left := spec.sae.d_sae % tp:
        below = spec.sae.d_sae - left
        raise ValueError(
            f"{where}sae.d_sae {spec.sae.d_sae} is not divisible by trainer.tp {tp}; {below} or {below + tp} would be"
        )


def _check_start(run: RunConfig) -> None:
    """Without a reconstruction phase there must be something to fine-tune, and something that does it."""
    if run.trainer.steps:
        return
    if not run.rlaif.enabled:
        raise ValueError("trainer.steps 0 and rlaif.enabled false: nothing would be trained")
    for index, spec in enumerate(run.specs().values()):
        if spec.sae.init_from is None:
            where = f"saes[{index - 1}]." if index else ""
            raise ValueError(
                f"trainer.steps 0: RLAIF would begin on an SAE that knows nothing; name a trained one in "
                f"{where}sae.init_from, or set trainer.steps"
            )


def _check_judged(run: RunConfig) -> None:
    """Judges read where a latent of main is active at its hook point; not every SAE can be asked that yet."""
    from sae_ray.sae.architectures import REGISTRY

    asked = [
        f"{key}: {value}"
        for key, value, on in (
            ("rlaif.enabled", "false", run.rlaif.enabled),
            ("evaluation.latents", "0", run.evaluation.latents > 0),
        )
        if on
    ]
    judged = [name for name, kind in REGISTRY.items() if kind.judged]
    if asked and run.sae.architecture not in judged:
        raise ValueError(
            f"sae.architecture {run.sae.architecture} cannot be judged (only {', '.join(judged)} can): "
            f"set {' and '.join(asked)}, or make it one of `saes` beside a main that can"
        )
    kind = REGISTRY[run.sae.architecture]
    if run.rlaif.enabled and run.rlaif.estimator == "selection_bonus" and not (kind.ranks or kind.name == "jumprelu"):
        raise ValueError(
            f"rlaif.estimator selection_bonus acts on a ranking or a price of latents, and {kind.name} has neither: "
            "teacher_gate, bank_gate, threshold, reward_model, evolution and preference do not need one"
        )
    if asked and run.hook_out is not None:
        raise ValueError(
            f"hook_out {run.hook_out.name}: a transcoder cannot be judged: set {' and '.join(asked)}, "
            "or make it one of `saes` beside a main that is no transcoder"
        )
    if run.rlaif.enabled and run.rlaif.gate_threshold == "fitted" and run.sae.architecture == "jumprelu":
        raise ValueError(
            "rlaif.gate_threshold fitted: is not for sae.architecture jumprelu, whose thresholds are learned and "
            "hold its L0; moving would be right"
        )
