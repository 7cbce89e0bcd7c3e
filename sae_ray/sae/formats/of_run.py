"""The SAEs of a run folder, with where their inputs come from, and the format and units that they are exported in."""

from __future__ import annotations

import torch

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.sae.formats import FORMATS, detect, read_sae
from sae_ray.sae.formats.notes import Found, Provenance
from sae_ray.sae.formats.origin import in_units_of
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer import checkpoint
from sae_ray.variants import SAESpec

SAME, USUAL = "same", "saelens"


def sae_of_run(config: RunConfig, name: str = "main", step: int | None = None) -> tuple[int, Found]:
    """The step of a committed checkpoint (None: the last), and the SAE called `name` in it.

    Raises:
        UserError: no such checkpoint or SAE, or a file is missing or corrupt (it is named).
    """
    home = checkpoint.home(config)
    steps = [number for number, _ in checkpoint.committed(home)]
    if not steps:
        raise UserError(f"{home}: holds no committed checkpoint; train the run first")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"{home}: has no committed checkpoint of step {step}, only of {', '.join(map(str, steps))}")
    sae = TrainedSAE.from_checkpoint(*checkpoint.load_full(checkpoint.step_dir(home, step), name))
    spec = _spec(config, name)
    hook_out = spec.hook_out.name if spec.hook_out else None
    corpus = config.corpus
    where = Provenance(
        config.model.name,
        spec.hook.name,
        corpus.context_length,
        corpus.dataset or corpus.kind,
        hook_out,
        spec.sae.init_from or "",
    )
    return step, Found(sae, where)


def as_exported(config: RunConfig, name: str, format: str, found: Found) -> tuple[str, Found]:
    """(format, what `export_sae` shall write) of an SAE of a run.

    Args:
        format: of `FORMATS`, or "same": that of `sae.init_from`, in its units; SAELens's where there is none.
        found: what `sae_of_run` gave.
    Raises:
        UserError: `sae.init_from` cannot be read any more.
    """
    sae = _spec(config, name).sae
    if format != SAME:
        return format, found
    if sae.init_from is None:
        return USUAL, found
    try:
        home = detect(sae.init_from)
        original = read_sae(sae.init_from, home).sae
    except UserError as error:
        raise UserError(f"sae.init_from: {error}; without it, name a format: {', '.join(FORMATS)}") from error
    tuned = in_units_of(found.sae, original, sae.decoder_norm == "unit")
    return home, Found(tuned, found.provenance)


def shape_of(spec: SAESpec) -> TrainedSAE:
    """An SAE of no size of the kind that `spec` trains: what a format's `refusal` looks at."""
    none = torch.zeros(1)
    return TrainedSAE(
        none[None], none[None], none, none, none[0], spec.sae.architecture, spec.sae.k, margin=spec.sae.margin
    )


def _spec(config: RunConfig, name: str) -> SAESpec:
    specs = config.specs()
    return specs.get(name, specs["main"])  # the control copy is trained as main is
