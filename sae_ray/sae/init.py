"""Initial SAE parameters, pure in (seed, latent id, first activations): the same for every mesh."""

from __future__ import annotations

import math

import numpy as np
import torch

from sae_ray.errors import UserError

_LATENTS_AT_ONCE = 4096


def unit_rows(first: int, last: int, d_in: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Random unit vectors for latents `first..last-1`, [last-first, d_in].

    Row i depends on (seed, i) only: a counter-based hash (splitmix64) of the element's place gives the two
    uniforms of a Box-Muller normal, so no generator has to be advanced past other shards' latents.
    """
    stream = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    parts = []
    for start in range(first, last, _LATENTS_AT_ONCE):
        latents = np.arange(start, min(start + _LATENTS_AT_ONCE, last), dtype=np.uint64)
        place = latents[:, None] * np.uint64(d_in) + np.arange(d_in, dtype=np.uint64)[None]
        u1 = _uniform(_splitmix64(place * np.uint64(2) ^ stream))
        u2 = _uniform(_splitmix64((place * np.uint64(2) + np.uint64(1)) ^ stream))
        normal = np.sqrt(-2 * np.log(u1)) * np.cos(2 * np.pi * u2)
        parts.append(normal / np.linalg.norm(normal, axis=1, keepdims=True))
    rows = np.concatenate(parts) if parts else np.empty((0, d_in))
    return torch.from_numpy(rows).to(dtype)


def input_scale(raw_TD: torch.Tensor, convention: str) -> float:
    """The factor that raw activations are multiplied by.

    1 for "none"; sqrt(d_in) / mean norm for "sqrt_d"; sqrt(d_in / mean squared norm) for "rms".

    Raises:
        UserError: the activations are all zero, so that no scale exists.
    """
    if convention == "none":
        return 1.0
    norm_T = raw_TD.double().norm(dim=1)
    size = float(norm_T.mean() if convention == "sqrt_d" else norm_T.square().mean().sqrt())
    if size == 0:
        raise UserError(f"the first activations are all zero: sae.input_norm {convention} has no scale to find")
    return math.sqrt(raw_TD.shape[1]) / size


def centre(x_TD: torch.Tensor, how: str) -> torch.Tensor:
    """Where b_dec starts, [D] float64: "geometric_median", "mean" or "zero"."""
    if how == "geometric_median":
        return geometric_median(x_TD)
    return x_TD.double().mean(0) * (how == "mean")


def geometric_median(x_TD: torch.Tensor, iterations: int = 50) -> torch.Tensor:
    """The point [D] (float64) with the least mean distance to the tokens (Weiszfeld's iteration).

    Unlike the mean it is not dragged by the few tokens with massive activations.
    """
    x_TD = x_TD.double()
    median_D = x_TD.mean(0)
    for _ in range(iterations):
        weight_T = 1 / (x_TD - median_D).norm(dim=1).clamp(min=1e-9)
        moved_D = (weight_T[:, None] * x_TD).sum(0) / weight_T.sum()
        if float((moved_D - median_D).norm()) <= 1e-7 * (1 + float(median_D.norm())):
            return moved_D
        median_D = moved_D
    return median_D


def _splitmix64(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """53 random bits as a number in (0, 1)."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
