"""Parquet files, and Arrow files as Hugging Face's `datasets` saves them: an item a row."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError, one_line
from unitoken.storage.folder import Folder
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources.base import SourceFile, Span

BATCH_ROWS = 32  # of Parquet are decoded at once: a row may hold pictures
MOST_UNPACKED, MOST_RATIO = (
    1 << 28,
    200,
)  # bytes of a column in a row group, and times what it is packed: then it is no data
MOST_ROWS_A_BYTE = 1000
READ_BYTES = 1 << 20  # a Parquet column is read in parts of this size, not a row group at once
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow's reader takes a missing one for an end, too


def parquet_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """Raises ConfigError for a file that is no Parquet."""
    with _parquet(file) as table:
        rows = int(table.metadata.num_rows)
        _check_names(file, table.schema_arrow.names)
    yield from _row_spans(rows, chunk_size)


def parquet_values(
    file: SourceFile, start: int, end: int, wanted: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """Rows from `start` to `end`, numbered from 0. Those of a row group from a damaged page on are an ItemError each."""
    with _parquet(file) as table:
        first = 0
        for group in range(table.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows
            if first < end and last > start:
                for row, value in _group_rows(table, group, first, last, start):
                    if row >= end:
                        break
                    if wanted is None or row - start in wanted:
                        yield row - start, _plain(value)
            first = last


def arrow_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """Raises ConfigError for a file that is no Arrow file, or breaks off before its first row."""
    rows, cut = 0, None
    try:
        for batch in _arrow_batches(file):
            rows += batch.num_rows
            _check_names(file, batch.schema.names)
            if rows > max(
                1_000_000, MOST_ROWS_A_BYTE * file.size
            ):  # 224 bytes can say that they are 2 * 10**9 nulls
                raise ConfigError(f"{file.shown}: {rows:,} rows in {file.size:,} bytes are no data")
    except _arrow_errors() as error:
        if isinstance(error, StoreError):
            raise
        cut = f"behind row {rows}: {_line(error)}"
    if cut is not None and rows == 0:
        raise ConfigError(f"{file.shown}: not readable as Arrow: {cut}")
    yield from _row_spans(rows, chunk_size)
    if cut is not None:
        yield Span(rows, rows, 1, cut)


def arrow_values(
    file: SourceFile, start: int, end: int, wanted: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """Rows from `start` to `end`, numbered from 0. Those of a damaged batch are an ItemError each."""
    first = 0
    for batch in _arrow_batches(file) if start < end else ():
        last = first + batch.num_rows
        if last > start:
            bad = _damage(batch, first)
            for row in range(max(first, start), min(last, end)):
                if wanted is None or row - start in wanted:
                    yield row - start, bad or _plain((batch, row - first))
        if last >= end:
            return
        first = last


def _check_names(file: SourceFile, names: list[str]) -> None:
    """Of two columns of one name a row as an object keeps one."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{file.shown}: two columns are called {twice[0]!r}")


def _row_spans(rows: int, chunk_size: int) -> Iterator[Span]:
    for start in range(0, rows, chunk_size):
        end = min(rows, start + chunk_size)
        yield Span(start, end, end - start)


def _plain(value: tuple[Any, int] | ItemError) -> object:
    """A row of a batch as Python values."""
    if isinstance(value, ItemError):
        return value
    batch, row = value
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except _row_errors() as error:  # text that is not UTF-8, a date of the year 100,000
        return ItemError(f"unreadable row: {_line(error)}")


@contextlib.contextmanager
def _parquet(file: SourceFile) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with file.open() as stream:
        try:
            # Without Python's buffer: columns are read in turn, and each turn would fill it anew.
            table = pq.ParquetFile(
                stream.raw, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
            )
        except _arrow_errors() as error:
            raise _config_error(file, "Parquet", error) from None
        yield table


def _group_rows(
    table: Any, group: int, first: int, last: int, start: int
) -> Iterator[tuple[int, tuple[Any, int] | ItemError]]:
    """The rows of a group from `start` on. Its batches begin where the group does, so that all pieces meet the same damage."""
    row = first
    if (bomb := _unpacks_too_much(table.metadata.row_group(group))) is not None:
        for number in range(max(row, start), last):
            yield number, ItemError(f"unreadable rows: {row} to {last - 1}: {bomb}")
        return
    try:
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
            for number in range(max(0, start - row), batch.num_rows):
                yield row + number, (batch, number)
            row += batch.num_rows
    except _arrow_errors() as error:
        if isinstance(error, StoreError):
            raise
        damage = ItemError(f"unreadable rows: {row} to {last - 1}: {_line(error)}")
        for number in range(max(row, start), last):
            yield number, damage


def _unpacks_too_much(group: Any) -> str | None:
    """29 kB of zstd can be 2.5 GB of zeros, and a page is unpacked whole."""
    for number in range(group.num_columns):
        column = group.column(number)
        packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        if unpacked > MOST_UNPACKED and unpacked > MOST_RATIO * packed:
            return f"column '{column.path_in_schema}' unpacks from {packed:,} to {unpacked:,} bytes"
    return None


def _arrow_batches(file: SourceFile) -> Iterator[Any]:
    """Raises ConfigError where the file is none, what `_arrow_errors` holds where it breaks off."""
    import pyarrow as pa

    with contextlib.ExitStack() as stack:
        try:
            if isinstance(file.store, Folder):
                source = stack.enter_context(pa.memory_map(f"{file.store.url}/{file.name}"))
            else:
                source = stack.enter_context(file.open())
            is_file = file.read(0, 6) == b"ARROW1"
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        except _arrow_errors() as error:
            raise _config_error(file, "Arrow", error) from None
        if is_file:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        yield from reader
    if file.read(max(0, file.size - len(END_OF_STREAM)), file.size) != END_OF_STREAM:
        raise pa.ArrowInvalid("no end of the stream")


def _damage(batch: Any, first: int) -> ItemError | None:
    """Offsets are followed without a look otherwise, wherever they lead."""
    try:
        batch.validate(full=True)
    except _arrow_errors() as error:
        return ItemError(f"unreadable rows: {first} to {first + batch.num_rows - 1}: {_line(error)}")
    return None


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return pa.ArrowException, OSError


def _row_errors() -> tuple[type[Exception], ...]:
    return *_arrow_errors(), ValueError, OverflowError


def _config_error(file: SourceFile, kind: str, error: Exception) -> Exception:
    return (
        error
        if isinstance(error, StoreError)
        else ConfigError(f"{file.shown}: not readable as {kind}: {_line(error)}")
    )


def _line(error: Exception) -> str:
    return one_line(error, 200)
