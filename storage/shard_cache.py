"""A host's cache of remote shards: each is downloaded and verified once, and evicted if space is needed.

Every shard that was verified or downloaded has a stamp: a small file in the cache folder that holds the
identity of the shard's file (path, size, time, inode, hashes) and whose time of change is when the shard was
last opened. A file is only evicted if its stamp says "downloaded" and still matches: never data of a stream
without `remote`, never files that somebody copied there.

Any number of processes may share a cache. The locks are the kernel's and are released when their holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from unitoken.common.errors import ConfigError, DataError, Transient, is_transient
from unitoken.common.files import aside, locked, remove_abandoned, write_aside
from unitoken.common.hashing import fingerprint
from unitoken.storage.retry import retry
from unitoken.storage.store import MissingError, Store, StoreError

# For which a store repeats a request: a store that is gone ends training within a minute.
SHARD_RETRY_SECONDS = 40.0
# For a file that arrives corrupt or is reported missing: at 10 % faults, 3 are too few for 10,000 shards.
ATTEMPTS = 6
PAUSE = 0.5  # seconds: the first repetition follows at once, each further one after this much more
PART_BYTES = 1 << 23  # of a request; the store repeats a request that breaks off
LOCKS = 64  # a dataset


class ShardError(DataError):
    """A shard that is missing, unreachable or corrupt."""


class TransientShardError(ShardError, Transient):
    """A shard whose store does not answer. A class, as an error of a loader process keeps only its class."""


class _CorruptError(Exception):
    """A file that arrived damaged."""


def _find_damage(entry: Mapping[str, Any], path: Path) -> str | None:
    """Compare a shard with its entry in the index (`raw_data`); return `missing`, `corrupt: ...` or None."""
    if not path.exists():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"corrupt: {path.stat().st_size} bytes, the index names {entry['bytes']}"
    for algorithm, expected in sorted(entry["hashes"].items())[:1]:  # one is enough
        found = _hash_file(path, algorithm)
        if found != expected:
            return f"corrupt: its {algorithm} is {found}, the index names {expected}"
    return None


def _hash_file(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        if algorithm in hashlib.algorithms_available:
            return hashlib.file_digest(file, algorithm).hexdigest()
        from streaming.base.hashing import get_hash  # the xxhash family

        return str(get_hash(algorithm, file.read()))


def fetch(
    store: Store, name: str, path: Path, find_damage: Callable[[Path], str | None], size: int | None = None
) -> BinaryIO:
    """Download a file atomically; one that arrives damaged, or is reported missing, is downloaded again.

    Args:
        store: where the file is.
        name: of the file in the store.
        path: where to put it.
        find_damage: returns what is wrong with a downloaded file, or None.
        size: of the file in bytes; None looks it up.

    Returns:
        The file, open for reading: it stays readable if another process evicts it at once.

    Raises:
        ShardError: the download failed; the message says why and from where.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return retry(
            lambda: _fetch_once(store, name, path, find_damage, size),
            # Stores are consistent, but a proxy or cache in front of one may not be.
            lambda error: isinstance(error, (MissingError, _CorruptError)),
            [PAUSE * number for number in range(ATTEMPTS - 1)],
        )
    except (MissingError, _CorruptError) as error:
        raise ShardError(str(error)) from None
    except StoreError as error:
        raise (TransientShardError if is_transient(error) else ShardError)(str(error)) from None


def _fetch_once(
    store: Store, name: str, path: Path, find_damage: Callable[[Path], str | None], size: int | None
) -> BinaryIO:
    temporary = aside(path)
    try:
        file = open(temporary, "w+b")  # noqa: SIM115 - returned open
        with contextlib.ExitStack() as on_error:
            on_error.callback(file.close)
            fcntl.flock(file, fcntl.LOCK_EX)
            total = store.size(name) if size is None else size
            for start in range(0, total, PART_BYTES):
                file.write(store.read_range(name, start, min(start + PART_BYTES, total)))
            file.flush()
            if damage := find_damage(temporary):
                raise _CorruptError(f"{store.url}/{name} is {damage}")
            os.replace(temporary, path)
            fcntl.flock(file, fcntl.LOCK_UN)
            file.seek(0)
            on_error.pop_all()
            return file
    finally:
        temporary.unlink(missing_ok=True)


class Cache:
    """The shards of one stream's dataset as local files.

    Args:
        stream: the name of the stream, for messages.
        entries: the shards' entries in the index, in its order.
        store: where missing shards are downloaded from; None if they cannot be.
        folder: where the shards are or will be.
        stamps: the folder with the stamps of all datasets on this host.
        limit: bytes of all downloaded shards with stamps there, without those that are being downloaded;
            None never evicts.
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
                        remove_abandoned(chunk)  # from killed downloads
        except OSError as error:
            raise ConfigError(
                f"the cache folder {error.filename}: {error.strerror}; set `cache` to one of your own"
            ) from None

    def open(self, shard: int) -> BinaryIO:
        """Open a shard that is verified; download it first if it is missing or damaged.

        Raises:
            ShardError: the shard cannot be opened; the message names stream, shard and place.
        """
        entry = self._entries[shard]
        path = self._folder / entry["basename"]
        if file := self._open_verified(shard, path):
            return file
        with locked(self._stamps / f"lock-{shard % LOCKS:02}"):
            if file := self._open_verified(shard, path):  # verified by the process that held the lock
                return file
            damage = _find_damage(entry, path)
            if damage is None:
                file = open(path, "rb")  # noqa: SIM115 - returned open
                self._write_stamp(shard, "found", path, file)
                return file
            if self._store is None:
                raise ShardError(f"stream '{self._stream}': the shard {path} is {damage}")
            return self._download(shard, path, self._store)

    def _download(self, shard: int, path: Path, store: Store) -> BinaryIO:
        entry = self._entries[shard]
        name = entry["basename"]
        path.unlink(missing_ok=True)
        if self._limit is not None:
            self._make_room(entry["bytes"], self._limit)
        try:
            file = fetch(
                store, name, path, lambda downloaded: _find_damage(entry, downloaded), entry["bytes"]
            )
        except ShardError as error:
            raise type(error)(
                f"stream '{self._stream}': the shard {name} cannot be downloaded: {error}"
            ) from None
        self.downloads += 1
        self._write_stamp(shard, "downloaded", path, file)
        return file

    def _open_verified(self, shard: int, path: Path) -> BinaryIO | None:
        """Open a shard whose file has a matching stamp."""
        for kind in ("found", "downloaded"):
            stamp = self._stamp_path(shard, kind)
            with contextlib.suppress(FileNotFoundError):
                content = stamp.read_text()
                file = open(path, "rb")  # noqa: SIM115 - returned open
                if content == _identity(path, os.fstat(file.fileno()), self._entries[shard]["hashes"]):
                    os.utime(stamp)
                    return file
                file.close()
        return None

    def _stamp_path(self, shard: int, kind: str) -> Path:
        """Return the path of a stamp; `_make_room` reads the size from its name."""
        return self._stamps / f"{shard:06}-{self._entries[shard]['bytes']}-{kind}"

    def _write_stamp(self, shard: int, kind: str, path: Path, file: BinaryIO) -> None:
        identity = _identity(path, os.fstat(file.fileno()), self._entries[shard]["hashes"])
        write_aside(self._stamp_path(shard, kind), identity.encode())

    def _make_room(self, needed: int, limit: int) -> None:
        """Evict the shards that were opened longest ago until `needed` more bytes are within the limit."""
        with locked(self._all_stamps / "lock"):
            stamps = []
            for stamp in self._all_stamps.glob("*/*-downloaded"):
                with contextlib.suppress(FileNotFoundError):
                    stamps.append((stamp.stat().st_mtime_ns, int(stamp.name.split("-")[1]), stamp))
            total = sum(size for _, size, _ in stamps) + needed
            for _, size, stamp in sorted(stamps):
                if total <= limit:
                    break
                _evict(stamp)
                total -= size


def _evict(stamp: Path) -> None:
    """Delete a stamp and its shard; keep a file that is not the one that the stamp was written for."""
    with contextlib.suppress(FileNotFoundError):
        identity = stamp.read_text()
        path = Path(identity.partition("\0")[0])
        if stamp.stat().st_uid == os.getuid() and identity.startswith(_identity(path, path.stat(), None)):
            path.unlink()
    stamp.unlink(missing_ok=True)


def _identity(path: Path, status: os.stat_result, hashes: Mapping[str, str] | None) -> str:
    """Return a text that changes when another file replaces this one. None leaves out the hashes."""
    identity = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0"
    return identity if hashes is None else f"{identity}{sorted(hashes.items())}"
