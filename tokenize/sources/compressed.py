"""Compressed files (.gz, .tgz, .zst), each of them one piece.

A file is decompressed into the user's scratch folder and then read as what it is: it is never in memory as a
whole, and the same code finds the damage in it. The decompressed file is removed after its last item.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unitoken.codec.conversations import ItemError
from unitoken.common.errors import one_line
from unitoken.common.files import AsideFolder, scratch_folder
from unitoken.storage.folder import Folder
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources.base import SourceFile

MAX_DECOMPRESSED_BYTES = 1 << 40
MAX_RATIO = 1 << 10
"""The most times that a file may grow; text grows 3 to 20 times. The first GiB is always allowed."""
DECOMPRESS_BYTES = 1 << 14
"""Decompressed by one read. It is small because a read that meets damage returns nothing."""

Reader = Callable[[SourceFile], Iterator[tuple[int, object]]]
"""Reads all items of a file that is not compressed."""


def compressed_values(
    file: SourceFile,
    compression: str,
    read_all: Reader,
    selected: Collection[int] | None,
    max_ratio: int = MAX_RATIO,
) -> Iterator[tuple[int, object]]:
    """Read the items of a compressed file; where it breaks off, an ItemError takes the place of the next.

    Args:
        file: the compressed file.
        compression: `.gz` or `.zst`.
        read_all: reads the items from the decompressed file.
        selected: the numbers of the items to read; None reads all of them.
        max_ratio: a file that grows more than this many times, and by more than a GiB, breaks off there.
    """
    with AsideFolder(scratch_folder() / "unpacked") as folder:
        name = "source"
        cut = _decompress(file, compression, folder.path / name, max_ratio)
        size = (folder.path / name).stat().st_size
        count = 0
        if size:
            for number, value in read_all(SourceFile(Folder(folder.path), name, size, file.shown)):
                count = number + 1
                if selected is None or number in selected:
                    yield number, value
        if cut is not None and (selected is None or count in selected):
            yield count, ItemError(f"input cut: {cut}")


def _decompress(file: SourceFile, compression: str, target: Path, max_ratio: int) -> str | None:
    """Write the decompressed file. Return how it breaks off, or None for a whole one."""
    import pyarrow

    room = min(MAX_DECOMPRESSED_BYTES, (1 << 30) + max_ratio * file.size)
    with open(target, "wb") as out, file.open() as packed, _decompressing(packed, compression) as stream:
        while True:
            try:
                block = stream.read(DECOMPRESS_BYTES)
            except StoreError:
                raise
            except gzip.BadGzipFile:
                reason = "not a gzip file, or something behind its end"
                return f"after {out.tell()} unpacked bytes: {reason}"
            except (
                EOFError,
                zlib.error,
                pyarrow.ArrowException,
                OSError,
            ) as error:  # pyarrow raises OSError, too
                return f"after {out.tell()} unpacked bytes: {one_line(error, 200)}"
            if not block:
                return None
            room -= len(block)
            if room < 0:
                return f"it unpacks to more than {max_ratio} times its {file.size} bytes"
            out.write(block)  # outside of the try: a full disk is no damage of the file, it ends the run


@contextlib.contextmanager
def _decompressing(packed: BinaryIO, compression: str) -> Iterator[Any]:
    if compression == ".zst":
        import pyarrow

        with pyarrow.CompressedInputStream(packed, "zstd") as stream:
            yield stream
    else:
        with gzip.GzipFile(fileobj=packed, mode="rb") as stream:
            yield stream
