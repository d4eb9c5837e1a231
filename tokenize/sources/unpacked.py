"""Sources that have to be unpacked or parsed from their beginning, one piece each: .gz, .tgz, .zst, .csv, .tsv.

What is compressed is unpacked into a file of this user's scratch folder and read from there as what it is: never as a whole in
memory, and damage is found by the same code. The file goes when its last item is read.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unitoken.codec.conversations import ItemError
from unitoken.common.files import AsideFolder, scratch_folder
from unitoken.storage.folder import Folder
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources.base import BLOCK_BYTES, SourceFile, Span

TAIL_BYTES = 1 << 16  # of a table of text, to see how its last field ends

MOST_BYTES = 1 << 40  # of an unpacked file
READ_BYTES = 1 << 14  # unpacked at once: what a read holds is lost where it meets damage
MOST_RATIO = 1 << 10  # and so many times what it was packed; text packs 3 to 20 times

Values = Callable[[SourceFile], Iterator[tuple[int, object]]]


def unpacked_spans(file: SourceFile) -> Iterator[Span]:
    """One: where an item begins can not be known without unpacking what is before it."""
    if file.size:
        yield Span(0, file.size, None)


def unpacked_values(
    file: SourceFile, suffix: str, inner: Values, wanted: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """The items of what is packed in `file`, as `inner` reads it. Where it breaks off an ItemError takes the place of the next."""
    with AsideFolder(scratch_folder() / "unpacked") as folder:
        name = "source"
        cut = _unpack(file, suffix, folder.path / name)
        size = (folder.path / name).stat().st_size
        count = 0
        for number, value in inner(SourceFile(Folder(folder.path), name, size, file.shown)) if size else ():
            count = number + 1
            if wanted is None or number in wanted:
                yield number, value
        if cut is not None and (wanted is None or count in wanted):
            yield count, ItemError(f"input cut: {cut}")


def _unpack(file: SourceFile, suffix: str, target: Path) -> str | None:
    """Write the unpacked file; how it breaks off, or None."""
    import pyarrow

    room = min(MOST_BYTES, (1 << 30) + MOST_RATIO * file.size)
    with open(target, "wb") as out, file.open() as packed, _opened(packed, suffix) as stream:
        while True:
            try:
                block = stream.read(READ_BYTES)
            except StoreError:
                raise
            except (
                EOFError,
                zlib.error,
                pyarrow.ArrowException,
                OSError,
            ) as error:  # OSError: gzip.BadGzipFile, and pyarrow's
                reason = (
                    "not a gzip file, or something behind its end"
                    if isinstance(error, gzip.BadGzipFile)
                    else str(error)
                )
                return f"after {out.tell()} unpacked bytes: {' '.join(reason.split())[:200]}"
            if not block:
                return None
            room -= len(block)
            if room < 0:
                return f"it unpacks to more than {MOST_RATIO} times its {file.size} bytes"
            out.write(block)  # a full disk is no damage of the file: it ends the run


@contextlib.contextmanager
def _opened(packed: BinaryIO, suffix: str) -> Iterator[Any]:
    if suffix == ".zst":
        import pyarrow

        with pyarrow.CompressedInputStream(packed, "zstd") as stream:
            yield stream
    else:
        with gzip.GzipFile(fileobj=packed, mode="rb") as stream:
            yield stream


class _Checked(io.RawIOBase):
    """A stream that ends with the last line before a byte that is no UTF-8, which `broken` then tells. pyarrow would find it
    while it reports a ragged row, where it can not be raised, and would give none of the rows before it.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._decoder, self._at = stream, codecs.getincrementaldecoder("utf-8")(), 0
        self.broken: str | None = None
        self.tail = b""  # the last bytes that were read

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self.broken is not None:
            return b""
        data = self._stream.read(size)
        pending = len(self._decoder.getstate()[0])  # of a character that the block before has begun
        try:
            self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = max(0, error.start - pending)
            self.broken = f"byte {self._at + at} is not UTF-8"
            data = data[: data.rfind(b"\n", 0, at) + 1]
        self._at += len(data)
        self.tail = (self.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        return data


def _is_never_closed(row: Any, tail: bytes) -> bool:
    """Whether the last field of the last row is all that came behind a quote, as pyarrow takes it: rows may be lost in it."""
    text = list(row.values())[-1]
    if not text or text.endswith('"'):
        return False
    # A field that was closed has a quote behind it, one without quotes a delimiter or a line's end before it.
    end = b'"' + text.replace('"', '""').encode()
    return tail.endswith(end[-TAIL_BYTES:]) and (len(end) <= TAIL_BYTES or "\n" in text)


def rows(file: SourceFile, delimiter: str, wanted: Collection[int] | None) -> Iterator[tuple[int, object]]:
    """The rows of a .csv or .tsv by the names in its first line, all as text: a number may be a name with zeros before it.

    Rows with another number of columns are ItemErrors, each behind the batch that it is in.
    """
    import pyarrow
    import pyarrow.csv

    bad: list[ItemError] = []

    def count(row: Any) -> str:
        bad.append(ItemError(f"bad row: expected {row.expected_columns} columns, found {row.actual_columns}"))
        return "skip"

    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=count)
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    number = 0

    def numbered(found: list[object]) -> Iterator[tuple[int, object]]:
        nonlocal number
        for value in found:
            if wanted is None or number in wanted:
                yield number, value
            number += 1

    try:
        with file.open() as stream, pyarrow.csv.open_csv(_Checked(stream), read, parse) as head:
            names = head.schema.names
        if twice := [name for name in names if names.count(name) > 1]:
            yield from numbered([ItemError(f"input cut: two columns are called {twice[0]!r}")])
            return
        bad.clear()
        text = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False
        )
        with file.open() as stream:
            checked = _Checked(stream)
            with pyarrow.csv.open_csv(checked, read, parse, text) as reader:
                good: list[Any] = []
                bad_of_batch: list[ItemError] = []
                for batch in reader:  # the last one is kept until its end is seen
                    yield from numbered([*good, *bad_of_batch])
                    good, bad_of_batch = batch.to_pylist(), list(bad)
                    bad.clear()
        if good and _is_never_closed(good[-1], checked.tail):
            good[-1] = ItemError("input cut: a quote that is opened in this row is never closed")
        cut = [ItemError(f"input cut: {checked.broken}")] if checked.broken else []
        yield from numbered([*good, *bad_of_batch, *bad, *cut])
    except StoreError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield from numbered(
            [ItemError(f"input cut: not readable as CSV: {' '.join(str(error).split())[:200]}")]
        )
