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

import contextlib
import errno
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.files import aside_file, publish, write_aside
from unitoken.streaming_data.urls import without_secrets

CLOUDS = ("s3", "gs", "az", "azure", "hf")
PATIENCE = 120.0  # seconds in which a request that fails on the way is repeated


class StoreError(OSError):
    """A file or bucket that can not be read or written, in words without a URL's secrets; MissingError: it is not there at all."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class MissingError(StoreError):
    pass


class Transient(Exception):  # noqa: N818 - a mark of errors, none of its own
    """It may pass: a server that does not answer, a disk that is full."""


class TransientStoreError(StoreError, Transient):
    pass


_TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN}


def is_transient(error: Exception) -> bool:
    """Whether the same again may succeed without anything being mended in what was asked for."""
    if isinstance(error, (Transient, TimeoutError, ConnectionError)):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT


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


@functools.lru_cache(maxsize=256)
def open_store(url: str, endpoint: str | None = None, patience: float = PATIENCE) -> Store:
    """The store behind a path or URL of a folder. Nothing is asked of a server yet.

    Args:
        endpoint: the S3 server; default S3_ENDPOINT_URL, or Amazon's.
        patience: seconds after which a server that does not answer, or not rightly, is an error.

    Raises:
        ConfigError: an unknown scheme, or settings from which no client can be made.
    """
    if not is_url(url):
        return Folder(Path(url))
    scheme = url.partition("://")[0]
    if scheme not in CLOUDS:
        raise ConfigError(f"{url}: expected a path or a URL that begins with s3://, gs://, az:// or hf://")
    from unitoken.streaming_data.clouds import open_bucket

    return open_bucket(url, endpoint, patience)


class Folder:
    """A folder of this machine, made when the first file is written."""

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        self._path = path

    def read(self, name: str) -> bytes:
        with _os_errors():
            return (self._path / name).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> bytes:
        with _os_errors(), open(self._path / name, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open(self, name: str) -> BinaryIO:
        with _os_errors():
            return open(self._path / name, "rb")

    def size(self, name: str) -> int:
        with _os_errors():
            return (self._path / name).stat().st_size

    def version(self, name: str) -> str:
        with _os_errors():
            status = (self._path / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        start = self._path / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self._path).as_posix()
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    if relative.startswith(prefix):
                        found[relative] = path.stat().st_size
        return dict(sorted(found.items()))

    def write(self, name: str, data: bytes) -> None:
        with _os_errors():
            _make((self._path / name).parent)
            write_aside(self._path / name, data)

    def upload(self, path: Path, name: str) -> None:
        target = self._path / name
        with _os_errors():
            _make(target.parent)
            with aside_file(target) as file, open(path, "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
                publish(file, target)  # with fsync: the manifest vouches for it next

    def delete(self, name: str) -> None:
        with _os_errors():
            (self._path / name).unlink(missing_ok=True)


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


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # also where no folder can be: that is no file that is missing
        raise store_error(f"{folder}: cannot be made: {error.strerror}", error) from None


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
