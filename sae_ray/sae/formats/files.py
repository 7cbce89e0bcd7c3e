"""Reading files that others wrote: every complaint names the file and the tensor or key. Nothing is unpickled."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes

from sae_ray.errors import UserError
from sae_ray.storage import LocalStorage

Shapes = Mapping[str, tuple[str, ...]]


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(LocalStorage(file.parent).read(file.name))
    except ValueError as error:
        raise UserError(f"{file}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds a {type(found).__name__}, not an object")
    return found


def write_json(file: Path, content: dict[str, Any]) -> None:
    LocalStorage(file.parent).write(file.name, json.dumps(content, indent=2).encode())


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return tensors_from_bytes(LocalStorage(file.parent).read(file.name))
    except SafetensorError as error:
        raise UserError(f"{file}: is not a safetensors file: {error}") from error


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """A PyTorch file that holds nothing but named tensors."""
    data = io.BytesIO(LocalStorage(file.parent).read(file.name))
    try:
        found = torch.load(data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: holds more than tensors; it would have to run code to be read, so it is not"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: is not a PyTorch file: {_first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{file}: is not a dictionary of tensors")
    return found


def read_npz(file: Path) -> dict[str, torch.Tensor]:
    data = io.BytesIO(LocalStorage(file.parent).read(file.name))
    try:
        with np.load(data, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: is not an npz file of plain arrays: {_first_line(error)}") from error


def as_npz(tensors: dict[str, torch.Tensor]) -> bytes:
    out = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(out, **arrays)
    return out.getvalue()


def checked(
    file: Path, found: dict[str, torch.Tensor], shapes: Shapes, sizes: dict[str, tuple[int, str]]
) -> dict[str, torch.Tensor]:
    """The tensors that an SAE of this kind has, float32, after a look at each.

    Args:
        shapes: each tensor's axes by letter; the first tensor that has a letter says how long it is.
        sizes: letters already known, {letter: (length, who says so)}.
    Raises:
        UserError: one is missing, or unknown, has another shape, or holds a NaN or an infinity.
    """
    if missing := [name for name in shapes if name not in found]:
        raise UserError(f"{file}: has no {', '.join(missing)}; found {', '.join(sorted(found)) or 'nothing'}")
    if unknown := sorted(set(found) - set(shapes)):
        raise UserError(f"{file}: holds {', '.join(unknown)}, which would be ignored; known: {', '.join(shapes)}")
    known, out = dict(sizes), {}
    for name, axes in shapes.items():
        shape = list(found[name].shape)
        if len(shape) != len(axes):
            raise UserError(f"{file}: {name} has shape {shape}, expected {len(axes)} axes")
        for length, letter in zip(shape, axes, strict=True):
            expected, says = known.setdefault(letter, (length, name))
            if length != expected or not length:
                wanted = [known[axis][0] if axis in known else axis for axis in axes]
                raise UserError(f"{file}: {name} has shape {shape}, but {says} says {wanted}")
        out[name] = found[name].float().contiguous()
        if bad := int((~out[name].isfinite()).sum()):
            raise UserError(f"{file}: {name} holds {bad} values that are NaN or infinite")
    return out


def whole(file: Path, content: Mapping[str, Any], key: str, least: int = 1, most: int | None = None) -> int:
    """A whole number of a config, e.g. k.

    Raises:
        UserError: it is missing, or not a whole number in its range.
    """
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{file}: {key} is {value!r}, expected a whole number {limits}")
    return value


def allow(file: Path, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{file}: {key} is {value!r}; this version reads {', '.join(map(str, allowed))}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
