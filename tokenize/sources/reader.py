"""Input files -> numbered pieces of items, whose borders depend on the input and `chunk_size` alone.

    files = find_files(["data/*.tar"])     # paths, URLs, globs, {000..031}, folders of HF `datasets`
    input = cut(files, chunk_size=1000)    # piece n becomes chunk n; no piece crosses a file
    items = read_piece(input, piece=12)    # reads that part of the file alone

The ending of a file's name tells its format: `.json` holds one list, `.jsonl` and `.ndjson` one item per
line, `.tar` is a WebDataset, `.parquet`, `.arrow`, `.csv` and `.tsv` hold one item per row; `.gz` or `.zst`
may follow. A name without an ending is taken for JSON. `formats.py` names the module that reads each format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unitoken.codec.conversations import ItemError
from unitoken.common.config import Config
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import fingerprint
from unitoken.storage.folder import Folder
from unitoken.storage.open import open_store
from unitoken.storage.store import Store, is_url, split
from unitoken.storage.web import Web, is_web
from unitoken.tokenize.sources import formats, patterns, picture_folders
from unitoken.tokenize.sources.base import SourceFile, Span, row_spans, store_errors_as_config_errors
from unitoken.tokenize.sources.formats import Format
from unitoken.tokenize.sources.pictures import LFS_POINTER, is_lfs_pointer

HASHED_WHOLE_BYTES = 1 << 28
"""Of a larger local file only the size and some blocks are hashed."""
HASHED_BLOCKS, HASHED_BLOCK_BYTES = 64, 1 << 16


class InputFile(Config):
    """A file of the input, or a folder of pictures."""

    name: str
    """The path or URL as it was found."""
    format: Format
    size: int
    """Bytes; of a folder, the number of samples."""
    version: str
    """Changes when the content changes."""


class Piece(Config):
    """A part of a file, in bytes (JSON, JSONL), rows (Parquet, Arrow), samples of a folder, or all of it."""

    file: int
    """The file's index in `Input.files`."""
    start: int
    end: int
    position: int
    """The position of the first item in its file."""
    items: int | None
    """None where the number is only known after reading (tars, CSV, compressed files)."""
    cut: str | None = None
    """How the file breaks off after this piece, if it does. The break counts as one of `items`."""


class Input(Config):
    """The files of a job and the pieces that they are cut into."""

    files: list[InputFile]
    pieces: list[Piece]

    @property
    def items(self) -> int | None:
        """The number of items; None where a piece does not know its own."""
        counts = [piece.items for piece in self.pieces]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def fingerprint(self) -> str:
        """A hash of what the files hold and how they are cut, but not of their names."""
        files = [[file.size, file.format, file.version] for file in self.files]
        pieces = [list(piece.model_dump().values()) for piece in self.pieces]
        return fingerprint(json.dumps([files, pieces]).encode())


@dataclass(frozen=True)
class RawItem:
    """An item as its file holds it, before any adapter."""

    piece: int
    file: int
    position: int
    """In its file."""
    value: object
    """An ItemError where the item could not be read."""


def find_files(names: Sequence[str]) -> list[InputFile]:
    """Find all files that `names` stand for, in the order of `names`, and sorted by name within each.

    Raises:
        ConfigError: a name stands for no file, or a file cannot be read.
    """
    return [_input_file(file) for name in names for file in patterns.expand(name)]


def cut(files: Sequence[InputFile], chunk_size: int) -> Input:
    """Cut files into pieces of at most `chunk_size` items.

    This reads JSON files once, and of the other formats no more than their indexes.

    Raises:
        ConfigError: a file is not in the format that its name says, or there are no items at all.
    """
    pieces: list[Piece] = []
    for number, file in enumerate(files):
        position = 0
        with store_errors_as_config_errors(file.name):
            for span in _spans(file, chunk_size):
                pieces.append(Piece(file=number, position=position, **span._asdict()))
                position += span.items or 0
    if not pieces:
        raise ConfigError(f"{', '.join(file.name for file in files)[:200]}: holds no items")
    return Input(files=list(files), pieces=pieces)


def read_piece(input: Input, piece: int, positions: Collection[int] | None = None) -> Iterator[RawItem]:
    """Read the items of a piece one by one.

    Args:
        input: the files and how they are cut.
        piece: the index of the piece.
        positions: read only the items at these positions of the file; None reads all of the piece.

    Raises:
        ConfigError: the file has changed since it was cut.
        StoreError: the file cannot be reached.
    """
    part = input.pieces[piece]
    selected = None if positions is None else {position - part.position for position in positions}
    expected = part.items if selected is None else len(selected)
    count = 0
    for number, value in _values(input.files[part.file], part, selected):
        count += 1
        yield RawItem(piece, part.file, part.position + number, value)
    if part.cut is not None and part.items is not None and (selected is None or part.items - 1 in selected):
        count += 1
        yield RawItem(piece, part.file, part.position + part.items - 1, ItemError(f"input cut: {part.cut}"))
    if expected not in (None, count):
        raise ConfigError(
            f"{input.files[part.file].name}: has changed since it was cut: {count} items in piece {piece}, "
            f"expected {expected}"
        )


def folder_of(input: Input, file: int) -> str:
    """Return the folder or URL to which relative image names in a file belong."""
    name = input.files[file].name
    if input.files[file].format == "folder":
        return name
    return split(name.partition("?")[0] if is_url(name) else name)[0]


def item_name(input: Input, item: RawItem) -> str:
    """Return the id of an item that has none of its own: its key in a tar or folder, else its position."""
    if isinstance(item.value, dict) and input.files[item.file].format in ("webdataset", "folder"):
        return str(item.value["__key__"])
    return str(item.position) if len(input.files) == 1 else f"{item.file}:{item.position}"


def _input_file(name: str) -> InputFile:
    if not is_url(name) and Path(name).is_dir():
        count, version = picture_folders.count_and_version(Path(name))
        return InputFile(name=name, format="folder", size=count, version=version)
    store, file = _locate(name)
    with store_errors_as_config_errors(name):
        is_local = isinstance(store, Folder)
        if is_local and Path(name).exists() and not Path(name).is_file():  # reading a pipe would never end
            raise ConfigError(f"{name}: cannot read the input: not a file")
        size = store.size(file)
        format = formats.format_of(name)
        if is_lfs_pointer(store.read_range(file, 0, 200)):
            raise ConfigError(f"{name}: {LFS_POINTER}")
        version = content_version(store, file, size) if isinstance(store, Folder) else store.version(file)
    return InputFile(name=name, format=format, size=size, version=version)


def content_version(store: Store, file: str, size: int, whole_bytes: int = HASHED_WHOLE_BYTES) -> str:
    """Hash a file's size and content; of a file larger than `whole_bytes`, some blocks of the content."""
    if size <= whole_bytes:
        block_bytes = 1 << 20
        starts: Sequence[int] = range(0, size, block_bytes)
    else:
        block_bytes = HASHED_BLOCK_BYTES
        starts = [number * (size - block_bytes) // (HASHED_BLOCKS - 1) for number in range(HASHED_BLOCKS)]
    digest = hashlib.sha256(str(size).encode())
    for start in starts:
        digest.update(store.read_range(file, start, min(size, start + block_bytes)))
    return digest.hexdigest()[:16]


def _locate(name: str) -> tuple[Store | Web, str]:
    """Return the store that holds a file, and the file's name in it."""
    if is_web(name):
        return Web(), name
    folder, file = split(name)
    return open_store(folder), file


def open_source(file: InputFile) -> SourceFile:
    """Return a file of the input, no folder, ready to be read."""
    return SourceFile(*_locate(file.name), file.size, file.name)


def _spans(file: InputFile, chunk_size: int) -> Iterator[Span]:
    if file.format == "folder":
        return row_spans(file.size, chunk_size)
    return formats.spans(open_source(file), file.format, formats.compression_of(file.name), chunk_size)


def _values(file: InputFile, piece: Piece, selected: Collection[int] | None) -> Iterator[tuple[int, object]]:
    if file.format == "folder":
        folder = Path(file.name)
        return picture_folders.folder_values(folder, file.version, piece.start, piece.end, selected)
    compression = formats.compression_of(file.name)
    return formats.values(open_source(file), file.format, compression, piece.start, piece.end, selected)
