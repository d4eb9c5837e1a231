"""Parquet files, and Arrow files as Hugging Face's `datasets` saves them: one item per row."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError, one_line
from unitoken.storage.folder import Folder
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources.base import SourceFile, Span, row_spans

BATCH_ROWS = 32
"""Parquet rows that are decoded at once; a row may hold pictures."""
COLUMN_READ_BYTES = 1 << 20
"""A Parquet column is read in parts of this size, not a whole row group at once."""
# A column in a row group that grows both to more bytes and by a larger factor than these is not decompressed.
MAX_COLUMN_BYTES, MAX_COLUMN_RATIO = 1 << 28, 200
MAX_ROWS_PER_BYTE = 1000
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Ends an Arrow stream. Arrow's reader does not miss it in a file that breaks off between two batches."""


def parquet_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """Cut a Parquet file into spans of `chunk_size` rows.

    Raises:
        ConfigError: the file is not Parquet, or has two columns of one name.
    """
    with _open_parquet(file) as table:
        rows = int(table.metadata.num_rows)
        _refuse_repeated_names(file, table.schema_arrow.names)
    yield from row_spans(rows, chunk_size)


def parquet_values(
    file: SourceFile, start: int, end: int, selected: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """Read the rows from `start` to `end`. After a damaged page each row of the group is an ItemError."""
    with _open_parquet(file) as table:
        first = 0
        for group in range(table.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows
            if first < end and last > start:
                for row, value in _rows_of_group(table, group, first, start, end):
                    if selected is None or row - start in selected:
                        yield row - start, value if isinstance(value, ItemError) else _to_object(*value)
            first = last


def arrow_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """Cut an Arrow file into spans of `chunk_size` rows.

    Raises:
        ConfigError: the file is not Arrow, breaks off before its first row, or has two columns of one name.
    """
    rows, cut = 0, None
    try:
        for batch in _arrow_batches(file):
            rows += batch.num_rows
            _refuse_repeated_names(file, batch.schema.names)
            # 224 bytes can claim to be 2 * 10**9 nulls.
            if rows > max(1_000_000, MAX_ROWS_PER_BYTE * file.size):
                raise ConfigError(f"{file.shown}: {rows:,} rows in {file.size:,} bytes are no data")
    except StoreError:
        raise
    except _arrow_errors() as error:
        cut = f"behind row {rows}: {one_line(error, 200)}"
    if cut is not None and rows == 0:
        raise ConfigError(f"{file.shown}: not readable as Arrow: {cut}")
    yield from row_spans(rows, chunk_size)
    if cut is not None:
        yield Span(rows, rows, 1, cut)


def arrow_values(
    file: SourceFile, start: int, end: int, selected: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """Read the rows from `start` to `end`. Each row of a damaged batch is an ItemError."""
    first = 0
    for batch in _arrow_batches(file) if start < end else ():
        last = first + batch.num_rows
        if last > start:
            damage = _damage_of(batch, first)
            for row in range(max(first, start), min(last, end)):
                if selected is None or row - start in selected:
                    yield row - start, damage or _to_object(batch, row - first)
        if last >= end:
            return
        first = last


def _refuse_repeated_names(file: SourceFile, names: list[str]) -> None:
    """Raise ConfigError for two columns of one name: a row as an object would keep one of them."""
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"{file.shown}: two columns are called {repeated[0]!r}")


def _to_object(batch: Any, row: int) -> object:
    """Return a row of a batch as Python values."""
    import pyarrow as pa

    try:
        return batch.slice(row, 1).to_pylist()[0]
    # Text that is not UTF-8 is a ValueError, a date in the year 100,000 an OverflowError.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        return ItemError(f"unreadable row: {one_line(error, 200)}")


@contextlib.contextmanager
def _open_parquet(file: SourceFile) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with file.open() as stream:
        try:
            # The raw stream, without Python's buffer: columns are read in turn, and each turn would refill
            # it.
            table = pq.ParquetFile(
                stream.raw, pre_buffer=False, buffer_size=COLUMN_READ_BYTES, page_checksum_verification=True
            )
        except StoreError:
            raise
        except _arrow_errors() as error:
            raise ConfigError(f"{file.shown}: not readable as Parquet: {one_line(error, 200)}") from None
        yield table


def _rows_of_group(
    table: Any, group: int, first: int, start: int, end: int
) -> Iterator[tuple[int, tuple[Any, int] | ItemError]]:
    """Yield the rows from `start` to `end` of a row group, each as a batch and the row's number in it.

    Batches begin where the group does, even if `start` is later: so the same damage meets the same rows in
    all pieces.

    Args:
        table: the Parquet file.
        group: the number of the row group.
        first: the row of the file with which the group begins.
        start: the first row of the file that is needed.
        end: the row after the last one that is needed.
    """
    row, last = first, first + table.metadata.row_group(group).num_rows
    damage = _excessive_column(table.metadata.row_group(group))
    if damage is None:
        try:
            for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                for number in range(max(0, start - row), batch.num_rows):
                    if row + number >= end:
                        return
                    yield row + number, (batch, number)
                row += batch.num_rows
            return
        except StoreError:
            raise
        except _arrow_errors() as error:
            damage = one_line(error, 200)
    for number in range(max(row, start), min(last, end)):
        yield number, ItemError(f"unreadable rows: {row} to {last - 1}: {damage}")


def _excessive_column(group: Any) -> str | None:
    """Return which column of a row group grows too much: 29 kB of zstd can be a page of 2.5 GB of zeros."""
    for number in range(group.num_columns):
        column = group.column(number)
        packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        if unpacked > MAX_COLUMN_BYTES and unpacked > MAX_COLUMN_RATIO * packed:
            return f"column '{column.path_in_schema}' unpacks from {packed:,} to {unpacked:,} bytes"
    return None


def _arrow_batches(file: SourceFile) -> Iterator[Any]:
    """Yield the batches of an Arrow file or stream.

    Raises:
        ConfigError: the file is not Arrow.
        pyarrow.ArrowException: the file breaks off, and so for OSError (see `_arrow_errors`).
    """
    import pyarrow as pa

    with contextlib.ExitStack() as stack:
        try:
            if isinstance(file.store, Folder):
                source = stack.enter_context(pa.memory_map(f"{file.store.url}/{file.name}"))
            else:
                source = stack.enter_context(file.open())
            is_file = file.read(0, 6) == b"ARROW1"
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        except StoreError:
            raise
        except _arrow_errors() as error:
            raise ConfigError(f"{file.shown}: not readable as Arrow: {one_line(error, 200)}") from None
        if is_file:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        yield from reader
    if file.read(max(0, file.size - len(END_OF_STREAM)), file.size) != END_OF_STREAM:
        raise pa.ArrowInvalid("no end of the stream")


def _damage_of(batch: Any, first: int) -> ItemError | None:
    """Return an error for a damaged batch. Unchecked, Arrow follows any offset, even out of the file."""
    try:
        batch.validate(full=True)
    except _arrow_errors() as error:
        last = first + batch.num_rows - 1
        return ItemError(f"unreadable rows: {first} to {last}: {one_line(error, 200)}")
    return None


def _arrow_errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for a damaged file. A StoreError is an OSError, too, and is no damage."""
    import pyarrow as pa

    return pa.ArrowException, OSError
