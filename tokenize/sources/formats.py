"""Which module reads which format, and how a file's name tells its format.

To add a format: write a module as `base.py` describes, then name its endings and its two functions here.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Literal

from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError
from unitoken.storage.store import is_url
from unitoken.tokenize.sources import compressed, csv_files, json_files, parquet_arrow, tars
from unitoken.tokenize.sources.base import SourceFile, Span, whole_file_span

Format = Literal["json", "jsonl", "webdataset", "parquet", "arrow", "csv", "tsv", "folder"]
FORMATS: dict[str, Format] = {
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
"""The format of a file by the ending of its name."""
COMPRESSIONS = (".gz", ".zst")
"""Endings that may follow another one; `.tgz` is read as `.tar.gz`."""
COMPRESSIBLE: tuple[Format, ...] = ("json", "jsonl", "webdataset", "csv", "tsv")
DELIMITERS: dict[Format, str] = {"csv": ",", "tsv": "\t"}
NO_LIMIT = 1 << 62


def format_of(name: str) -> Format:
    """Return the format of the file called `name`.

    Raises:
        ConfigError: the ending of the name is not known.
    """
    ending, compression = _endings(name)
    if ending not in FORMATS:
        known = ", ".join(filter(None, FORMATS))
        raise ConfigError(
            f"{name}: a file of an unknown type {ending or '(its name has no suffix)'}; known are {known}, "
            "tars and lines of text also as .gz or .zst, .tgz, and folders of pictures or of Hugging Face's "
            "`datasets`"
        )
    if compression and FORMATS[ending] not in COMPRESSIBLE:
        raise ConfigError(f"{name}: a table of columns is not read from a {compression} file: unpack it")
    return FORMATS[ending]


def compression_of(name: str) -> str:
    """Return `.gz`, `.zst` or, for a file that is not compressed, ""."""
    return _endings(name)[1]


def spans(file: SourceFile, format: Format, compression: str, chunk_size: int) -> Iterator[Span]:
    """Cut a file into spans of at most `chunk_size` items, or into one where its format allows no more."""
    if compression:
        return whole_file_span(file)
    match format:
        case "csv" | "tsv":
            return whole_file_span(file)
        case "json":
            return json_files.list_spans(file, chunk_size)
        case "jsonl":
            return json_files.line_spans(file, chunk_size)
        case "webdataset":
            return tars.tar_spans(file)
        case "parquet":
            return parquet_arrow.parquet_spans(file, chunk_size)
        case "arrow":
            return parquet_arrow.arrow_spans(file, chunk_size)
        case other:
            raise AssertionError(other)


def values(
    file: SourceFile,
    format: Format,
    compression: str,
    start: int,
    end: int,
    selected: Collection[int] | None,
) -> Iterator[tuple[int, object]]:
    """Read the items of the span from `start` to `end`."""
    if compression:
        all_values = functools.partial(_all_values, format=format)
        return compressed.compressed_values(file, compression, all_values, selected)
    match format:
        case "csv" | "tsv":
            return csv_files.csv_values(file, DELIMITERS[format], selected)
        case "json":
            return json_files.list_values(file, start, end, selected)
        case "jsonl":
            return json_files.line_values(file, start, end, selected)
        case "webdataset":
            return tars.tar_values(file, selected)
        case "parquet":
            return parquet_arrow.parquet_values(file, start, end, selected)
        case "arrow":
            return parquet_arrow.arrow_values(file, start, end, selected)
        case other:
            raise AssertionError(other)


def _all_values(file: SourceFile, format: Format) -> Iterator[tuple[int, object]]:
    """Read all items of a file that was compressed. A break in it is an ItemError after the last item."""
    if format not in ("json", "jsonl"):
        yield from values(file, format, "", 0, file.size, None)
        return
    count = 0
    try:
        for span in spans(file, format, "", NO_LIMIT):
            for _, value in values(file, format, "", span.start, span.end, None):
                yield count, value
                count += 1
            if span.cut is not None:
                yield count, ItemError(f"input cut: {span.cut}")
    except ConfigError as error:  # not one item could be read
        yield count, ItemError(f"input cut: {error}")


def _endings(name: str) -> tuple[str, str]:
    """Return the endings that tell the format and the compression, as `.jsonl` and `.gz`, or "" for none."""
    path = PurePosixPath((name.partition("?")[0] if is_url(name) else name).lower())
    if path.suffix == ".tgz":
        return ".tar", ".gz"
    if path.suffix in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""
