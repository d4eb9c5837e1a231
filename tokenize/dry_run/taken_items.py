"""A few items of an input, spread over it as far as that is cheap, and how many items the input has.

Small files are read whole and counted. Of a large one some places are read: of a table rows here and there,
of JSON lines the lines behind some offsets, of all others (tars, CSV, JSON lists, compressed files) the
beginning. The number of items then follows from the items in the bytes that were read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from unitoken.codec.conversations import ItemError, item_id
from unitoken.storage.store import is_url, split
from unitoken.tokenize.pipeline.item import Place, SourceItem
from unitoken.tokenize.sources import formats, picture_folders
from unitoken.tokenize.sources.base import SourceFile, Span, store_errors_as_config_errors
from unitoken.tokenize.sources.reader import Input, InputFile, Piece, folder_of, open_source

SMALL_BYTES = 1 << 25
MOST_FILES = 5
PLACES = 4  # of a large file
COUNTED_BYTES = 1 << 22  # at the beginning of a large file
BLOCK_BYTES = 1 << 18  # smaller than the reader's own: little is read behind the last item

T = TypeVar("T")


class TakenItems(NamedTuple):
    """Some items of an input.

    Attributes:
        input: its files, without the pieces that a run would cut.
        items: in the order of the input.
        total: items of the whole input; estimated unless all files were counted.
        how: where the total comes from.
    """

    input: Input
    items: list[SourceItem]
    total: float
    how: str


class _Taken(NamedTuple):
    """Values of a file with a name for each, and how many items are in how many of its bytes."""

    values: list[tuple[str, object]]
    items: float
    bytes: float


def take_items(files: Sequence[InputFile], count: int) -> TakenItems:
    """Take up to `count` items of an input. Raises ConfigError where a file can not be read."""
    numbers = _spread(list(range(len(files))), MOST_FILES)
    pieces = [Piece(file=number, start=0, end=0, position=0, items=None) for number in range(len(files))]
    input = Input(files=list(files), pieces=pieces)
    items: list[SourceItem] = []
    taken: list[tuple[InputFile, _Taken]] = []
    for place, number in enumerate(numbers):
        rest = count - len(items)
        with store_errors_as_config_errors(files[number].name):
            part = _take(files[number], -(-rest // (len(numbers) - place)))
        taken.append((files[number], part))
        items += [_source_item(input, number, name, value) for name, value in part.values]
    total, how = _total(files, taken)
    return TakenItems(input, items, total, how)


def _source_item(input: Input, number: int, name: str, value: object) -> SourceItem:
    file = input.files[number].name
    if isinstance(value, dict) and "__key__" in value:
        name = str(value["__key__"])
    with contextlib.suppress(ItemError):  # a bad id, which a later stage rejects
        name = item_id(value, name)
    base = split(file.partition("?")[0] if is_url(file) else file)[1]
    return SourceItem(Place(number, base, 0, name), value, folder_of(input, number))


def _total(files: Sequence[InputFile], taken: Sequence[tuple[InputFile, _Taken]]) -> tuple[float, str]:
    """Return the items of the input, and how they were counted or estimated."""
    in_folders = float(sum(file.size for file in files if file.format == "folder"))
    whole = sum(file.size for file in files if file.format != "folder")
    parts = [part for file, part in taken if file.format != "folder"]
    items, looked_at = sum(part.items for part in parts), sum(part.bytes for part in parts)
    if looked_at >= whole:
        return in_folders + items, "counted"
    where = f"{len(parts)} of {len(files)} files" if len(taken) < len(files) else "parts of the files"
    total = in_folders + items / max(looked_at, 1) * whole
    return total, f"estimated from {where}, {looked_at / whole:.1%} of the bytes"


def _take(file: InputFile, count: int) -> _Taken:
    if file.format == "folder":
        rows = _spread(list(range(file.size)), count)
        values = picture_folders.folder_values(Path(file.name), file.version, 0, file.size, set(rows))
        return _Taken(_named(values), file.size, 0)
    source, compression = open_source(file), formats.compression_of(file.name)
    if file.size <= SMALL_BYTES:
        return _take_of_small(source, file, compression, count)
    if file.format == "parquet":
        return _take_rows(source, file, count)
    if file.format == "jsonl" and not compression:
        return _take_lines(source, file, count)
    return _take_beginning(source, file, compression, count)


def _all_values(
    source: SourceFile, file: InputFile, compression: str, chunk_size: int
) -> Iterator[tuple[int, object]]:
    """Yield all items of a file, and an ItemError where it breaks off."""
    spans: Iterable[Span] = formats.spans(source, file.format, compression, chunk_size)
    if file.format == "arrow":
        spans = [Span(0, formats.NO_LIMIT, None)]  # they are cut by reading the whole file
    first = 0
    for span in spans:
        number = -1
        for number, value in formats.values(source, file.format, compression, span.start, span.end, None):
            yield first + number, value
        first += number + 1
        if span.cut is not None:
            yield first, ItemError(f"input cut: {span.cut}")


def _take_beginning(source: SourceFile, file: InputFile, compression: str, count: int) -> _Taken:
    """Take the first items, and count those in the first bytes."""
    counted = _CountedFile(source.store, source.name, source.size, source.shown, BLOCK_BYTES)
    kept: list[tuple[int, object]] = []
    items = 0
    for found in _all_values(counted, file, compression, count):
        items += 1
        if len(kept) < count:
            kept.append(found)
        elif max(counted.read_to) >= COUNTED_BYTES:
            break
    return _Taken(_named(kept), items, max(counted.read_to))


def _take_of_small(source: SourceFile, file: InputFile, compression: str, count: int) -> _Taken:
    """Read all items, and keep some that are spread over them, without keeping all of them in memory."""
    kept: list[tuple[int, object]] = []
    stride, number = 1, 0
    for number, found in enumerate(_all_values(source, file, compression, COUNTED_BYTES), 1):
        if (number - 1) % stride == 0:
            kept.append(found)
            if len(kept) == 2 * count:
                kept, stride = kept[::2], 2 * stride
    return _Taken(_named(_spread(kept, count)), number, file.size)


def _take_rows(source: SourceFile, file: InputFile, count: int) -> _Taken:
    rows = sum(span.items or 0 for span in formats.spans(source, file.format, "", formats.NO_LIMIT))
    each = -(-count // PLACES)
    values: list[tuple[int, object]] = []
    for place in range(PLACES):
        first = rows * place // PLACES
        last = min(first + each, rows * (place + 1) // PLACES)
        values += [
            (first + number, value)
            for number, value in formats.values(source, file.format, "", first, last, None)
        ]
    return _Taken(_named(values[:count]), rows, file.size)


def _take_lines(source: SourceFile, file: InputFile, count: int) -> _Taken:
    """Take whole lines behind some offsets; their numbers are not known, so their offsets name them."""
    each, values, lines, read = -(-count // PLACES), [], 0, 0
    for place in range(PLACES):
        at = source.size * place // PLACES
        block = source.read(at, at + BLOCK_BYTES)
        lines, read = lines + block.count(b"\n"), read + len(block)
        at += _length_to_line_feed(source, at) if at else 0
        found = formats.values(source, file.format, "", at, source.size, None)
        values += [(f"{number} behind byte {at}", value) for number, value in itertools.islice(found, each)]
    return _Taken(values[:count], lines, read)


def _length_to_line_feed(source: SourceFile, at: int) -> int:
    """Return how many bytes there are from `at` on to the beginning of the next line."""
    before = 0
    for block in source.blocks(at, source.size):
        place = block.find(b"\n")
        if place >= 0:
            return before + place + 1
        before += len(block)
    return before


@dataclass(frozen=True)
class _CountedFile(SourceFile):
    """A file that knows how far it was read."""

    read_to: list[int] = field(default_factory=lambda: [0])

    def read(self, start: int, end: int) -> bytes:
        data = super().read(start, end)
        self.read_to.append(start + len(data))
        return data


def _named(values: Iterable[tuple[int, object]]) -> list[tuple[str, object]]:
    return [(str(number), value) for number, value in values]


def _spread(values: list[T], count: int) -> list[T]:
    """Return up to `count` values at equal distances."""
    if len(values) <= count:
        return values
    return [values[(2 * number + 1) * len(values) // (2 * count)] for number in range(count)]
