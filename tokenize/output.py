"""Where a dataset is written: a local folder, or a folder of an object store.

A chunk is filled in a local folder and then published: renamed, or uploaded with its index last. So a chunk
is done when its index is there, and what a killed run left behind is never taken for a chunk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from unitoken.common.files import AsideFolder, aside_file, remove_abandoned, scratch_folder
from unitoken.dataset.manifest import INDEX
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, is_url

UPLOADS = 8  # files at once


class ChunkFolder(Protocol):
    """A local folder to fill with the files of a chunk."""

    path: Path

    def publish(self) -> None:
        """Move or upload the files to where the chunk belongs."""
        ...


class Output:
    """A dataset that is being written.

    Args:
        url: path or URL of its folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = open_store(url)
        self._folder = None if is_url(url) else Path(url)

    @contextlib.contextmanager
    def chunk(self, name: str) -> Iterator[ChunkFolder]:
        """Make a folder to fill with a chunk; it is removed at the end unless it was published."""
        if self._folder is not None:
            with AsideFolder(self._folder / name) as folder:
                yield folder
            return
        with AsideFolder(scratch_folder() / name) as folder:
            yield _UploadedFolder(self, name, folder.path)

    def done(self) -> set[str]:
        """Return the names of the chunks that are done."""
        if self._folder is not None:
            return {path.parent.name for path in self._folder.glob(f"*/{INDEX}")}
        return {name.removesuffix(f"/{INDEX}") for name in self.store.sizes() if name.endswith(f"/{INDEX}")}

    def is_done(self, chunk: str) -> bool:
        """Return whether the chunk of this name is done."""
        return self.exists(f"{chunk}/{INDEX}")

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        try:
            self.store.size(name)
        except MissingError:
            return False
        return True

    def claim(self, name: str, data: bytes) -> bytes:
        """Write a file unless it is there, and return its content.

        In a local folder only one of two simultaneous claims is written. In an object store the later one
        stays: there is no test-and-set that works with all of them.
        """
        with contextlib.suppress(MissingError):
            return self.store.read(name)
        if self._folder is None:
            self.store.write(name, data)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / name
            with aside_file(path) as file, contextlib.suppress(FileExistsError):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.link(file.name, path)  # unlike a rename it fails if another run was first
        return self.store.read(name)

    def remove_abandoned(self) -> None:
        """Remove what killed runs left aside on this machine."""
        remove_abandoned(self._folder if self._folder is not None else scratch_folder())


class _UploadedFolder:
    def __init__(self, output: Output, name: str, path: Path) -> None:
        self._output, self._name, self.path = output, name, path

    def publish(self) -> None:
        files = sorted(path for path in self.path.iterdir() if path.name != INDEX)
        with ThreadPoolExecutor(UPLOADS) as pool:
            list(pool.map(self._upload, files))
        self._upload(self.path / INDEX)

    def _upload(self, path: Path) -> None:
        self._output.store.upload(path, f"{self._name}/{path.name}")
