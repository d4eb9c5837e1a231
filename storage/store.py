"""Files in a local folder or in an object store, by one small set of methods.

    store = open_store("s3://bucket/folder")  # or gs://, az://, hf://datasets/owner/name/folder, or a path
    store.write("index.json", data); store.read("index.json"); store.sizes("chunk-000000/")

Credentials are found as each cloud's own tools find them, in the variables that mosaicml-streaming reads,
too: the AWS variables, profiles and roles (with S3_ENDPOINT_URL for other servers); Google's application
default credentials (STORAGE_EMULATOR_HOST for an emulator); AZURE_ACCOUNT_NAME with AZURE_ACCOUNT_ACCESS_KEY.
Azure's URLs may also be written as mosaicml-streaming does, azure://account/container/folder. Hugging Face's
hub is read-only and uses its own variables HF_TOKEN and HF_ENDPOINT. Requests that fail on the way are
repeated with growing pauses (retry.py).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from unitoken.common.errors import Transient, is_transient
from unitoken.common.urls import without_secrets


class StoreError(OSError):
    """A file or bucket that cannot be read or written. The message holds no secrets of its URLs."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class MissingError(StoreError):
    """The file does not exist."""


class TransientStoreError(StoreError, Transient):
    """The store failed in a way that may go away."""


def store_error(message: str, cause: Exception) -> StoreError:
    """Return a StoreError for an error of the operating system; a transient one if `cause` is transient."""
    return (TransientStoreError if is_transient(cause) else StoreError)(message)


class Store(Protocol):
    """A folder of files. Names are relative to it and use `/`.

    Every method raises StoreError, or MissingError if the file does not exist.
    """

    url: str

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        ...

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, fewer if the file ends before."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it is seekable."""
        ...

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        ...

    def version(self, name: str) -> str:
        """Return a text that changes with the content of a file, as far as known without reading it."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes of all files whose names begin with `prefix`, sorted by name."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: no reader sees a part of it."""
        ...

    def upload(self, path: Path, name: str) -> None:
        """Write a local file as `write` does, and check its size in the store."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        ...


def is_url(name: str) -> bool:
    """Return whether a name is a URL and not a path."""
    return "://" in name


def join(base: str, name: str) -> str:
    """Return `name` relative to the folder or URL `base`; an absolute path or a URL is returned unchanged."""
    if is_url(name):
        return name
    if is_url(base):
        return f"{base.rstrip('/')}/{name}"
    return os.path.join(base, name)  # noqa: PTH118 - keeps what the user wrote; Path would drop './'


def split(name: str) -> tuple[str, str]:
    """Split the path or URL of a file into its folder and its name there."""
    folder, _, file = name.rpartition("/")
    if not is_url(name):
        return (folder or ("/" if name.startswith("/") else ".")), file
    return folder, file


class Ranges(io.RawIOBase):
    """A seekable file over a function that reads ranges; a BufferedReader around it sets the request size.

    Args:
        read: returns the bytes from a start up to an end.
        size: of the file, in bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position on, and return the number of bytes read."""
        end = min(self._size, self._position + len(buffer))
        data = self._read(self._position, end) if self._position < end else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
