"""A tokenized conversation and its MDS columns: the format that `tokenize` writes and training reads.

| column         | encoding                   | meaning                                                      |
|----------------|----------------------------|--------------------------------------------------------------|
| `id`           | str                        | the item's id                                                |
| `tokens`       | ndarray:uint16 (or uint32) | (T,) the whole conversation, image ids inline                |
| `target_spans` | ndarray:uint32             | (S, 2) half-open ranges of `tokens` to train on, S >= 1      |
| `image_spans`  | bytes                      | uint32 (N, 4): first token, end, rows and columns in latents |
| `images`       | bytes                      | N, then N lengths (uint32), then N encoded originals         |

Numbers in `bytes` are little-endian. These columns are `bytes` because MDS rejects arrays of size zero, and
a text-only record has N = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

AnyBytes = TypeVar("AnyBytes", bytes, memoryview)

IGNORED = -100  # the label of a token that is not trained on


def token_type(vocabulary_size: int) -> str:
    """Return the type of token ids: 16 bits if the vocabulary fits."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def columns(vocabulary_size: int) -> dict[str, str]:
    """Return the encodings of the MDS columns by name."""
    tokens = f"ndarray:{token_type(vocabulary_size)}"
    return {
        "id": "str",
        "tokens": tokens,
        "target_spans": "ndarray:uint32",
        "image_spans": "bytes",
        "images": "bytes",
    }


@dataclass(eq=False, slots=True)  # frozen, it would take 1 us more to make
class Record:
    """One conversation. `image_spans` and `images` are in the order of the images in the text."""

    id: str
    tokens: npt.NDArray[Any]  # (T,) uint16 or uint32
    target_spans: npt.NDArray[np.uint32]  # (S, 2)
    image_spans: npt.NDArray[np.uint32]  # (N, 4): first token, end, height, width in latents
    images: tuple[bytes | memoryview, ...]  # N encoded originals
    stream: int = 0  # the number of its stream, if it is read as part of a mixture

    def labels(self) -> npt.NDArray[np.int64]:
        """Return the record's labels, see `labels`."""
        return labels(self.tokens, self.target_spans)

    def to_mds(self) -> dict[str, Any]:
        """Return the values of the MDS columns."""
        return {
            "id": self.id,
            "tokens": self.tokens,
            "target_spans": self.target_spans,
            "image_spans": np.ascontiguousarray(self.image_spans, "<u4").tobytes(),
            "images": pack_bytes(self.images),
        }

    @classmethod
    def from_mds(cls, sample: Mapping[str, Any], stream: int = 0) -> Record:
        """Create a record from the values of the MDS columns."""
        spans = np.frombuffer(sample["image_spans"], "<u4").reshape(-1, 4)
        return cls(
            sample["id"],
            sample["tokens"],
            sample["target_spans"],
            spans,
            unpack_bytes(sample["images"]),
            stream,
        )


def labels(tokens: npt.NDArray[Any], target_spans: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Return the labels (T,): the token where it is trained on, IGNORED elsewhere. They are not shifted."""
    result = np.full(len(tokens), IGNORED, np.int64)
    for start, end in target_spans:
        result[start:end] = tokens[start:end]
    return result


def spans_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Return the runs of True in a mask (T,), as half-open ranges (S, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))  # start, end, start, end, ...
    return edges.reshape(-1, 2).astype(np.uint32)


def pack_bytes(parts: Sequence[bytes | memoryview]) -> bytes:
    """Join byte strings into one: their number and lengths (little-endian uint32), then the bytes."""
    header = np.array([len(parts), *map(len, parts)], "<u4").tobytes()
    return header + b"".join(parts)


def unpack_bytes(data: AnyBytes) -> tuple[AnyBytes, ...]:
    """Split what `pack_bytes` joined; parts of a memoryview are views.

    Raises:
        ValueError: the lengths do not match the data.
    """
    count = int(np.frombuffer(data, "<u4", 1)[0])
    lengths = np.frombuffer(data, "<u4", count, offset=4)
    ends = np.cumsum(lengths, dtype=np.int64) + 4 * (count + 1)
    if count and int(ends[-1]) != len(data):
        raise ValueError(
            f"{count} images of {int(lengths.sum())} bytes in all, in a field of {len(data)} bytes"
        )
    return tuple(data[int(end) - int(length) : int(end)] for length, end in zip(lengths, ends, strict=True))
