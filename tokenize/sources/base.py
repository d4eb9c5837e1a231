"""What each format of a source is to `sources.py`: spans to cut, and the values in a span."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from unitoken.storage.store import Ranges, Store
from unitoken.storage.web import Web

BLOCK_BYTES = 1 << 23  # files are read by blocks of this size


@dataclass(frozen=True)
class SourceFile:
    """A file of the input, ready to be read. `shown` is its name for messages."""

    store: Store | Web
    name: str
    size: int
    shown: str

    def read(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        return self.store.read_range(self.name, start, end) if start < end else b""

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, in parts."""
        while start < end:
            block = self.read(start, min(end, start + BLOCK_BYTES))
            if not block:
                return  # the file is shorter than it was
            yield block
            start += len(block)

    def open(self) -> io.BufferedReader:
        """Seekable. The same for every store, so that what goes wrong in reading is always a StoreError."""
        return io.BufferedReader(Ranges(self.read, self.size), BLOCK_BYTES)


class Span(NamedTuple):
    """What becomes a piece: `start` and `end` in the format's own unit (bytes or rows)."""

    start: int
    end: int
    items: int | None  # None: known when it is read
    cut: str | None = None  # the file breaks off behind it, and how; counts as one of the items
