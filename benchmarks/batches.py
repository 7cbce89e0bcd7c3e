"""The activations that the trainer's benchmark runs on: generated from a fixed seed, or read from safetensors.

Suffixes: N batches, B tokens of a batch, T tokens, D d_in.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from sae_ray.errors import UserError


def dense_batches(n: int, batch: int, d_in: int) -> torch.Tensor:
    """[N, B, D] of random rank-64 activations with noise: what the figures in the issue were measured on."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(64, d_in, generator=generator)
    hidden = torch.randn(n, batch, 64, generator=generator).relu()
    return hidden @ basis + 0.3 * torch.randn(n, batch, d_in, generator=generator)


def sparse_mixture(n: int, batch: int, d_in: int, features: int = 4096, active: int = 24) -> torch.Tensor:
    """[N, B, D] of tokens that are sums of a few unit features (Zipf, positive sizes), an offset and noise."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(features, d_in, generator=generator), dim=1)
    weight = 1 / torch.arange(1, features + 1, dtype=torch.float32) ** 0.7
    offset_D = torch.randn(d_in, generator=generator)
    out = []
    for _ in range(n):
        which = torch.multinomial(weight, batch * active, replacement=True, generator=generator).view(batch, active)
        size = 1 + torch.rand(batch, active, generator=generator)
        noise = 0.05 * torch.randn(batch, d_in, generator=generator)
        out.append(
            torch.nn.functional.embedding_bag(which, unit, per_sample_weights=size, mode="sum") + offset_D + noise
        )
    return torch.stack(out)


def stored_batches(place: Path, batch: int) -> torch.Tensor:
    """[N, B, D] from a safetensors file, a folder of them, or an activation store (its first hook point).

    Of each file it is the largest 2-D float tensor, or uint16 that holds bfloat16 bits, as our store has it.

    Raises:
        UserError: there is none, or it holds fewer than two batches.
    """
    index = place / "index.json"
    columns = json.loads(index.read_text())["columns"] if index.is_file() else {}
    first, last = next(iter(columns.values()), (0, None))
    files = sorted((place / "train" if columns else place).rglob("*.safetensors")) if place.is_dir() else [place]
    parts = []
    for file in files:
        tensors = [_as_float(t) for t in load_file(file).values() if t.ndim == 2]
        tensors = [t for t in tensors if t.is_floating_point()]
        parts += [max(tensors, key=torch.Tensor.numel)[:, first:last].float()] if tensors else []
    if not parts:
        raise UserError(f"--activations {place}: no safetensors file with a 2-D float tensor")
    x_TD = torch.cat(parts)
    n = len(x_TD) // batch
    if n < 2:
        raise UserError(f"--activations {place}: {len(x_TD)} tokens are fewer than two batches of {batch}")
    # One shuffle for all: the tokens of a stored block are neighbours in a text.
    order = torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(0))[: n * batch]
    return x_TD[order].view(n, batch, -1)


def _as_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
