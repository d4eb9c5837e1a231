"""Files in a local folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from unitoken.common.files import aside_file, publish, write_aside
from unitoken.storage.store import MissingError, StoreError, store_error


class Folder:
    """A local folder, created when the first file is written."""

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        self._path = path

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with _os_errors():
            return (self._path / name).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, fewer if the file ends before."""
        with _os_errors(), open(self._path / name, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it is seekable."""
        with _os_errors():
            return open(self._path / name, "rb")

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        with _os_errors():
            return (self._path / name).stat().st_size

    def version(self, name: str) -> str:
        """Return a text of size and time, which changes with the content of a file."""
        with _os_errors():
            status = (self._path / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes of all files whose names begin with `prefix`, sorted by name."""
        found: dict[str, int] = {}
        start = self._path / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self._path).as_posix()
                with contextlib.suppress(FileNotFoundError):  # deleted by another process
                    if relative.startswith(prefix):
                        found[relative] = path.stat().st_size
        return dict(sorted(found.items()))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        with _os_errors():
            _make_folder((self._path / name).parent)
            write_aside(self._path / name, data)

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file atomically."""
        target = self._path / name
        with _os_errors():
            _make_folder(target.parent)
            with aside_file(target) as file, open(path, "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
                publish(file, target)  # with fsync, as the manifest written next declares it complete

    def delete(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        with _os_errors():
            (self._path / name).unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # not MissingError, even for a FileNotFoundError: no file was read
        raise store_error(f"{folder}: cannot be created: {error.strerror}", error) from None


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"{error.filename}: not there") from None
    except StoreError:
        raise
    except OSError as error:
        raise store_error(f"{error.filename}: {error.strerror}", error) from None
