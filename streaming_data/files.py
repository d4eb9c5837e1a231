"""Write aside, then rename: what bears its real name is whole.

A process holds a lock on what it writes aside, and its death gives the lock back, however it died: so what a killed
run left behind can be told from what another run is writing just now (`remove_abandoned`).
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

ASIDE = ".aside-"


def aside(path: Path) -> Path:
    """A name beside `path` that no other process uses; hidden, and recognised by its prefix."""
    return path.with_name(f"{ASIDE}{path.name}-{uuid.uuid4().hex[:12]}")


def write_aside(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees all of it or nothing."""
    temporary = aside(path)
    try:
        with open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class AsideFolder:
    """A folder to fill aside and then `publish`; what is not published is removed at the end.

    with AsideFolder(Path("out/chunk-000003")) as folder:
        ...  # write into folder.path
        folder.publish()
    """

    def __init__(self, path: Path) -> None:
        self._target = path
        self.path = aside(path)

    def __enter__(self) -> AsideFolder:
        self._lock = open(_lock_of(self.path), "wb")  # held until __exit__
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path.mkdir()
        return self

    def sync(self) -> None:
        """Bring to the disk what was written, which may take a while; `publish` then takes none."""
        for file in self.path.rglob("*"):
            _sync(file)
        _sync(self.path)

    def publish(self) -> None:
        """Give the folder its name. Where another run was faster its folder stays: both hold the same."""
        self.sync()
        try:
            self.path.rename(self._target)
        except OSError:
            if not self._target.is_dir():
                raise
        _sync(self._target.parent)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        _lock_of(self.path).unlink(missing_ok=True)
        self._lock.close()


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove what killed processes left aside in `folder` (of `name` only), and leave alone what is being written."""
    for path in sorted(folder.glob(f"{ASIDE}{f'{glob.escape(name)}-' if name else ''}*")):  # a folder before its lock
        if _is_abandoned(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        if time.time() - path.stat().st_mtime < 1:
            return False  # perhaps just made and not yet locked
        with open(_lock_of(path) if path.is_dir() else path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return path.is_dir()  # a file's writer has just finished; a folder never is without its lock
    return True


def _lock_of(folder: Path) -> Path:
    """Beside the folder: NFS locks nothing that is not open for writing, and a folder can not be."""
    return folder.with_name(f"{folder.name}.lock")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread. The kernel frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
