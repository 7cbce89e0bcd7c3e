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
_SAID = 300
# Weights are noise to a compressor: what unpacks to so many times its size is no SAE but meant to fill the memory.
_MOST_UNPACKED = 100


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_bytes(file))
    except ValueError as error:
        raise UserError(f"{file}: is not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: is nested too deeply") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds a {type(found).__name__}, not an object")
    return found


def write_json(file: Path, content: dict[str, Any]) -> None:
    LocalStorage(file.parent).write(file.name, json.dumps(content, indent=2).encode())


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    data = _bytes(file)
    try:
        return tensors_from_bytes(data)
    except SafetensorError as error:
        raise UserError(f"{file}: is not a safetensors file: {error}") from error
    except Exception as error:  # a dtype that torch has not, a shape that the bytes do not fill: no common base
        raise UserError(f"{file}: is not a safetensors file of tensors: {error!r}"[:_SAID]) from error


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """A PyTorch file that holds nothing but named tensors."""
    data = _bytes(file)
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):  # else what torch wrote before 1.6
            _check_unpacked(file, data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: holds more than tensors; it would have to run code to be read, so it is not"
        ) from error
    except Exception as error:  # of a spoiled file anything, from the interpreter of pickles and the zip reader
        raise UserError(f"{file}: is not a PyTorch file: {_first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{file}: is not a dictionary of tensors")
    return found


def read_npz(file: Path) -> dict[str, torch.Tensor]:
    data = _bytes(file)
    try:
        _check_unpacked(file, data)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(_plain(arrays[name])) for name in arrays.files}
    except UserError:
        raise
    except Exception as error:  # of a spoiled file anything, from the zip reader and the parser of headers
        raise UserError(f"{file}: is not an npz file of plain arrays: {_first_line(error)}") from error


def _bytes(file: Path) -> bytes:
    """Wherever the file lies: a person named it, and in the Hugging Face cache it is a link to ../../blobs/HASH."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _check_unpacked(file: Path, data: bytes) -> None:
    """Refuses a zip that is meant to fill the memory. Its directory is to be trusted: no more than that is read."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > _MOST_UNPACKED * len(data):
        raise UserError(f"{file}: {len(data)} bytes that unpack to {unpacked}: weights do not compress so far")


def _plain(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of {array.dtype}")
    return array.astype(np.float32)


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
        _check_plain(file, name, found[name])
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


def _check_plain(file: Path, name: str, tensor: torch.Tensor) -> None:
    """A file may say that a tensor is sparse, quantised, nowhere, or far larger than the numbers that it holds."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_complex()
    if not plain or tensor.device.type != "cpu":
        raise UserError(
            f"{file}: {name} is no plain tensor of numbers ({tensor.layout}, {tensor.dtype}, {tensor.device})"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{file}: {name} has shape {list(tensor.shape)}, but the file holds fewer numbers")


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
