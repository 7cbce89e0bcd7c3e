"""Ways to explain a latent. A new one is a file here and a line in `REGISTRY`."""

from __future__ import annotations

from collections.abc import Sequence

from sae_ray.errors import UserError
from sae_ray.judge.explainers.base import Explainer, Explanation, Writer
from sae_ray.judge.explainers.clusters import Clusters
from sae_ray.judge.explainers.contrastive import Contrastive
from sae_ray.judge.explainers.lexical import Lexical
from sae_ray.judge.explainers.logits import Logits
from sae_ray.judge.explainers.max_activating import MaxActivating

__all__ = ["REGISTRY", "Explainer", "Explanation", "Writer", "explainers"]

REGISTRY: dict[str, type[Explainer]] = {
    each.name: each for each in (MaxActivating, Contrastive, Logits, Lexical, Clusters)
}


def explainers(names: Sequence[str]) -> list[Explainer]:
    """The explainers of `judging.explainers`, in order, each once.

    Raises:
        UserError: for a name that there is not.
    """
    for name in names:
        if name not in REGISTRY:
            raise UserError(f"judging.explainers: there is no {name!r}; there are {', '.join(sorted(REGISTRY))}")
    return [REGISTRY[name]() for name in dict.fromkeys(names)]
