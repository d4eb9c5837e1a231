"""The tensors of a sharded checkpoint: each rank writes the rows it holds; any number of ranks reads them.

Tensors are cut along their first dimension, so the rows of a rank are consecutive bytes of a few files, and
are read straight into place: reading takes no memory but that of the result.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.integrity import check_finite
from unitoken.train.checkpoint.plain_values import from_plain
from unitoken.train.checkpoint.sharded_index import (
    ShardedTensor,
    dump_checkpoint_index,
    read_checkpoint_index,
)
from unitoken.train.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, bytes_of, in_order, write_tensors
from unitoken.train.checkpoint.tensors import Shapes, Tensors, TensorSource

WEIGHTS = "model/"  # the prefix of weights in a checkpoint; that of moments is their name in the optimizer


class HeldRows(NamedTuple):
    """The rows of a tensor that a rank holds.

    Attributes:
        name: of the tensor, with its prefix.
        shape: of the whole tensor.
        first: the number of the first row in the whole tensor.
        rows: the rows.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    rows: Tensor


class RankPart(NamedTuple):
    """What a rank has written, for the index.

    Attributes:
        file: the fields of its `RankFile`.
        pieces: for each piece its name, the fields of its `ShardedTensor` without `rows`, and those of its
            `Rows` without `file`.
    """

    file: dict[str, Any]
    pieces: list[tuple[str, dict[str, Any], dict[str, Any]]]


def rank_file(checkpoint: Path, rank: int, ranks: int) -> Path:
    """Return the path of a rank's file."""
    return checkpoint / f"{rank:05d}-of-{ranks:05d}.safetensors"


def write_pieces(path: Path, pieces: Sequence[HeldRows]) -> RankPart:
    """Write a rank's file.

    Args:
        path: the file, in the folder of the checkpoint, which is created if it is missing.
        pieces: what the rank holds, on the CPU; empty ones are left out.

    Raises:
        OSError: the file can not be written.
    """
    by_name = {piece.name: piece for piece in pieces if len(piece.rows)}
    layout = {name: (piece.rows.dtype, tuple(piece.rows.shape)) for name, piece in by_name.items()}
    path.parent.mkdir(exist_ok=True)
    written = write_tensors(path, layout, ((name, by_name[name].rows) for name in in_order(layout)))
    described = [
        (
            name,
            {"dtype": DTYPE_NAMES[piece.rows.dtype], "shape": list(piece.shape)},
            {"first": piece.first, "count": len(piece.rows), "offset": written.offsets[name]},
        )
        for name, piece in by_name.items()
    ]
    return RankPart({"name": path.name, "bytes": written.size, "sha256": written.sha256}, described)


def build_index(parts: Sequence[RankPart], state: dict[str, Any]) -> bytes:
    """Return the content of `checkpoint.json`.

    Args:
        parts: of all ranks.
        state: all state but the tensors, encoded.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts):
        for name, tensor, rows in part.pieces:
            tensors.setdefault(name, {**tensor, "rows": []})["rows"].append({"file": number, **rows})
    for tensor in tensors.values():
        tensor["rows"].sort(key=lambda rows: rows["first"])
    files = [part.file for part in parts]
    return dump_checkpoint_index({"version": 1, "files": files, "tensors": tensors, "state": state})


class ShardedCheckpoint:
    """A sharded checkpoint, for reading; its files' hashes are checked by `integrity.find_damage`.

    Attributes:
        state: all state but the tensors.
        tensors: what is known of each tensor, by name with its prefix.

    Raises:
        ConfigError: its index is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._index = path, read_checkpoint_index(path)
        self.tensors: dict[str, ShardedTensor] = self._index.tensors
        try:
            self.state: dict[str, Any] = from_plain(self._index.state)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a checkpoint of this program: {error}") from None

    def read_rows(self, name: str, first: int, into: Tensor) -> None:
        """Read consecutive rows of a tensor.

        Args:
            name: of the tensor, with its prefix.
            first: the number of the first row.
            into: takes the rows; contiguous, on the CPU, and of the tensor's data type.
        """
        tensor, end = self.tensors[name], first + len(into)
        assert DTYPES[tensor.dtype] == into.dtype, name
        assert (tensor.shape[1:], into.is_contiguous()) == (tuple(into.shape[1:]), True), name
        target = bytes_of(into)
        for rows in tensor.rows:
            start, stop = max(first, rows.first), min(end, rows.first + rows.count)
            if start < stop:
                part = target[(start - first) * tensor.row_bytes : (stop - first) * tensor.row_bytes]
                offset = rows.offset + (start - rows.first) * tensor.row_bytes
                self._read_bytes(self._index.files[rows.file].name, offset, part)

    def _read_bytes(self, file_name: str, offset: int, target: memoryview) -> None:
        path = self._path / file_name
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                while target:
                    count = file.readinto(target)
                    if not count:
                        raise ConfigError(f"{path}: truncated")
                    target = target[count:]
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU."""
        tensor = self.tensors[name]
        whole = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        self.read_rows(name, 0, whole)
        return whole

    def weights(self) -> TensorSource:
        """Open the model's weights, under our names."""

        def read(names: Collection[str]) -> Tensors:
            tensors = {name: self.read(f"{WEIGHTS}{name}").float() for name in names}
            check_finite(tensors.items(), str(self._path))
            return tensors

        return TensorSource(str(self._path), self.shapes(), read)

    def shapes(self) -> Shapes:
        """Return the shapes of the model's weights, by our names."""
        return {
            name.removeprefix(WEIGHTS): tensor.shape
            for name, tensor in self.tensors.items()
            if name.startswith(WEIGHTS)
        }
