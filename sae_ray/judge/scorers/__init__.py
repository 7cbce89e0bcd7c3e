"""How well an explanation holds, measured in many ways; a new way is a module and one line in `REGISTRY`."""

from __future__ import annotations

from collections.abc import Sequence

from sae_ray.errors import UserError
from sae_ray.judge.scorers.base import Scorer
from sae_ray.judge.scorers.clarity import Clarity
from sae_ray.judge.scorers.detection import Detection, DetectionByLikelihood, DetectionByYesNo
from sae_ray.judge.scorers.discrimination import Discrimination, DiscriminationDescribed
from sae_ray.judge.scorers.embedding import Embedding
from sae_ray.judge.scorers.fuzzing import Fuzzing
from sae_ray.judge.scorers.intruder import Intruder
from sae_ray.judge.scorers.sensitivity import Sensitivity
from sae_ray.judge.scorers.simulation import Simulation
from sae_ray.judge.scorers.surprisal import Surprisal

_ALL: tuple[type[Scorer], ...] = (
    Detection, DetectionByLikelihood, DetectionByYesNo, Fuzzing, Intruder, Discrimination, DiscriminationDescribed,
    Clarity, Simulation, Surprisal, Embedding, Sensitivity,
)  # fmt: skip
REGISTRY: dict[str, type[Scorer]] = {each.name: each for each in _ALL}


def scorers(names: Sequence[str]) -> list[Scorer]:
    """The scorers of these names, in order.

    Raises:
        UserError: there is none of that name, or one is named twice.
    """
    for index, name in enumerate(names):
        if name not in REGISTRY:
            raise UserError(f"judging.scorers: there is no scorer {name!r}; known are {', '.join(sorted(REGISTRY))}")
        if name in names[:index]:
            raise UserError(f"judging.scorers: {name!r} is named twice")
    return [REGISTRY[name]() for name in names]
