"""All items of a source, piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unitoken.tokenize.sources.reader import cut, find_files, read_piece


def whole(path: Path) -> list[Any]:
    source = cut(find_files([str(path)]), 7)
    return [item for piece in range(len(source.pieces)) for item in read_piece(source, piece)]
