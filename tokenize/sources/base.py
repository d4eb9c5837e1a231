"""The interface between the reader and the modules that read one format each.

Each of these modules has two functions:

    *_spans(file, ...)              the pieces of the file, as `Span`s
    *_values(file, ..., selected)   the items of one piece, as (number within the piece, from 0; value)

`selected` holds the numbers of the items to read; None reads all of them. An item that cannot be read has an
`ItemError` as its value.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError
from unitoken.common.missing_paths import where_looked
from unitoken.storage.store import MissingError, Ranges, Store, StoreError
from unitoken.storage.web import Web
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES

READ_BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class SourceFile:
    """A file of the input, ready to be read from its store."""

    store: Store | Web
    name: str
    size: int
    shown: str
    """The file's name in messages."""
    block_bytes: int = READ_BLOCK_BYTES
    """The file is read in blocks of this size."""
    max_item_bytes: int = MAX_ITEM_BYTES
    """Larger items are rejected."""

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`, or to the end of the file where that comes first."""
        end = min(end, self.size)
        return self.store.read_range(self.name, start, end) if start < end else b""

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `end` block by block; fewer where the file has become shorter."""
        while start < end:
            block = self.read(start, min(end, start + self.block_bytes))
            if not block:
                return
            yield block
            start += len(block)

    def open(self) -> io.BufferedReader:
        """Return a seekable stream. With any store, a read that fails raises StoreError."""
        return io.BufferedReader(Ranges(self.read, self.size), self.block_bytes)


class Span(NamedTuple):
    """A part of a file that becomes one piece."""

    start: int
    """In the format's own unit: bytes or rows."""
    end: int
    items: int | None
    """None where the number is only known after reading."""
    cut: str | None = None
    """How the file breaks off after this part, if it does. The break counts as one of `items`."""


def whole_file_span(file: SourceFile) -> Iterator[Span]:
    """Return one span for a file that can only be read from its beginning, and none for an empty file."""
    if file.size:
        yield Span(0, file.size, None)


def row_spans(rows: int, chunk_size: int) -> Iterator[Span]:
    """Cut numbered rows, or the samples of a folder, into spans of `chunk_size`."""
    for start in range(0, rows, chunk_size):
        end = min(rows, start + chunk_size)
        yield Span(start, end, end - start)


def item_too_large(what: str, limit: int) -> ItemError:
    """Return the error for an item of more than `limit` bytes; `what` is empty, or a name as `000012: `."""
    return ItemError(f"item too large: {what}more than {limit} bytes")


@contextlib.contextmanager
def store_errors_as_config_errors(name: str) -> Iterator[None]:
    """Turn a StoreError into a ConfigError that says which input cannot be read."""
    try:
        yield
    except MissingError:
        raise ConfigError(f"{name}: cannot read the input: No such file{where_looked(name)}") from None
    except StoreError as error:
        raise ConfigError(f"{name}: cannot read the input: {error.strerror or error}") from None
