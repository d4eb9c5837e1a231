"""What `Store` promises, made of the six things that every object store can do. clouds.py says how each does them."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from unitoken.common.errors import ConfigError, one_line
from unitoken.storage.store import RETRY_SECONDS, MissingError, Ranges, StoreError, TransientStoreError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0  # at most, for one try
PART_BYTES = 1 << 23  # of what a file opened for reading asks for at once
NO_ANSWER = 0  # in place of an HTTP status

T = TypeVar("T")


class Bucket(ABC):
    """A folder of a bucket. Safe over threads; a forked process makes its own client.

    Failures that may pass are repeated here and not by the libraries: they count in attempts or in seconds, each its
    own way, and S3's repeats no answer that breaks off in the middle.
    """

    def __init__(self, url: str, endpoint: str | None = None, patience: float = RETRY_SECONDS) -> None:
        self.url, self.endpoint, self.patience = url.rstrip("/"), endpoint, patience
        self._bucket, folder = self._locate(self.url.partition("://")[2])
        if not self._bucket:
            raise ConfigError(f"{url}: expected the name of a {self.kind} in it")
        # A server that takes a request and never answers is to be found out by then, too.
        self._timeouts = min(CONNECT_SECONDS, patience / 4), min(READ_SECONDS, patience / 2)
        self._access = ""  # with which credentials, or where they were looked for; for messages
        self._folder = f"{folder}/" if folder else ""
        self._clients: dict[int, Any] = {os.getpid(): self._connected()}  # so that a wrong setting shows here

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.endpoint, self.patience)

    @property
    def _client(self) -> Any:
        process = os.getpid()
        if process not in self._clients:
            self._clients[process] = self._connected()
        return self._clients[process]

    def _connected(self) -> Any:
        try:
            return self._connect()
        except ConfigError:
            raise
        except Exception as error:  # the libraries' errors share no base
            raise ConfigError(f"{self.url}: {_line(error)}") from None

    # What the libraries do differently. `key`: from the bucket's root.

    kind = "bucket"  # what its vendor calls it

    def _locate(self, place: str) -> tuple[str, str]:
        """What follows the scheme of a URL -> the bucket's name, and the folder in it."""
        name, _, folder = place.partition("/")
        return name, folder

    @abstractmethod
    def _connect(self) -> Any:
        """A client. Sets `_access`."""

    @abstractmethod
    def _get(self, key: str, start: int, end: int | None) -> bytes: ...

    @abstractmethod
    def _head(self, key: str) -> tuple[int, str]:
        """Size and version."""

    @abstractmethod
    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys and sizes, page by page."""

    @abstractmethod
    def _put(self, key: str, file: BinaryIO) -> None: ...

    @abstractmethod
    def _remove(self, key: str) -> None: ...

    @abstractmethod
    def _status(self, error: Exception) -> int | None:
        """HTTP status, NO_ANSWER, or None where the error is another."""

    # The verbs of `Store`.

    def read(self, name: str) -> bytes:
        return self._do(name, lambda key: self._span(key, 0, None))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return self._do(name, lambda key: self._span(key, start, end)) if start < end else b""

    def _span(self, key: str, start: int, end: int | None) -> bytes:
        try:
            return self._get(key, start, end)
        except Exception as error:
            if self._status(error) == 416:  # the file ends before `start`, or is empty
                return b""
            raise

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(
            Ranges(functools.partial(self.read_range, name), self.size(name)), PART_BYTES
        )

    def size(self, name: str) -> int:
        return self._do(name, self._head)[0]

    def version(self, name: str) -> str:
        size, version = self._do(name, self._head)
        return f"{size}-{version}"

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = self._do(prefix, lambda key: list(self._list(key)), whole=True)
        return {key.removeprefix(self._folder): size for key, size in sorted(found) if not key.endswith("/")}

    def write(self, name: str, data: bytes) -> None:
        self._do(name, lambda key: self._put(key, io.BytesIO(data)), whole=True)

    def upload(self, path: Path, name: str) -> None:
        def put(key: str) -> None:
            with open(path, "rb") as file:
                self._put(key, file)

        self._do(name, put, whole=True)
        size, expected = self.size(name), path.stat().st_size
        if size != expected:
            self.delete(name)
            raise StoreError(f"{self.url}/{name}: {size} bytes arrived of {expected}")

    def delete(self, name: str) -> None:
        with contextlib.suppress(MissingError):
            self._do(name, self._remove)

    def _do(self, name: str, action: Callable[[str], T], whole: bool = False) -> T:
        """`action` with the key of `name`, again and again until the patience is over, unless it is hopeless.

        whole: the bucket itself is asked, not one of its files: it is what a status of 404 misses.
        """
        end, pause = time.monotonic() + self.patience, FIRST_PAUSE
        where = f"{self.url}/{name}"
        while True:
            try:
                return action(self._folder + name)
            except Exception as error:  # the libraries' errors share no base; _status knows each library's
                status = self._status(error)
                if status is None:
                    if isinstance(error, OSError) and not isinstance(error, StoreError):
                        raise  # of this machine's own files
                    raise StoreError(f"{where}: {_line(error)}") from None
                if status in (401, 403):
                    raise StoreError(f"{where}: permission denied {self._access}") from None
                if status == 404 and whole:
                    raise StoreError(f"{where}: no such bucket: {self._bucket}") from None
                if status == 404:
                    raise MissingError(f"{where}: not there") from None
                passing = status in (NO_ANSWER, 408, 429) or status >= 500
                if not passing or time.monotonic() + pause > end:
                    if passing:
                        raise TransientStoreError(
                            f"{where}: {_line(error)} (tried for {self.patience:.0f} s)"
                        ) from None
                    raise StoreError(f"{where}: {_line(error)}") from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)


def _line(error: Exception) -> str:
    return one_line(error, 300)
