"""Activations with known features: a seeded generative model, `x = bias + sum of magnitude * direction`.

The kind of world is SAELens's `SyntheticModel` (sae-lens 6.54), checked against it by `benchmarks/synthetic_check.py`;
neither code nor random streams are shared with it. Here a child is only drawn where its parent fires, which is the
same distribution for a tenth of the random numbers.

Suffixes: B samples, F features, D d_in, N firings of all samples, R rank of the correlation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sae_ray.evaluation.synthetic_worlds import Forest, WorldSpec, compensated, grow, preset, wanted_probabilities


class Firings(NamedTuple):
    """The features that are active in some samples, as pairs; no pair twice, magnitudes above 0."""

    sample_N: torch.Tensor
    feature_N: torch.Tensor
    magnitude_N: torch.Tensor
    n_samples: int


class World:
    """A seeded world. Sampling takes its randomness from the generator it is given, never from the seed.

    Attributes:
        directions_FD: unit rows.
        bias_D: what every activation is shifted by.
        forest: who is whose child.
        wanted_F: how often each feature is meant to fire.
        given_F: how often each fires where its parent does, before siblings exclude each other.
        factor_FR, own_F: a feature fires where `factor . common + own * normal` exceeds its threshold, all normals.
    """

    def __init__(self, spec: WorldSpec, seed: int):
        self.spec, self.seed = spec, seed
        # A stream of its own for each part: a world with other directions has the same correlations.
        streams = [torch.Generator().manual_seed(7919 * seed + part) for part in (1, 2, 3)]
        self.forest: Forest = grow(spec)
        self.wanted_F = wanted_probabilities(spec, self.forest)
        self.given_F = compensated(self.wanted_F, self.forest, spec.exclusive)
        self.directions_FD = spread_directions(spec, streams[0])
        bias_D = torch.randn(spec.d_in, generator=streams[1])
        self.bias_D = spec.bias_norm * bias_D / bias_D.norm()
        self.factor_FR = spec.correlation_scale * torch.randn(
            spec.n_features, max(1, spec.correlation_rank), generator=streams[2]
        )
        if not spec.correlation_rank:
            self.factor_FR.zero_()
        # No row may take more than 99% of a feature's variance.
        size_F = self.factor_FR.square().sum(1)
        self.factor_FR *= torch.where(size_F > 0.99, (0.99 / size_F).sqrt(), 1.0)[:, None]
        self.own_F = (1 - self.factor_FR.square().sum(1)).sqrt()
        self._threshold_F = (math.sqrt(2) * torch.erfinv(1 - 2 * self.given_F)).float()
        self._independent = torch.nonzero(self.forest.parent_F < 0).flatten()

    @classmethod
    def of(cls, name: str, seed: int) -> World:
        """The preset `name`.

        Raises:
            UserError: it is unknown.
        """
        return cls(preset(name), seed)

    def sample(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` activations [B, D] and the magnitudes of all features in them [B, F], 0 where one is inactive."""
        firings = self.fire(n, generator)
        return self.activations(firings), self.magnitudes(firings)

    def activations(self, firings: Firings) -> torch.Tensor:
        """[B, D]"""
        x_BD = self.bias_D.repeat(firings.n_samples, 1)
        parts_ND = self.directions_FD[firings.feature_N] * firings.magnitude_N[:, None]
        return x_BD.index_add_(0, firings.sample_N, parts_ND)

    def magnitudes(self, firings: Firings) -> torch.Tensor:
        """[B, F], dense."""
        a_BF = torch.zeros(firings.n_samples, self.spec.n_features)
        a_BF[firings.sample_N, firings.feature_N] = firings.magnitude_N
        return a_BF

    def shown(self, firings: Firings) -> torch.Tensor:
        """Which features are active, bool [B, F]."""
        on_BF = torch.zeros(firings.n_samples, self.spec.n_features, dtype=torch.bool)
        on_BF[firings.sample_N, firings.feature_N] = True
        return on_BF

    def fire(self, n: int, generator: torch.Generator) -> Firings:
        """Which features are active in `n` samples, and how strongly: level by level, from the roots."""
        common_BR = torch.randn(n, self.factor_FR.shape[1], generator=generator)
        roots = self._independent
        drive = common_BR @ self.factor_FR[roots].T
        drive += self.own_F[roots] * torch.randn(drive.shape, generator=generator)
        sample_N, place_N = torch.nonzero(drive > self._threshold_F[roots], as_tuple=True)
        feature_N = roots[place_N]
        level = self._kept(sample_N, feature_N, self._magnitude(feature_N.shape, generator))
        levels = [level]
        while len(level[0]):
            level = self._children(*level, common_BR, generator)
            levels.append(level)
        sample_N, feature_N, magnitude_N = (torch.cat(parts) for parts in zip(*levels, strict=True))
        return Firings(sample_N, feature_N, magnitude_N, n)

    def _children(
        self,
        sample_P: torch.Tensor,
        parent_P: torch.Tensor,
        magnitude_P: torch.Tensor,
        common_BR: torch.Tensor,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The active children of the active features of one level."""
        fertile = self.forest.n_children_F[parent_P] > 0
        sample_P, parent_P, magnitude_P = sample_P[fertile], parent_P[fertile], magnitude_P[fertile]
        slot_C = torch.arange(self.spec.branching)
        exists_PC = slot_C < self.forest.n_children_F[parent_P, None]
        child_PC = (self.forest.first_child_F[parent_P, None] + slot_C).clamp(max=self.spec.n_features - 1)
        drive_PC = torch.einsum("pcr,pr->pc", self.factor_FR[child_PC], common_BR[sample_P])
        drive_PC += self.own_F[child_PC] * torch.randn(child_PC.shape, generator=generator)
        size_PC = self._magnitude(child_PC.shape, generator)
        fires_PC = (drive_PC > self._threshold_F[child_PC]) & exists_PC & (size_PC > 0)
        if self.spec.exclusive:
            lot_PC = torch.rand(child_PC.shape, generator=generator).masked_fill(~fires_PC, -1.0)
            fires_PC &= lot_PC == lot_PC.amax(1, keepdim=True)
        if self.spec.scale_by_parent:
            size_PC = size_PC * (magnitude_P / self.spec.magnitude_mean)[:, None]
        row, slot = torch.nonzero(fires_PC, as_tuple=True)
        return self._kept(sample_P[row], child_PC[row, slot], size_PC[row, slot])

    def _magnitude(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        spread = self.spec.magnitude_std * torch.randn(shape, generator=generator)
        return (self.spec.magnitude_mean + spread).clamp(min=0)

    @staticmethod
    def _kept(
        sample_N: torch.Tensor, feature_N: torch.Tensor, magnitude_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keep = magnitude_N > 0
        return sample_N[keep], feature_N[keep], magnitude_N[keep]


def spread_directions(spec: WorldSpec, generator: torch.Generator, lr: float = 0.01) -> torch.Tensor:
    """Unit directions [F, D] that Adam has pushed apart from random ones.

    The loss is `sum over pairs i != j of (e_i . e_j)^2 + F * sum (|e_i|^2 - 1)^2`. Its first term is
    `|E^T E|^2 - sum |e_i|^4`, so a step costs F * D^2 and not F^2 * D.
    """
    start_FD = torch.randn(spec.n_features, spec.d_in, generator=generator)
    E_FD = torch.nn.Parameter(start_FD / start_FD.norm(dim=1, keepdim=True))
    optimiser = torch.optim.Adam([E_FD], lr=lr)
    with torch.no_grad():
        for _ in range(spec.orthogonal_steps):
            square_F1 = E_FD.square().sum(1, keepdim=True)
            gradient_FD = E_FD @ (E_FD.T @ E_FD) - square_F1 * E_FD
            E_FD.grad = 4 * (gradient_FD + spec.n_features * (square_F1 - 1) * E_FD)
            optimiser.step()
        return (E_FD / E_FD.norm(dim=1, keepdim=True)).detach()
