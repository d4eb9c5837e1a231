"""Tables of text (.csv and .tsv), each of them one piece.

A quoted field may hold line breaks, so only reading from the beginning tells which line begins a row.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from unitoken.codec.conversations import ItemError
from unitoken.common.errors import one_line
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources.base import SourceFile

TAIL_BYTES = 1 << 16
"""The end of the file that is kept to see how its last field ends."""


def csv_values(
    file: SourceFile, delimiter: str, selected: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """Read the rows as objects with the names in the first line. All values are text: `007` may be a name.

    A row with another number of columns is an ItemError; it comes after the rows of its block.
    """
    for number, value in enumerate(_rows(file, delimiter)):
        if selected is None or number in selected:
            yield number, value


def _rows(file: SourceFile, delimiter: str) -> Iterator[object]:
    import pyarrow

    try:
        names = _column_names(file, delimiter)
    except StoreError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield ItemError(f"input cut: not readable as CSV: {one_line(error, 200)}")
        return
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        yield ItemError(f"input cut: two columns are called {repeated[0]!r}")
    else:
        yield from _rows_by_name(file, delimiter, names)


def _column_names(file: SourceFile, delimiter: str) -> list[str]:
    with file.open() as stream, _open_csv(_Utf8Stream(stream), file.block_bytes, delimiter, [], []) as reader:
        names: list[str] = reader.schema.names
        return names


def _rows_by_name(file: SourceFile, delimiter: str, names: list[str]) -> Iterator[object]:
    """Yield the rows block by block. The last block is held back until it is known how the file ends."""
    import pyarrow

    rows: list[Any] = []
    ragged: list[ItemError] = []  # filled by pyarrow while it reads a block
    ragged_of_block: list[ItemError] = []
    cut: str | None = None
    with file.open() as stream:
        checked = _Utf8Stream(stream)
        try:
            with _open_csv(checked, file.block_bytes, delimiter, names, ragged) as reader:
                for block in reader:
                    yield from [*rows, *ragged_of_block]
                    rows, ragged_of_block = block.to_pylist(), list(ragged)
                    ragged.clear()
        except StoreError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            cut = f"not readable as CSV: {one_line(error, 200)}"
    if cut is None:
        cut = checked.broken
        if rows and _is_never_closed(rows[-1], checked.tail):
            rows[-1] = ItemError("input cut: a quote that is opened in this row is never closed")
    yield from [*rows, *ragged_of_block, *ragged]
    if cut is not None:
        yield ItemError(f"input cut: {cut}")


def _open_csv(
    stream: _Utf8Stream, block_bytes: int, delimiter: str, names: list[str], ragged: list[ItemError]
) -> Any:
    """Return a reader of pyarrow's.

    Args:
        stream: the file.
        block_bytes: the bytes that become one batch of rows.
        delimiter: the character between two columns.
        names: the columns to read as text.
        ragged: where to put an error for each row with another number of columns.
    """
    import pyarrow
    import pyarrow.csv

    def reject(row: Any) -> str:
        ragged.append(
            ItemError(f"bad row: expected {row.expected_columns} columns, found {row.actual_columns}")
        )
        return "skip"

    return pyarrow.csv.open_csv(
        stream,
        pyarrow.csv.ReadOptions(use_threads=False, block_size=block_bytes),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=reject),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False
        ),
    )


class _Utf8Stream(io.RawIOBase):
    """A stream that ends with the last whole line before a byte that is not UTF-8; `broken` then says where.

    Left to itself, pyarrow would meet that byte while it reports a ragged row, where it can raise no error,
    and would return none of the rows before it.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._offset = 0
        self.broken: str | None = None
        self.tail = b""
        """The last bytes that were read."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes."""
        if self.broken is not None:
            return b""
        data = self._stream.read(size)
        pending = len(self._decoder.getstate()[0])  # bytes of a character that began in the block before
        try:
            self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = max(0, error.start - pending)
            self.broken = f"byte {self._offset + at} is not UTF-8"
            data = data[: data.rfind(b"\n", 0, at) + 1]
        self._offset += len(data)
        self.tail = (self.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        return data


def _is_never_closed(row: Any, tail: bytes) -> bool:
    """Return whether the last field of the last row is a quote that is never closed.

    pyarrow takes all that follows such a quote for the field, and rows may be lost in it.
    """
    text = list(row.values())[-1]
    if not text or text.endswith('"'):
        return False
    # A closed field ends with a quote. A field without quotes has a delimiter or the end of a line before it.
    end = b'"' + text.replace('"', '""').encode()
    return tail.endswith(end[-TAIL_BYTES:]) and (len(end) <= TAIL_BYTES or "\n" in text)
