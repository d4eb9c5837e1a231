"""The methods of `Store` over six basic operations, which a subclass for each cloud implements."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from unitoken.common.errors import ConfigError, one_line
from unitoken.storage.retry import pauses_until, retry
from unitoken.storage.store import MissingError, Ranges, StoreError, TransientStoreError

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0  # the longest timeouts of one request
PART_BYTES = 1 << 23  # of a request, for a file that is opened for reading
NO_ANSWER = 0  # in place of an HTTP status

T = TypeVar("T")


class Bucket(ABC):
    """A folder of a bucket. Thread-safe; a forked process creates its own client.

    Transient errors are retried here and not by the libraries: these count attempts or seconds, each in its
    own way, and S3's does not retry an answer that breaks off in the middle.

    Args:
        url: of the folder.
        endpoint: the address of the server, where a cloud supports others than its own.
        patience: seconds for which a failing request is repeated.
    """

    kind = "bucket"  # what the vendor calls it

    def __init__(self, url: str, endpoint: str | None, patience: float) -> None:
        self.url, self.endpoint, self.patience = url.rstrip("/"), endpoint, patience
        self._bucket, folder = self._locate(self.url.partition("://")[2])
        if not self._bucket:
            raise ConfigError(f"{url}: expected the name of a {self.kind} in it")
        # Connect and read. A server that accepts a request and never answers must be noticed within the
        # patience.
        self._timeouts = min(CONNECT_SECONDS, patience / 4), min(READ_SECONDS, patience / 2)
        self._access = ""  # which credentials were used, or where they were looked for; for messages
        self._folder = f"{folder}/" if folder else ""
        # By process id. The first one is created now, so that a wrong setting is an error here.
        self._clients: dict[int, Any] = {os.getpid(): self._new_client()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.endpoint, self.patience)

    @property
    def _client(self) -> Any:
        process = os.getpid()
        if process not in self._clients:
            self._clients[process] = self._new_client()
        return self._clients[process]

    def _new_client(self) -> Any:
        try:
            return self._connect()
        except ConfigError:
            raise
        except Exception as error:  # the libraries' errors share no base class
            raise ConfigError(f"{self.url}: {one_line(error, 300)}") from None

    # The operations of a cloud's library. A `key` is a name relative to the root of the bucket.

    def _locate(self, path: str) -> tuple[str, str]:
        """Split a URL without its scheme into the name of the bucket and the folder in it."""
        name, _, folder = path.partition("/")
        return name, folder

    @abstractmethod
    def _connect(self) -> Any:
        """Create a client, and set `_access`."""

    @abstractmethod
    def _get(self, key: str, start: int, end: int | None) -> bytes:
        """Read a range; `end` None reads to the end of the file."""

    @abstractmethod
    def _head(self, key: str) -> tuple[int, str]:
        """Return the size and version of a file."""

    @abstractmethod
    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield keys and sizes, page by page."""

    @abstractmethod
    def _put(self, key: str, file: BinaryIO) -> None:
        """Write a file."""

    @abstractmethod
    def _remove(self, key: str) -> None:
        """Delete a file."""

    @abstractmethod
    def _status(self, error: Exception) -> int | None:
        """Return the HTTP status of a library's error, NO_ANSWER if it has none, or None for other errors."""

    # The methods of `Store`.

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return self._request(name, lambda key: self._get_range(key, 0, None))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, fewer if the file ends before."""
        return self._request(name, lambda key: self._get_range(key, start, end)) if start < end else b""

    def _get_range(self, key: str, start: int, end: int | None) -> bytes:
        try:
            return self._get(key, start, end)
        except Exception as error:
            if self._status(error) == 416:  # the file ends before `start`, or is empty
                return b""
            raise

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it is seekable."""
        read_range = functools.partial(self.read_range, name)
        return io.BufferedReader(Ranges(read_range, self.size(name)), PART_BYTES)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self._request(name, self._head)[0]

    def version(self, name: str) -> str:
        """Return a text that changes with the content of a file."""
        size, version = self._request(name, self._head)
        return f"{size}-{version}"

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes of all files whose names begin with `prefix`, sorted by name."""
        found = self._request(prefix, lambda key: list(self._list(key)), missing="bucket")
        return {key.removeprefix(self._folder): size for key, size in sorted(found) if not key.endswith("/")}

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        self._request(name, lambda key: self._put(key, io.BytesIO(data)), missing="bucket")

    def upload(self, path: Path, name: str) -> None:
        """Write a local file atomically, and check its size in the bucket."""

        def put(key: str) -> None:
            with open(path, "rb") as file:
                self._put(key, file)

        self._request(name, put, missing="bucket")
        size, expected = self.size(name), path.stat().st_size
        if size != expected:
            self.delete(name)
            raise StoreError(f"{self.url}/{name}: {size} bytes arrived of {expected}")

    def delete(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        with contextlib.suppress(MissingError):
            self._request(name, self._remove)

    def _request(self, name: str, action: Callable[[str], T], missing: str = "file") -> T:
        """Call `action` with the key of `name`; retry transient errors until the patience is over.

        Args:
            name: of a file, or a prefix of names.
            action: sends the request; its argument is the key.
            missing: what a status of 404 means: that the "file" or that the "bucket" does not exist.
        """
        where = f"{self.url}/{name}"

        def attempt() -> T:
            try:
                return action(self._folder + name)
            except Exception as error:  # the libraries' errors share no base class
                status = self._status(error)
                is_local = status is None and isinstance(error, OSError) and not isinstance(error, StoreError)
                if is_local:  # for example a file to upload that does not exist
                    raise
                raise self._store_error(error, status, where, missing) from None

        try:
            return retry(
                attempt,
                lambda error: isinstance(error, TransientStoreError),
                pauses_until(time.monotonic() + self.patience),
            )
        except TransientStoreError as error:
            raise TransientStoreError(f"{error} (tried for {self.patience:.0f} s)") from None

    def _store_error(self, error: Exception, status: int | None, where: str, missing: str) -> StoreError:
        """Translate a library's error; a transient one may go away if the request is repeated."""
        if status in (401, 403):
            return StoreError(f"{where}: permission denied {self._access}")
        if status == 404 and missing == "bucket":
            return StoreError(f"{where}: no such bucket: {self._bucket}")
        if status == 404:
            return MissingError(f"{where}: not there")
        message = f"{where}: {one_line(error, 300)}"
        if status is not None and (status in (NO_ANSWER, 408, 429) or status >= 500):
            return TransientStoreError(message)
        return StoreError(message)
