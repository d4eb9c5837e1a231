"""Reads a source to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unitoken.storage.folder import Folder
from unitoken.tokenize.sources.base import SourceFile
from unitoken.tokenize.sources.reader import Input, RawItem, cut, find_files, read_piece


def source_of(path: Path, chunk_size: int = 10) -> Input:
    """Cut a file into pieces."""
    return cut(find_files([str(path)]), chunk_size)


def items_of(source: Input) -> list[RawItem]:
    """Read all items, piece by piece."""
    return [item for piece in range(len(source.pieces)) for item in read_piece(source, piece)]


def values_of(source: Input) -> list[Any]:
    """Read all items and return their values."""
    return [item.value for item in items_of(source)]


def opened(path: Path, **limits: int) -> SourceFile:
    """Return a local file for the module that reads its format; `limits` are fields of SourceFile."""
    return SourceFile(Folder(path.parent), path.name, path.stat().st_size, str(path), **limits)
