"""Input files -> numbered pieces of items. The borders depend on the input and `chunk_size` alone.

    files = find_files(["data/*.tar"])           # paths, URLs, globs, {000..031}, folders of Hugging Face's `datasets`
    input = cut(files, chunk_size=1000)          # piece n becomes chunk n; no piece crosses a file
    for item in read(input, piece=12): ...       # that part of the file alone is read

The format follows from the name: `.json` holds one list, `.jsonl` and `.ndjson` an item a line, `.tar` is a WebDataset,
`.parquet`, `.arrow`, `.csv` and `.tsv` hold an item a row; `.gz` or `.zst` may follow. A name without an ending is taken for JSON.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from unitoken.codec.conversations import ItemError
from unitoken.common.config import Config
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import fingerprint
from unitoken.storage.folder import Folder
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, StoreError, is_url, join, split
from unitoken.storage.web import Web, is_web
from unitoken.tokenize.sources import json_files, loose_files, tables, tars, unpacked
from unitoken.tokenize.sources.base import SourceFile, Span
from unitoken.tokenize.sources.pictures import LFS_POINTER, is_lfs_pointer

Format = Literal["json", "jsonl", "webdataset", "parquet", "arrow", "csv", "tsv", "folder"]
PACKED = (".gz", ".zst")  # behind the suffix of what is in it; .tgz is .tar.gz
SUFFIXES: dict[str, Format] = {
    ".json": "json",
    "": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
DELIMITERS: dict[Format, str] = {"csv": ",", "tsv": "\t"}
UNPACKABLE: tuple[Format, ...] = ("json", "jsonl", "webdataset", "csv", "tsv")
MOST_FILES = 1_000_000  # that one {first..last} may stand for
HASHED_BYTES = 1 << 28  # of a larger file only its size and some blocks are hashed
BLOCKS, BLOCK_BYTES = 64, 1 << 16


class InputFile(Config):
    name: str  # path or URL as it was found
    format: Format
    size: int
    version: str  # changes when the content does


class Piece(Config):
    """`start` and `end` are bytes (JSON, JSONL, and the whole of a tar) or rows (Parquet, Arrow)."""

    file: int
    start: int
    end: int
    position: int  # of its first item in its file
    items: int | None  # None: known when it is read (a tar)
    cut: str | None = None  # how the file breaks off behind the piece; that counts as one of its items


class Input(Config):
    files: list[InputFile]
    pieces: list[Piece]

    @property
    def items(self) -> int | None:
        counts = [piece.items for piece in self.pieces]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def fingerprint(self) -> str:
        """Of what the files hold and how they are cut, not of their names."""
        files = [[file.size, file.format, file.version] for file in self.files]
        pieces = [list(piece.model_dump().values()) for piece in self.pieces]
        return fingerprint(json.dumps([files, pieces]).encode())


@dataclass(frozen=True)
class RawItem:
    piece: int
    file: int
    position: int  # in its file
    value: object  # an ItemError where it could not be read


def find_files(names: Sequence[str]) -> list[InputFile]:
    """Every file that is meant, with its size and fingerprint, in the order of `names` and by name within each.

    Raises:
        ConfigError: a name that stands for nothing, or a file that can not be read.
    """
    return [_input_file(file) for name in names for file in _expand(name)]


def cut(files: Sequence[InputFile], chunk_size: int) -> Input:
    """Find the borders. JSON is read once for it, of the other formats no more than their indexes.

    Raises:
        ConfigError: a file that is not what its name says, or no items at all.
    """
    pieces: list[Piece] = []
    for number, file in enumerate(files):
        position = 0
        with _config_errors(file.name):
            for span in _spans(file, chunk_size):
                pieces.append(Piece(file=number, position=position, **span._asdict()))
                position += span.items or 0
    if not pieces:
        raise ConfigError(f"{', '.join(file.name for file in files)[:200]}: holds no items")
    return Input(files=list(files), pieces=pieces)


def read_piece(input: Input, piece: int, positions: Collection[int] | None = None) -> Iterator[RawItem]:
    """The items of a piece, or those at `positions` of its file, one by one.

    Raises:
        ConfigError: the file is not the one that was cut.
        StoreError: it can not be reached.
    """
    part = input.pieces[piece]
    file = input.files[part.file]
    wanted = None if positions is None else {position - part.position for position in positions}
    expected = part.items if wanted is None else len(wanted)
    found = 0
    for number, value in _values(file, part, wanted):
        found += 1
        yield RawItem(piece, part.file, part.position + number, value)
    if part.cut is not None and part.items is not None and (wanted is None or part.items - 1 in wanted):
        found += 1
        yield RawItem(piece, part.file, part.position + part.items - 1, ItemError(f"input cut: {part.cut}"))
    if expected not in (None, found):
        raise ConfigError(
            f"{file.name}: has changed since it was cut: {found} items in piece {piece}, expected {expected}"
        )


def base(input: Input, file: int) -> str:
    """The folder or URL from where the relative names of a file's images are meant."""
    if input.files[file].format == "folder":
        return input.files[file].name
    return split(
        input.files[file].name.partition("?")[0] if is_url(input.files[file].name) else input.files[file].name
    )[0]


def item_name(input: Input, item: RawItem) -> str:
    """The id of an item that has none: its key in a tar, else its place."""
    if isinstance(item.value, dict) and input.files[item.file].format in ("webdataset", "folder"):
        return str(item.value["__key__"])
    return str(item.position) if len(input.files) == 1 else f"{item.file}:{item.position}"


# --- what a name stands for ------------------------------------------------------------------------------------------


def _expand(name: str) -> list[str]:
    matches = _without_the_rest_of_img2dataset([match for one in _ranges(name) for match in _matches(one)])
    files = [file for match in matches for file in _dataset_files(match)]
    if not files:
        raise ConfigError(f"{name}: no file matches")
    return files


def _ranges(name: str) -> list[str]:
    """`shard-{00..31}.tar`, as WebDataset writes it -> 32 names."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not found:
        return [name]
    first, last = found.groups()
    width = max(len(first), len(last)) if first.startswith("0") else 0
    if width > 18 or len(last) > 18 or int(last) - int(first) >= MOST_FILES:
        raise ConfigError(f"{name[:200]}: stands for more than {MOST_FILES} files")
    numbers = range(int(first), int(last) + 1)
    return [
        tail
        for n in numbers
        for tail in _ranges(f"{name[: found.start()]}{n:0{width}d}{name[found.end() :]}")
    ]


def _matches(name: str) -> list[str]:
    """The paths or URLs that a glob stands for; `*` stays within a folder."""
    if not any(character in name for character in "*?[") or is_web(name):
        return [name]
    if not is_url(name):
        return [name] if Path(name).exists() else sorted(glob.glob(name))  # noqa: PTH207 - keeps names as they were written
    folder = re.split(r"[*?\[]", name)[0].rpartition("/")[0]
    pattern = name[len(folder) + 1 :]
    with _config_errors(name):
        found = open_store(folder).sizes(re.split(r"[*?\[]", pattern)[0])
    fits = (
        one for one in found if one.count("/") == pattern.count("/") and PurePosixPath(one).match(pattern)
    )
    return [join(folder, one) for one in sorted(fits)]


def _without_the_rest_of_img2dataset(names: list[str]) -> list[str]:
    """Beside 00000.tar lie 00000.parquet, which lists the same items, and 00000_stats.json: a glob means the tars."""
    tars = {name.removesuffix(".tar") for name in names if name.endswith(".tar")}
    beside = [
        name
        for name in names
        if name.removesuffix(".parquet") in tars or name.removesuffix("_stats.json") in tars
    ]
    beside = [name for name in beside if not name.endswith(".tar")]
    if beside:
        print(
            f"passed over {len(beside)} files that img2dataset writes beside its tars, such as {beside[0]}",
            file=sys.stderr,
        )
    return [name for name in names if name not in set(beside)]


def _dataset_files(name: str) -> list[str]:
    """The .arrow files of a folder that Hugging Face's `datasets` saved; anything else is a file itself."""
    if is_web(name) or (PurePosixPath(name).suffix if is_url(name) else not Path(name).is_dir()):
        return [name]
    folder = open_store(name)
    with _config_errors(name):
        if splits := _json_in(folder, "dataset_dict.json"):
            choices = ", ".join(join(name, split) for split in splits.get("splits", []))
            raise ConfigError(f"{name}: holds several splits: choose from {choices}")
        if state := _json_in(folder, "state.json"):
            names = [str(entry["filename"]) for entry in state.get("_data_files", [])]
        elif is_url(name):
            return [name]
        else:
            names = sorted(path.name for path in Path(name).glob("*.arrow"))
    if not names and not is_url(name) and loose_files.has_pictures(Path(name)):
        return [name]
    if not names or any("/" in one for one in names):
        raise ConfigError(
            f"{name}: expected a file, a folder that Hugging Face's `datasets` saved, or one of pictures; found another folder"
        )
    return [join(name, one) for one in names]


def _json_in(folder: Store, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads(folder.read(name))
    except MissingError:
        return None
    except ValueError as error:
        raise ConfigError(f"{folder.url}/{name}: not readable as JSON: {error}") from None
    return value if isinstance(value, dict) else None


# --- one file --------------------------------------------------------------------------------------------------------


def _input_file(name: str) -> InputFile:
    if not is_url(name) and Path(name).is_dir():
        count, version = loose_files.version(Path(name))
        return InputFile(name=name, format="folder", size=count, version=version)
    store, file = _locate(name)
    suffix, packed = _suffixes(name)
    with _config_errors(name):
        if (
            isinstance(store, Folder) and Path(name).exists() and not Path(name).is_file()
        ):  # a pipe would never end
            raise ConfigError(f"{name}: cannot read the input: not a file")
        size = store.size(file)
        if suffix not in SUFFIXES or (packed and SUFFIXES[suffix] not in UNPACKABLE):
            if packed and suffix in SUFFIXES:
                raise ConfigError(f"{name}: a table of columns is not read from a {packed} file: unpack it")
            known = ", ".join(one for one in SUFFIXES if one)
            raise ConfigError(
                f"{name}: a file of an unknown type {suffix or '(its name has no suffix)'}; known are {known}, tars and lines of "
                "text also as .gz or .zst, .tgz, and folders of pictures or of Hugging Face's `datasets`"
            )
        if is_lfs_pointer(store.read_range(file, 0, 200)):
            raise ConfigError(f"{name}: {LFS_POINTER}")
        version = _content_version(store, file, size) if isinstance(store, Folder) else store.version(file)
    return InputFile(name=name, format=SUFFIXES[suffix], size=size, version=version)


def _suffixes(name: str) -> tuple[str, str]:
    """What a file is, and how it is packed: `.jsonl`, `.gz`; "" where it is not."""
    path = PurePosixPath((name.partition("?")[0] if is_url(name) else name).lower())
    if path.suffix == ".tgz":
        return ".tar", ".gz"
    return (PurePosixPath(path.stem).suffix, path.suffix) if path.suffix in PACKED else (path.suffix, "")


def _content_version(store: Store, file: str, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    whole = size <= HASHED_BYTES
    starts = (
        range(0, size, 1 << 20)
        if whole
        else [number * (size - BLOCK_BYTES) // (BLOCKS - 1) for number in range(BLOCKS)]
    )
    for start in starts:
        digest.update(store.read_range(file, start, min(size, start + (1 << 20 if whole else BLOCK_BYTES))))
    return digest.hexdigest()[:16]


def _locate(name: str) -> tuple[Store | Web, str]:
    if is_web(name):
        return Web(), name
    folder, file = split(name)
    return open_store(folder), file


def _spans(file: InputFile, chunk_size: int) -> Iterator[Span]:
    if file.format == "folder":
        return loose_files.loose_spans(file.size, chunk_size)
    source = SourceFile(*_locate(file.name), file.size, file.name)
    if _suffixes(file.name)[1] or file.format in DELIMITERS:
        return unpacked.unpacked_spans(source)
    match file.format:
        case "json":
            return json_files.list_spans(source, chunk_size)
        case "jsonl":
            return json_files.line_spans(source, chunk_size)
        case "webdataset":
            return tars.tar_spans(source)
        case "parquet":
            return tables.parquet_spans(source, chunk_size)
        case "arrow":
            return tables.arrow_spans(source, chunk_size)
        case other:
            raise AssertionError(other)


def _values(file: InputFile, piece: Piece, wanted: Collection[int] | None) -> Iterator[tuple[int, object]]:
    if file.format == "folder":
        return loose_files.loose_values(Path(file.name), file.version, piece.start, piece.end, wanted)
    source = SourceFile(*_locate(file.name), file.size, file.name)
    if packed := _suffixes(file.name)[1]:
        return unpacked.unpacked_values(source, packed, functools.partial(_whole, file.format), wanted)
    match file.format:
        case "csv" | "tsv":
            return unpacked.rows(source, DELIMITERS[file.format], wanted)
        case "json":
            return json_files.list_values(source, piece.start, piece.end, wanted)
        case "jsonl":
            return json_files.line_values(source, piece.start, piece.end, wanted)
        case "webdataset":
            return tars.tar_values(source, wanted)
        case "parquet":
            return tables.parquet_values(source, piece.start, piece.end, wanted)
        case "arrow":
            return tables.arrow_values(source, piece.start, piece.end, wanted)


def _whole(format: Format, source: SourceFile) -> Iterator[tuple[int, object]]:
    """All items of a file that was unpacked."""
    if format == "webdataset":
        yield from tars.tar_values(source, None)
    elif format in DELIMITERS:
        yield from unpacked.rows(source, DELIMITERS[format], None)
    else:
        spans, read_span = (
            (json_files.list_spans, json_files.list_values)
            if format == "json"
            else (json_files.line_spans, json_files.line_values)
        )
        number = 0
        try:
            for span in spans(source, 1 << 62):
                for number, value in read_span(source, span.start, span.end, None):
                    yield number, value
                    number += 1
                if span.cut is not None:
                    yield number, ItemError(f"input cut: {span.cut}")
        except ConfigError as error:  # not one item
            yield number, ItemError(f"input cut: {error}")


@contextlib.contextmanager
def _config_errors(name: str) -> Iterator[None]:
    try:
        yield
    except MissingError:
        raise ConfigError(f"{name}: cannot read the input: No such file") from None
    except StoreError as error:
        raise ConfigError(f"{name}: cannot read the input: {error.strerror or error}") from None
