"""The SAEs of a run folder, with where their inputs come from."""

from __future__ import annotations

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.sae.formats.notes import Found, Provenance
from sae_ray.sae.inference import TrainedSAE
from sae_ray.trainer import checkpoint


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
    specs = config.specs()
    spec = specs.get(name, specs["main"])  # the control copy is trained as main is
    hook_out = spec.hook_out.name if spec.hook_out else None
    corpus = config.corpus
    where = Provenance(
        config.model.name, spec.hook.name, corpus.context_length, corpus.dataset or corpus.kind, hook_out
    )
    return step, Found(sae, where)
