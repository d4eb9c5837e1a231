"""Write safetensors files tensor by tensor, with their SHA-256: no more than one tensor is in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# safetensors' names of data types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 1 << 24  # hashed and written at once
ALIGNMENT = 8  # bytes, of the first tensor; those with large elements come first, so all are aligned

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class WrittenFile(NamedTuple):
    """A file that was written.

    Attributes:
        size: in bytes.
        sha256: of the whole file.
        offsets: where each tensor begins, from the start of the file.
    """

    size: int
    sha256: str
    offsets: dict[str, int]


def write_tensors(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> WrittenFile:
    """Write a safetensors file, and flush it to the disk.

    Args:
        path: the file; it is written in place.
        layout: data type and shape of each tensor.
        tensors: names and tensors, in the order of `in_order(layout)`; taken one after the other.

    Raises:
        OSError: the file can not be written.
    """
    header, offsets = _header(layout)
    digest = hashlib.sha256(header)
    with open(path, "wb") as file:
        file.write(header)
        for (name, tensor), expected in zip(tensors, in_order(layout), strict=True):
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, *layout[expected]), name
            content = bytes_of(tensor.detach().contiguous())
            for start in range(0, len(content), CHUNK_BYTES):
                chunk = content[start : start + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return WrittenFile(file.tell(), digest.hexdigest(), offsets)


def in_order(layout: Layout) -> list[str]:
    """Return the names in the order of the file: large elements first, then by name."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, without a copy."""
    content: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return content


def _header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """Return the file up to its first tensor, and where each tensor begins."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in in_order(layout):
        dtype, shape = layout[name]
        starts[name], end = end, end + torch.Size(shape).numel() * dtype.itemsize
        fields[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
