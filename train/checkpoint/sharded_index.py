"""The index of a sharded checkpoint, which is written last: a folder that holds it is complete.

    step-00000100/00000-of-00002.safetensors   the rows of weights and moments that the first rank holds
    step-00000100/00001-of-00002.safetensors   those of the second
    step-00000100/checkpoint.json              the index: the files with their SHA-256, where the rows of each
                                               tensor are, and all other state of the run

Not torch's distributed checkpoint, whose index is a pickle, without hashes, in a format that changes with
torch: a checkpoint from elsewhere must not run code. Torch is not needed to read the index.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from unitoken.common.cli import notify
from unitoken.common.config import Config, first_problem
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.hashing import sha256_of_file
from unitoken.train.checkpoint.locations import INDEX

NOTIFY_BYTES = 1 << 30  # reading a larger checkpoint takes seconds, so the user is notified
RANK_FILE = r"\d{5,}-of-\d{5,}\.safetensors"
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2},
    **{"I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
Number = Annotated[int, pydantic.Field(ge=0)]


class RankFile(Config):
    """A rank's file."""

    name: Annotated[str, pydantic.Field(pattern=f"^{RANK_FILE}$")]
    bytes: Number
    sha256: str


class Rows(Config):
    """Consecutive rows of a tensor in a file."""

    file: Number
    """The position of the file in `Index.files`."""
    first: Number
    """The number of the first row in the whole tensor."""
    count: Number
    offset: Number
    """Where the rows begin in the file, in bytes."""


class ShardedTensor(Config):
    """A tensor, cut into rows along its first dimension."""

    dtype: str
    """safetensors' name of the data type."""
    shape: tuple[Number, ...]
    rows: list[Rows]
    """In order and without gaps."""

    @property
    def row_bytes(self) -> int:
        """Number of bytes of a row."""
        size = ITEM_BYTES[self.dtype]
        for length in self.shape[1:]:
            size *= length
        return size


class Index(Config):
    """The content of `checkpoint.json`."""

    version: Literal[1]
    files: list[RankFile]
    tensors: dict[str, ShardedTensor]
    state: dict[str, Any]
    """All other state, as `plain_values.to_plain` returns it."""

    @pydantic.model_validator(mode="after")
    def _check_rows(self) -> Index:
        for name, tensor in self.tensors.items():
            if tensor.dtype not in ITEM_BYTES or not tensor.shape:
                raise ValueError(f"{name} has the data type {tensor.dtype} and the shape {tensor.shape}")
            end = 0
            for rows in tensor.rows:
                size = rows.offset + rows.count * tensor.row_bytes
                if rows.first != end or rows.file >= len(self.files) or size > self.files[rows.file].bytes:
                    raise ValueError(f"{name} has no place for its row {end}")
                end += rows.count
            if end != tensor.shape[0]:
                raise ValueError(f"{name} has {end} of {tensor.shape[0]} rows")
        return self


def dump_checkpoint_index(fields: dict[str, Any]) -> bytes:
    """Return the content of `checkpoint.json` with its own SHA-256, from the fields of an `Index`."""
    return json.dumps({**fields, "sha256": _digest(fields)}).encode() + b"\n"


def read_checkpoint_index(checkpoint: Path) -> Index:
    """Read the index of a sharded checkpoint. Raises ConfigError if it is missing or damaged."""
    path = checkpoint / INDEX
    try:
        fields = json.loads(path.read_bytes())
        expected = fields.pop("sha256", None) if isinstance(fields, dict) else None
        if expected is None or _digest(fields) != expected:
            raise ValueError("its SHA-256 differs")
        return Index.model_validate(fields)
    except pydantic.ValidationError as error:
        reason = first_problem(error)
    except (OSError, ValueError, RecursionError) as error:  # json's errors are kinds of ValueError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 200)
    raise ConfigError(f"{path}: not the index of a checkpoint, or damaged: {reason}")


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def find_damage_in_files(checkpoint: Path) -> str | None:
    """Return what is wrong with the bytes of a sharded checkpoint, or None; all files are read."""
    try:
        index = read_checkpoint_index(checkpoint)
    except ConfigError as error:
        return str(error)
    size = sum(file.bytes for file in index.files)
    if size > NOTIFY_BYTES:
        notify(f"{checkpoint}: reading {size / 1e9:.0f} GB to check for damage")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases Python's lock
        damages = threads.map(lambda file: _damage_of(checkpoint / file.name, file), index.files)
        return next((damage for damage in damages if damage is not None), None)


def _damage_of(path: Path, file: RankFile) -> str | None:
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"{path.name} has {size} bytes of {file.bytes}"
        return None if sha256_of_file(path) == file.sha256 else f"the SHA-256 of {path.name} differs"
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"
