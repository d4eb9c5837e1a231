"""A run in a bucket: `save.folder` is a URL, and each machine works in a folder of its own (`data.cache`).

The bucket decides: a start brings the newest complete checkpoint and the small files of the run into that
folder, and removes all else from it. While the run goes on, files follow into the bucket in the background:
each rank's as soon as it is written, then the small files, then the index, without which a checkpoint is
incomplete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from unitoken.common.cli import notify, warn
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE, aside_file, exclusive_lock, locked, publish
from unitoken.common.hashing import fingerprint, sha256_of_file
from unitoken.storage.open import open_store
from unitoken.storage.store import is_url
from unitoken.streaming_data.settings import default_cache_folder
from unitoken.train.checkpoint.locations import INDEX, LATEST, LOCK, latest_checkpoint
from unitoken.train.checkpoint.sharded_index import read_checkpoint_index
from unitoken.train.config import StageConfig

CHUNK_BYTES = 1 << 24
_CHECKPOINT_FILE = re.compile(r"(step-\d{8,})/(.+)")
_GROWING = ("samples/", "suite/", "tensorboard/")  # an equal size is an equal file


def working_folder(config: StageConfig) -> Path:
    """Return the folder in which a run works: `save.folder`, or one of this machine if that is a URL."""
    if not is_url(config.save.folder):
        return Path(config.save.folder)
    return config.data.cache_folder / "runs" / fingerprint(config.save.folder.rstrip("/").encode())


def bucket_of(config: StageConfig) -> BucketRun | None:
    """Return the bucket that a run is saved to; None if `save.folder` is a folder."""
    return BucketRun(config.save.folder, working_folder(config)) if is_url(config.save.folder) else None


def local_origin(source: str, cache: Path | None = None) -> str:
    """Return the path of what `init_from`, `generate` and `export` take; of a URL that of its copy here.

    Args:
        source: what `find_origin` takes, or the URL of a run's folder.
        cache: the folder for copies; None: the default of `data.cache`.
    """
    if not is_url(source):
        return source
    return str((cache or default_cache_folder()) / "origins" / fingerprint(source.rstrip("/").encode()))


def fetch_origin(source: str, cache: Path | None = None) -> str:
    """Return what `local_origin` returns, after fetching the newest checkpoint of a run in a bucket.

    Raises:
        StoreError: the bucket can not be read.
        ConfigError: it holds no complete checkpoint.
    """
    origin = local_origin(source, cache)
    if is_url(source):
        BucketRun(source, Path(origin)).fetch()
        if latest_checkpoint(Path(origin)) is None:
            raise ConfigError(f"{source}: no complete checkpoint in it; expected the URL of a run's folder")
    return origin


def fetch_logs(source: str) -> Path:
    """Return the folder of a run; of one in a bucket, a copy of its small files without any checkpoint.

    Raises:
        StoreError: the bucket can not be read.
    """
    folder = Path(local_origin(source))
    if is_url(source):
        BucketRun(source, folder).fetch_small_files()
    return folder


class BucketRun:
    """A run's folder in a bucket, and this machine's working folder.

    Args:
        url: of the run's folder.
        folder: the working folder.

    Raises:
        ConfigError: the URL is of no store, or settings are missing that its client needs.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self._store = open_store(url)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the small files that were sent

    # At the start.

    def fetch(self) -> None:
        """Make the working folder what the bucket holds: the newest complete checkpoint, and small files.

        Every rank calls it; those of a machine take turns, and only the first of them finds work.

        Raises:
            StoreError: the bucket can not be read.
            ConfigError: all checkpoints are damaged, or another run is at work in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        at_work = f"save.folder: {self.url}: another run of it is at work on this machine"
        with (
            locked(self.folder.with_name(f"{self.folder.name}.fetch")),
            exclusive_lock(self.folder / LOCK, at_work),
        ):
            sizes = self._store.sizes()
            newest = self._fetch_newest(_complete(sizes))
            self._remove_others(_small(sizes), newest)
            self.fetch_small_files()

    def fetch_small_files(self) -> None:
        """Bring the files of the run that belong to no checkpoint. Raises StoreError."""
        for name, size in _small(self._store.sizes()).items():
            if not (name.startswith(_GROWING) and _size(self.folder / name) == size):
                self._download(name)

    def _fetch_newest(self, complete: list[str]) -> str | None:
        """Fetch the newest checkpoint that is not damaged; return its name, or None if there is none."""
        damages = []
        for name in reversed(complete):
            damage = self.fetch_checkpoint(name)
            if damage is None:
                return name
            damages.append(f"{self.url}/{name}: damaged: {damage}")
            if os.environ.get("RANK", "0") == "0":
                warn(f"{damages[-1]}; looks at the one before")
        if damages:
            raise ConfigError(f"{damages[0]}; there is no other to resume from: remove it to start again")
        return None

    def fetch_checkpoint(self, name: str) -> str | None:
        """Fetch a checkpoint; return what is wrong with it, or None."""
        self._download(f"{name}/{INDEX}")
        try:
            files = read_checkpoint_index(self.folder / name).files
        except ConfigError as error:
            return str(error)
        for file in files:
            path = self.folder / name / file.name
            is_here = _size(path) == file.bytes
            # The first rank of a machine reads its file; those after it find what it has left.
            if is_here and os.environ.get("LOCAL_RANK", "0") == "0":
                is_here = sha256_of_file(path) == file.sha256
            if not is_here:
                notify(f"{self.url}/{name}/{file.name}: downloading {file.bytes / 1e9:.1f} GB")
                if self._download(f"{name}/{file.name}") != file.sha256:
                    path.unlink()
                    return f"the SHA-256 of {file.name} differs"
        return None

    def _remove_others(self, small: dict[str, int], newest: str | None) -> None:
        """Remove what a run of before has left in the working folder, and the bucket does not hold."""
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith("step-") and path.is_dir() and path.name != newest:
                shutil.rmtree(path)
            elif path.name == LATEST:
                path.unlink()
        for name, path in self._small_files():
            if name not in small:
                path.unlink()

    def _download(self, name: str) -> str:
        """Fetch a file, and return its SHA-256."""
        path, digest = self.folder / name, hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._store.open(name) as source, aside_file(path) as target:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
            publish(target, path)
        return digest.hexdigest()

    # While the run goes on.

    def remove_unfinished(self, step: str | None) -> None:
        """Remove incomplete checkpoints, and those that are newer than the one that a run resumes from."""
        sizes = self._store.sizes("step-")
        for name in _complete(sizes):
            if step is None or name > step:
                self._remove(name, sizes)
        kept = set(_complete(self._store.sizes("step-")))
        for file in self._store.sizes("step-"):
            match = _CHECKPOINT_FILE.fullmatch(file)
            if match and match[1] not in kept:
                self._store.delete(file)

    def send(self, path: Path) -> None:
        """Send a file of the working folder. Raises StoreError."""
        self._store.upload(path, path.relative_to(self.folder).as_posix())

    def send_small_files(self) -> None:
        """Send the small files that have changed since they were sent. Raises StoreError."""
        for name, path in self._small_files():
            status = path.stat()
            version = status.st_size, status.st_mtime_ns
            if self._sent.get(name) != version:
                self._send_copy(path, name)
                self._sent[name] = version

    def _send_copy(self, path: Path, name: str) -> None:
        """Send a file as it is now: training goes on and makes metrics longer, and a store checks sizes."""
        with open(path, "rb") as source, aside_file(path) as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            self._store.upload(Path(copy.name), name)

    def publish(self, checkpoint: Path, keep: int) -> None:
        """Complete a checkpoint, whose other files were sent, and remove all but the newest ones."""
        self.send_small_files()
        self.send(checkpoint / INDEX)
        sizes = self._store.sizes("step-")
        for name in _complete(sizes)[:-keep]:
            if name != checkpoint.name:
                self._remove(name, sizes)

    def _remove(self, name: str, sizes: dict[str, int]) -> None:
        """Remove a checkpoint, its index first, so that it is never complete without a file."""
        self._store.delete(f"{name}/{INDEX}")
        for file in sizes:
            if file.startswith(f"{name}/"):
                self._store.delete(file)

    def _small_files(self) -> Iterator[tuple[str, Path]]:
        """Yield names and paths of the files of the run that belong to no checkpoint."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            is_own = name.startswith(("step-", "damaged-")) or path.name.startswith(ASIDE) or name == LOCK
            if not is_own and path.is_file() and not path.is_symlink():
                yield name, path


def _small(sizes: dict[str, int]) -> dict[str, int]:
    """Return the files in a listing that belong to no checkpoint."""
    return {name: size for name, size in sizes.items() if not _CHECKPOINT_FILE.fullmatch(name)}


def _complete(sizes: dict[str, int]) -> list[str]:
    """Return the names of the complete checkpoints in a listing, the oldest first."""
    names = [match[1] for name in sizes if (match := _CHECKPOINT_FILE.fullmatch(name)) and match[2] == INDEX]
    return sorted(names, key=lambda name: (len(name), name))


def _size(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None
