"""A safetensors file as a list of buffers over the tensors themselves.

Writing gigabytes goes from tensor memory straight to the file or socket: without a second copy, and without
holding the interpreter's lock, so a thread can write while another trains.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"} | {
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}


def buffers_of(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> list[memoryview]:
    """The file's bytes, in order: the header, then a view of each tensor (on the CPU, contiguous)."""
    # Widest type first, as the format asks, so that every tensor starts at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name in names:
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # A dimension of size 1 may have any stride (0 after `expand`), which `view` of another width refuses.
    flat = [tensors[name].as_strided((tensors[name].numel(),), (1,)).view(torch.uint8).numpy() for name in names]
    return [memoryview(len(text).to_bytes(8, "little") + text), *(part.data for part in flat)]


def arrays_of(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays (read-only views of `data`) and metadata of a file that holds no bfloat16."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        first, _ = entry["data_offsets"]
        dtype = np.dtype(_NUMPY[entry["dtype"]])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, offset=8 + length + first).reshape(entry["shape"])
    return arrays, metadata
