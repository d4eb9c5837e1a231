"""A batch whose tensors travel as one, from a worker to the process that trains.

For each tensor that it sends, a worker makes a shared memory file, and the other process connects to it to
get the file's descriptor. With two workers and batches of 32,768 tokens without pictures, a batch takes
1.8 ms in eight tensors, 1.4 ms in one, and 1.1 ms inside the message, as small batches are sent.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from unitoken.dataset.record import Record
from unitoken.streaming_data.reading.batch import PackedBatch

ALIGNMENT = 16  # bytes; where a tensor begins
MESSAGE_BYTES = 1 << 20  # larger batches, with pictures, go through shared memory

Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class JoinedBatch:
    """The tensors of a `PackedBatch`, one behind the other.

    Attributes:
        content: (bytes,) uint8.
        layout: name, data type and shape of each tensor, in order.
        numbers: the entries that are no tensors.
    """

    content: Tensor
    layout: Layout
    numbers: dict[str, int]

    @classmethod
    def of(cls, batch: PackedBatch) -> JoinedBatch:
        """Copy the tensors of a batch, if they are large into shared memory."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        layout = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
        content = torch.empty(_places(layout)[-1], dtype=torch.uint8)
        if len(content) > MESSAGE_BYTES:
            content.share_memory_()  # type: ignore[no-untyped-call]
        numbers = {name: value for name, value in batch.items() if name not in tensors}
        joined = cls(content, layout, cast(dict[str, int], numbers))
        for name, tensor in joined._tensors().items():
            tensor.copy_(tensors[name])
        return joined

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle sends: a small batch's bytes, or the handle of the shared memory."""
        if len(self.content) <= MESSAGE_BYTES:
            return _from_bytes, (self.content.numpy().tobytes(), self.layout, self.numbers)
        return JoinedBatch, (self.content, self.layout, self.numbers)

    def split(self) -> PackedBatch:
        """Return the batch; its tensors are parts of `content`."""
        return cast(PackedBatch, {**self._tensors(), **self.numbers})

    def pin_memory(self) -> JoinedBatch:
        """Return the batch in pinned memory: called by torch's DataLoader."""
        return dataclasses.replace(self, content=self.content.pin_memory())

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for place, (name, dtype, shape) in zip(_places(self.layout), self.layout, strict=False):
            size = _bytes(dtype, shape)
            found[name] = self.content[place : place + size].view(dtype).view(shape)
        return found


def _from_bytes(content: bytes, layout: Layout, numbers: dict[str, int]) -> JoinedBatch:
    return JoinedBatch(torch.frombuffer(bytearray(content), dtype=torch.uint8), layout, numbers)


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _places(layout: Layout) -> list[int]:
    """Return where each tensor begins, and where the last one ends."""
    sizes = (-(-_bytes(dtype, shape) // ALIGNMENT) * ALIGNMENT for _, dtype, shape in layout)
    return [0, *itertools.accumulate(sizes)]


@dataclass(frozen=True)
class JoinedCollate:
    """Collates in a worker."""

    collate: Callable[[Sequence[Sequence[Record]]], PackedBatch]

    def __call__(self, packs: Sequence[Sequence[Record]]) -> Any:
        """Return the joined batch of `packs`; errors are those of `collate`."""
        return JoinedBatch.of(self.collate(packs))
