"""What of a dataset lies on this host: shards are downloaded once, verified once, and evicted when they take too much room.

A shard that was verified, or downloaded, has a stamp: a small file in the cache folder that says which file it was (path,
size, time, inode, hashes) and by its own time of change when it was last opened. Only what has a stamp as downloaded is
ever evicted, and only while it is the very file that was: never data of a stream without `remote`, never what somebody put there.

Any number of processes may share a cache. Locks are the kernel's, and go with their holder however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from unitoken.common.errors import ConfigError, DataError, Transient, is_transient
from unitoken.common.files import aside, locked, remove_abandoned, write_aside
from unitoken.common.hashing import fingerprint
from unitoken.storage.store import MissingError, Store, StoreError

SHARD_RETRY_SECONDS = 40.0  # seconds; a store that is gone ends training within a minute
ATTEMPTS = 6  # for a file that arrives corrupt, or is said to be missing: of 10,000 with 10 % faults three are not enough
PAUSE = 0.5  # seconds before a missing file is asked for again, and longer each time
PART_BYTES = 1 << 23  # a request: what breaks off is asked for again in parts of this size
LOCKS = 64  # a dataset


class ShardError(DataError):
    """A shard that is missing, unreachable or corrupt."""


class TransientShardError(ShardError, Transient):
    """Its store does not answer. A class, as that is what comes through from a loader's process."""


def what_is_wrong(entry: Mapping[str, Any], path: Path) -> str | None:
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


def fetch(
    store: Store, name: str, path: Path, wrong: Callable[[Path], str | None], size: int | None = None
) -> BinaryIO:
    """Download `name` aside, check it, give it its `path`; what `wrong` objects to is deleted and downloaded again.

    Returns:
        The file, open for reading: it stays readable if another process evicts it at once.

    Raises:
        ShardError: it can not be had; the message says why and from where.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    failure: object = None
    for attempt in range(ATTEMPTS):
        temporary = aside(path)
        try:
            file = open(temporary, "w+b")  # noqa: SIM115 - returned open
            with contextlib.ExitStack() as stack:
                stack.callback(file.close)
                fcntl.flock(file, fcntl.LOCK_EX)
                total = store.size(name) if size is None else size
                for begin in range(0, total, PART_BYTES):
                    file.write(store.read_range(name, begin, min(begin + PART_BYTES, total)))
                file.flush()
                failure = wrong(temporary)
                if failure is None:
                    os.replace(temporary, path)
                    fcntl.flock(file, fcntl.LOCK_UN)
                    file.seek(0)
                    stack.pop_all()
                    return file
                failure = f"{store.url}/{name} is {failure}"
        except MissingError as error:  # stores are consistent, but what stands before them may not be
            failure = error
            time.sleep(PAUSE * attempt)
        except StoreError as error:
            raise (TransientShardError if is_transient(error) else ShardError)(str(error)) from None
        finally:
            temporary.unlink(missing_ok=True)
    raise ShardError(str(failure))


class Cache:
    """The shards of one stream's dataset as files of this host.

    Args:
        entries: the index's, in its order.
        store: where missing shards come from; None: nowhere.
        folder: where the shards are to lie.
        stamps: of all datasets on this host.
        limit: bytes that all downloaded shards with stamps there may take; those being downloaded come on top.
    """

    def __init__(
        self,
        stream: str,
        entries: Sequence[Mapping[str, Any]],
        store: Store | None,
        folder: Path,
        stamps: Path,
        limit: int | None,
    ) -> None:
        self.downloads = 0  # by this process
        self._stream, self._entries, self._store = stream, [entry["raw_data"] for entry in entries], store
        self._folder, self._all_stamps, self._limit = folder, stamps, limit
        self._stamps = stamps / fingerprint(str(folder.absolute()).encode())
        try:
            self._stamps.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self._stamps)
            if store is not None:
                for chunk in {(folder / entry["basename"]).parent for entry in self._entries}:
                    if chunk.is_dir():
                        remove_abandoned(chunk)  # what killed downloads left
        except OSError as error:
            raise ConfigError(
                f"the cache folder {error.filename}: {error.strerror}; set `cache` to one of your own"
            ) from None

    def open(self, shard: int) -> BinaryIO:
        """A shard, there and as the index says it is. Raises ShardError, naming stream, shard and place, where it can't be had."""
        entry = self._entries[shard]
        path = self._folder / entry["basename"]
        if file := self._open_verified(shard, path):
            return file
        with locked(self._stamps / f"lock-{shard % LOCKS:02}"):
            if file := self._open_verified(shard, path):  # by the process that held the lock
                return file
            wrong = what_is_wrong(entry, path)
            if wrong is None:
                file = open(path, "rb")  # noqa: SIM115 - returned open
                self._stamp(shard, "found", path, file)
                return file
            if self._store is None:
                raise ShardError(f"stream '{self._stream}': the shard {path} is {wrong}")
            path.unlink(missing_ok=True)
            if self._limit is not None:
                self._make_room(entry["bytes"])
            try:
                file = fetch(
                    self._store,
                    entry["basename"],
                    path,
                    lambda new: what_is_wrong(entry, new),
                    entry["bytes"],
                )
            except ShardError as error:
                raise type(error)(
                    f"stream '{self._stream}': the shard {entry['basename']} can not be had: {error}"
                ) from None
            self.downloads += 1
            self._stamp(shard, "downloaded", path, file)
            return file

    def _open_verified(self, shard: int, path: Path) -> BinaryIO | None:
        for kind in ("found", "downloaded"):
            stamp = self._stamps / self._stamp_name(shard, kind)
            with contextlib.suppress(FileNotFoundError):
                content = stamp.read_text()
                file = open(path, "rb")  # noqa: SIM115 - returned open
                if content == _identity(path, os.fstat(file.fileno()), self._entries[shard]["hashes"]):
                    os.utime(stamp)
                    return file
                file.close()
        return None

    def _stamp_name(self, shard: int, kind: str) -> str:
        return f"{shard:06}-{self._entries[shard]['bytes']}-{kind}"

    def _stamp(self, shard: int, kind: str, path: Path, file: BinaryIO) -> None:
        identity = _identity(path, os.fstat(file.fileno()), self._entries[shard]["hashes"])
        write_aside(self._stamps / self._stamp_name(shard, kind), identity.encode())

    def _make_room(self, wanted: int) -> None:
        """Evict what was opened longest ago until `wanted` more bytes are within the limit, or nothing is left to evict."""
        assert self._limit is not None
        with locked(self._all_stamps / "lock"):
            stamps = []
            for stamp in self._all_stamps.glob("*/*-downloaded"):
                with contextlib.suppress(FileNotFoundError):
                    stamps.append((stamp.stat().st_mtime_ns, int(stamp.name.split("-")[1]), stamp))
            total = sum(size for _, size, _ in stamps) + wanted
            for _, size, stamp in sorted(stamps):
                if total <= self._limit:
                    break
                _evict(stamp)
                total -= size


def _evict(stamp: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        identity = stamp.read_text()
        path = Path(identity.partition("\0")[0])
        if stamp.stat().st_uid == os.getuid() and identity.startswith(_identity(path, path.stat(), None)):
            path.unlink()
    stamp.unlink(missing_ok=True)


def _identity(path: Path, status: os.stat_result, hashes: Any) -> str:
    """Of a very file: what was put in its place has another."""
    identity = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0"
    return identity if hashes is None else f"{identity}{sorted(hashes.items())}"
