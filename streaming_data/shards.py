"""Shards of a dataset: present, verified and quick to read. All that touches private parts of mosaicml-streaming.

Why not upstream's own reading: it takes a file lock and opens a file for each sample (1k to 2k samples/s where a
memory-map gives 35k), a hash mismatch raises once and leaves the corrupt file to be read by the next start, one missing
shard ends a background thread without a word, and its host-wide shared memory collides between jobs.

A shard is verified against its hash once a host: an empty file, named by path, size, time and hash, records it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.files import aside, locked
from unitoken.streaming_data.manifest import INDEX

DOWNLOAD_TIMEOUT = 60.0  # seconds; upstream's default
ATTEMPTS = 2
MOST_OPEN = 4096  # memory-maps a process; Linux allows 65,530


class ShardError(RuntimeError):
    """A shard that is missing, unreachable or corrupt."""


class Downloader:
    """Files below one remote folder, by streaming's own clients. Not kept over a fork: clients hold sockets."""

    def __init__(self, remote: str) -> None:
        from streaming.base.storage.download import CloudDownloader

        self.remote = remote
        try:
            self._client = CloudDownloader.get(remote)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def fetch(self, basename: str, path: Path) -> None:
        """Download to `path`, which must not exist. Raises ShardError after ATTEMPTS."""
        source = f"{self.remote}/{basename}"
        for attempt in range(ATTEMPTS):
            try:
                self._client.download(source, str(path), DOWNLOAD_TIMEOUT)
                return
            except Exception as error:  # each client has its own kinds
                path.unlink(missing_ok=True)
                failure = error
                if isinstance(error, FileNotFoundError):
                    break
                if attempt + 1 < ATTEMPTS:
                    time.sleep(1.0)
        raise ShardError(f"cannot download {source}: {type(failure).__name__}: {failure}") from failure

    def fetch_checked(self, basename: str, path: Path, wrong: Callable[[Path], str | None]) -> None:
        """Download, check, rename to `path`. What `wrong` objects to is deleted and downloaded again, once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(ATTEMPTS):
            temporary = aside(path)
            try:
                self.fetch(basename, temporary)
                objection = wrong(temporary)
                if objection is None:
                    os.replace(temporary, path)
                    return
            finally:
                temporary.unlink(missing_ok=True)
        raise ShardError(f"{self.remote}/{basename} is {objection}")

    def clean_up(self) -> None:
        self._client.clean_up()


def what_is_wrong(entry: dict[str, Any], path: Path) -> str | None:
    """`missing` or `corrupt: ...` for a shard that is not as its entry in the index (`raw_data`) says; else None."""
    if not path.exists():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"corrupt: {path.stat().st_size} bytes, the index names {entry['bytes']}"
    for algorithm, expected in sorted(entry["hashes"].items())[:1]:  # one is enough
        found = _file_hash(path, algorithm)
        if found != expected:
            return f"corrupt: its {algorithm} is {found}, the index names {expected}"
    return None


def _file_hash(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        if algorithm in hashlib.algorithms_available:
            return hashlib.file_digest(file, algorithm).hexdigest()
        from streaming.base.hashing import get_hash  # the xxhash family

        return str(get_hash(algorithm, file.read()))


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The shards' entries in `folder/index.json`. Raises ConfigError for what is no index, or not one we may follow."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        entries: list[dict[str, Any]] = index["shards"]
        for entry in entries:
            basename = entry["raw_data"]["basename"]
            parts = PurePosixPath(basename).parts
            if not parts or ".." in parts or basename.startswith("/") or "\\" in basename or "\0" in basename:
                raise ConfigError(f"{path}: the shard name {basename!r} leads out of the folder")
            if entry["format"] != "mds" or entry["zip_data"] or entry["version"] != 2:
                raise ConfigError(
                    f"{path}: {basename}: expected uncompressed MDS version 2, found {entry['format']}, {entry['compression']}"
                )
            _ = int(entry["samples"]), int(entry["raw_data"]["bytes"]), dict(entry["raw_data"]["hashes"])
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not an MDS index: {type(error).__name__}: {error}") from None
    return entries


class Shards:
    """The shards of one dataset. Several processes and threads may use the same folder."""

    def __init__(self, folder: Path, remote: str | None, cache: Path) -> None:
        from streaming.base.format import reader_from_json

        self.folder, self.remote = folder, remote
        self._verified = cache / "verified"
        self.entries = read_index(folder)
        self.samples = np.array([entry["samples"] for entry in self.entries], np.int64)
        self.readers: list[Any] = [reader_from_json(str(folder), None, entry) for entry in self.entries]
        for reader in self.readers:
            reader.validate(allow_unsafe_types=False)  # pickled columns run code
        self._open: dict[int, tuple[mmap.mmap, Any]] = {}
        self._downloader: tuple[int, Downloader] | None = None
        if remote is None:  # what is missing is missing for good: say so before training begins
            for entry in self.entries:
                path, size = folder / entry["raw_data"]["basename"], entry["raw_data"]["bytes"]
                if not path.exists() or path.stat().st_size != size:
                    what = f"corrupt: {path.stat().st_size} bytes" if path.exists() else "missing"
                    raise ConfigError(f"the shard {path} is {what}, {INDEX} lists it with {size} bytes")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_downloader": None}

    def sample(self, shard: int, index: int) -> dict[str, Any]:
        """Sample `index` of shard `shard`, decoded; downloads and verifies the shard first if that was not done yet."""
        data, offsets = self._open.get(shard) or self._map(shard)
        sample: dict[str, Any] = self.readers[shard].decode_sample(data[offsets[index] : offsets[index + 1]])
        return sample

    def prepare(self, shard: int) -> Path:
        """The path of a shard that is there and matches its hash. Raises ShardError, naming it, where that can't be had."""
        entry = self.entries[shard]["raw_data"]
        path: Path = self.folder / entry["basename"]
        if not self._is_verified(entry, path):
            key = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
            with locked(self._verified / f"{key}.lock"):
                if not self._is_verified(entry, path):  # by the process that held the lock
                    self._make_good(entry, path)
                    self._stamp(entry, path).touch()
        return path

    def _make_good(self, entry: dict[str, Any], path: Path) -> None:
        wrong = what_is_wrong(entry, path)
        if wrong is None:
            return
        if self.remote is None:
            raise ShardError(f"the shard {path} is {wrong}")
        path.unlink(missing_ok=True)
        if self._downloader is None or self._downloader[0] != os.getpid():
            self._downloader = os.getpid(), Downloader(self.remote)
        self._downloader[1].fetch_checked(entry["basename"], path, lambda new: what_is_wrong(entry, new))

    def _stamp(self, entry: dict[str, Any], path: Path) -> Path:
        """The file that says: this very file was verified on this host."""
        status = path.stat()
        identity = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0{entry['hashes']}"
        return self._verified / hashlib.sha256(identity.encode()).hexdigest()[:32]

    def _is_verified(self, entry: dict[str, Any], path: Path) -> bool:
        try:
            return self._stamp(entry, path).exists()
        except FileNotFoundError:
            return False

    def _map(self, shard: int) -> tuple[mmap.mmap, Any]:
        path = self.prepare(shard)
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.frombuffer(data, "<u4", 1)[0])
        if count != self.samples[shard]:
            raise ShardError(f"the shard {path} is corrupt: it holds {count} samples, {INDEX} names {self.samples[shard]}")
        if len(self._open) >= MOST_OPEN:
            del self._open[next(iter(self._open))]
        # Offsets as Python ints: slicing a map with numpy integers takes twice as long.
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        self._open[shard] = data, offsets
        return self._open[shard]
