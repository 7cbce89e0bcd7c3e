"""What a synthetic world is made of: numbers of features, their forest, how often each fires, and the presets.

Features are numbered breadth first: the roots, then the children of root 0, of root 1, ..., then theirs; the children
of one parent are consecutive. Frequent features therefore are roots, as rank falls with depth.

Suffixes: F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sae_ray.errors import UserError


@dataclass(frozen=True)
class WorldSpec:
    """A world without its seed.

    Attributes:
        n_features, d_in: true features, and dimensions they share (superposition if fewer).
        roots, branching, depth: the forest; leaves lie at `depth`, roots at 0. It stops where features run out, and
            features that it has no place for are independent.
        exclusive: of the children of a parent at most one is active in a sample.
        scale_by_parent: a child's magnitude is multiplied by its parent's over the parent's mean magnitude.
        zipf_exponent, max_probability, min_probability: firing probabilities by rank.
        level_probabilities: firing probability of every feature of a level, instead of Zipf's law.
        magnitude_mean, magnitude_std: of a firing feature, before scaling; negative ones are cut to 0.
        correlation_rank, correlation_scale: features fire where a Gaussian exceeds a threshold, and its correlation
            matrix is `A A^T + diag` with A [F, rank] of normals times the scale; 0 is independence.
        orthogonal_steps: Adam steps (rate .01) that push the directions apart.
        bias_norm: norm of the constant that is added to every activation.
        d_sae: width of the SAEs that are usually trained on it.
    """

    n_features: int
    d_in: int
    roots: int
    branching: int
    depth: int
    d_sae: int
    exclusive: bool = True
    scale_by_parent: bool = True
    zipf_exponent: float = 0.5
    max_probability: float = 0.4
    min_probability: float = 5e-4
    level_probabilities: tuple[float, ...] | None = None
    magnitude_mean: float = 2.0
    magnitude_std: float = 0.5
    correlation_rank: int = 8
    correlation_scale: float = 0.1
    orthogonal_steps: int = 200
    bias_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.roots <= self.n_features:
            raise UserError(f"world: roots {self.roots} must be from 1 to n_features {self.n_features}")
        if self.depth and self.branching < 1:
            raise UserError(f"world: branching {self.branching} must be at least 1 where depth is {self.depth}")
        if not 0 < self.min_probability < self.max_probability <= 1:
            raise UserError(
                f"world: min_probability {self.min_probability} must be above 0 and below max_probability "
                f"{self.max_probability}, which must not exceed 1"
            )
        levels = self.level_probabilities
        if levels is not None and len(levels) != self.depth + 1:
            raise UserError(f"world: level_probabilities {levels} must name depth + 1 = {self.depth + 1} numbers")
        if self.correlation_rank * self.correlation_scale**2 >= 1:
            raise UserError(
                "world: correlation_rank * correlation_scale^2 must be below 1, or nothing is left of noise"
            )


class Forest(NamedTuple):
    """Who is whose child, all int64 [F]."""

    parent_F: torch.Tensor  # -1: a root
    level_F: torch.Tensor
    first_child_F: torch.Tensor  # -1: none
    n_children_F: torch.Tensor


def grow(spec: WorldSpec) -> Forest:
    """The forest, breadth first until features run out."""
    n = spec.n_features
    parent, level = [-1] * spec.roots, [0] * spec.roots
    first_child, n_children = [-1] * n, [0] * n
    for node in range(n):
        if node >= len(parent) or level[node] >= spec.depth:
            break
        here = min(spec.branching, n - len(parent))
        if here:
            first_child[node], n_children[node] = len(parent), here
            parent += [node] * here
            level += [level[node] + 1] * here
    left = n - len(parent)
    parent, level = parent + [-1] * left, level + [0] * left
    return Forest(*(torch.tensor(values) for values in (parent, level, first_child, n_children)))


def wanted_probabilities(spec: WorldSpec, forest: Forest) -> torch.Tensor:
    """How often each feature should fire, float64 [F]."""
    if spec.level_probabilities is not None:
        return torch.tensor(spec.level_probabilities, dtype=torch.float64)[forest.level_F]
    if spec.n_features == 1:
        return torch.tensor([spec.max_probability], dtype=torch.float64)
    power_F = torch.arange(1, spec.n_features + 1, dtype=torch.float64) ** -spec.zipf_exponent
    share_F = (power_F - power_F[-1]) / (power_F[0] - power_F[-1])
    return spec.min_probability + (spec.max_probability - spec.min_probability) * share_F


def compensated(wanted_F: torch.Tensor, forest: Forest, exclusive: bool) -> torch.Tensor:
    """Probability [F] of firing given that the parent does, such that the overall one is about the wanted one.

    A child needs `p / p_parent`. Where siblings exclude each other it is also beaten by some of them: on average
    `q = sum of the others' p / p_parent` compete, and it gets a factor of 1 + q. Capped at 1: a parent can be too
    rare for what its children want.
    """
    given_F = wanted_F.clone()
    for node in torch.nonzero(forest.n_children_F).flatten().tolist():
        first, count = int(forest.first_child_F[node]), int(forest.n_children_F[node])
        own = wanted_F[first : first + count]
        given = own / wanted_F[node]
        if exclusive and count > 1:
            given = given * (1 + (own.sum() - own) / wanted_F[node])
        given_F[first : first + count] = given
    return given_F.clamp(max=1.0)


# RESEARCH.md section 1's world, one with ten times its features, and one where nothing but absorption can go wrong:
# every direction fits beside the others, and an SAE that fires 4 of its latents instead of 6.4 pays less by absorbing.
# "small" is half of "research", for what has too many combinations.
PRESETS: dict[str, WorldSpec] = {
    "research": WorldSpec(n_features=1024, d_in=128, roots=64, branching=4, depth=2, d_sae=256),
    "large": WorldSpec(n_features=10_240, d_in=768, roots=640, branching=4, depth=2, d_sae=2560, max_probability=0.2),
    "parent_child": WorldSpec(
        n_features=160,
        d_in=160,
        roots=40,
        branching=3,
        depth=1,
        d_sae=160,
        scale_by_parent=False,
        level_probabilities=(0.1, 0.02),
        magnitude_std=0.2,
        correlation_rank=0,
        orthogonal_steps=100,
    ),
    "small": WorldSpec(n_features=512, d_in=64, roots=32, branching=4, depth=2, d_sae=128),
}


def preset(name: str) -> WorldSpec:
    """The preset of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"world {name!r} is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]
