"""Files in a folder of this machine or in an object store, by one small set of verbs.

    store = open_store("s3://bucket/folder")      # or gs://, az://, hf://datasets/owner/name/folder, or a path
    store.write("index.json", data); store.read("index.json"); store.sizes("chunk-000000/")

Credentials come from where each cloud's own tools look for them: the AWS variables, profiles and roles (with
S3_ENDPOINT_URL for other servers), Google's application default credentials (STORAGE_EMULATOR_HOST for an emulator),
AZURE_ACCOUNT_NAME with AZURE_ACCOUNT_ACCESS_KEY: the variables that mosaicml-streaming reads, too. It writes Azure's
URLs as azure://account/container/folder: these are understood as well. Hugging Face's hub is for reading; HF_TOKEN and
HF_ENDPOINT are its own variables. Requests that fail on the way are repeated with growing pauses, for two minutes in all
unless the caller has less patience.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from unitoken.common.errors import Transient, is_transient
from unitoken.common.urls import without_secrets

CLOUDS = ("s3", "gs", "az", "azure", "hf")
RETRY_SECONDS = 120.0  # seconds in which a request that fails on the way is repeated


class StoreError(OSError):
    """A file or bucket that can not be read or written, in words without a URL's secrets; MissingError: it is not there at all."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class MissingError(StoreError):
    pass


class TransientStoreError(StoreError, Transient):
    pass


def store_error(message: str, cause: Exception) -> StoreError:
    """A StoreError for an operating system's error; a transient one where that is."""
    return (TransientStoreError if is_transient(cause) else StoreError)(message)


class Store(Protocol):
    """Names are relative, with `/`, whatever the store. Every verb raises StoreError, or MissingError for no such file."""

    url: str

    def read(self, name: str) -> bytes: ...

    def read_range(self, name: str, start: int, end: int) -> bytes: ...

    def open(self, name: str) -> BinaryIO:
        """For reading, seekable."""
        ...

    def size(self, name: str) -> int: ...

    def version(self, name: str) -> str:
        """Changes when the file's content does, as far as the store can tell without reading it."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every file whose name begins with `prefix`, by name, with its size."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """All of it or nothing: no reader sees a part."""
        ...

    def upload(self, path: Path, name: str) -> None:
        """As `write`, from a file of this machine; its size is checked at the other end."""
        ...

    def delete(self, name: str) -> None:
        """No error if it is not there."""
        ...


def is_url(name: str) -> bool:
    return "://" in name


def join(base: str, name: str) -> str:
    """`name` as seen from the folder or URL `base`; an absolute path or a URL stays what it is."""
    if is_url(name):
        return name
    if is_url(base):
        return f"{base.rstrip('/')}/{name}"
    return os.path.join(base, name)  # noqa: PTH118 - keeps what the user wrote; Path would drop './'


def split(name: str) -> tuple[str, str]:
    """A file's folder and its name there."""
    folder, _, file = name.rpartition("/")
    if not is_url(name):
        return (folder or ("/" if name.startswith("/") else ".")), file
    return folder, file


class Ranges(io.RawIOBase):
    """A file that is read by ranges, as a seekable one; a BufferedReader around it decides how much it asks for at once."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._at + len(buffer))
        data = self._read(self._at, end) if self._at < end else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
