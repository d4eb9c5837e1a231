"""Atomic writes: a file or folder is written under a temporary name beside its target ("aside") and renamed.

Whatever has its real name is therefore complete. A process locks what it writes aside, and the kernel
releases the lock when the process dies in any way: this distinguishes what a killed run left behind from what
another run is writing now (`remove_abandoned`).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import getpass
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from unitoken.common.errors import ConfigError

ASIDE = ".aside-"  # the prefix of temporary names
LONGEST_SOCKET_PATH = 107  # bytes, on Linux
_ASIDE_NAME = re.compile(r"\.aside-.+-[0-9a-f]{12}(\.lock)?")  # as `aside` makes them
_SECONDS_TO_LOCK = 1.0  # a younger file may have been created and not yet locked

# (process id, folder) of every folder that was cleaned; with the process id, as a fork is another process.
_cleaned_folders: set[tuple[int, Path]] = set()


def aside(path: Path) -> Path:
    """Return a temporary name beside `path` that no other process uses; hidden, and recognised by its prefix.

    The first call of a process for a folder also removes what dead processes left in that folder.
    """
    key = os.getpid(), path.parent
    if key not in _cleaned_folders:
        _cleaned_folders.add(key)
        remove_abandoned(path.parent)
    return path.with_name(f"{ASIDE}{path.name}-{uuid.uuid4().hex[:12]}")


@contextlib.contextmanager
def aside_file(path: Path) -> Iterator[BinaryIO]:
    """Open a locked temporary file beside `path`, to write and `publish`; otherwise removed at the end."""
    temporary = aside(path)
    try:
        with open(temporary, "w+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def publish(file: BinaryIO, path: Path) -> None:
    """Flush a file from `aside_file` to the disk and rename it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)


def write_aside(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: readers see the old or the new content, also after a crash."""
    with aside_file(path) as file:
        file.write(data)
        publish(file, path)


class AsideFolder:
    """A temporary folder beside its target, to fill and `publish`; otherwise removed at the end.

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
        """Flush the files to the disk, which may take a while; a `publish` after it is quick."""
        for file in self.path.rglob("*"):
            _sync(file)
        _sync(self.path)

    def publish(self) -> None:
        """Rename the folder to its target. A target of a faster run is kept, as both hold the same."""
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


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and folders of dead processes from `folder`; keep those of living ones."""
    for path in sorted(folder.glob(f"{ASIDE}*")):  # sorted: a folder comes before its lock
        if _ASIDE_NAME.fullmatch(path.name) and _is_abandoned(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def _is_abandoned(path: Path) -> bool:
    try:
        if time.time() - path.lstat().st_mtime < _SECONDS_TO_LOCK:
            return False
        if path.is_symlink():
            return True  # a link has no lock: it is renamed right after it is created
        with open(_lock_of(path) if path.is_dir() else path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return path.is_dir()  # a file was published just now; a folder always has a lock while it is written
    except OSError:  # locked, another user's, or on a file system without locks
        return False
    return True


def _lock_of(folder: Path) -> Path:
    """Return the lock file beside a folder: NFS only locks files open for writing, so no folders."""
    return folder.with_name(f"{folder.name}.lock")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file `path` and hold it, against other processes and threads, until the block ends.

    The kernel releases the lock if the holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def exclusive_lock(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path` until the block ends, or fail at once if another process holds it.

    For folders in which only one process may work at a time. Uses POSIX locks, since flock's would live on in
    forked workers. On a file system without locks the block runs without one.

    Args:
        path: the lock file; created if missing.
        message: of the error.

    Raises:
        ConfigError: another process holds the lock.
    """
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(message) from None
        except OSError:
            pass
        yield


def scratch_folder() -> Path:
    """Return this user's own folder inside the machine's temporary folder; create it if missing.

    The temporary folder is shared: another user may have created a folder, or a link, of that name.

    Raises:
        ConfigError: the path exists and is not a folder of this user with mode 0700.
    """
    path = Path(tempfile.gettempdir(), f"unitoken-{getpass.getuser()}")
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.getuid()
        or stat.S_IMODE(status.st_mode) != 0o700
    ):
        raise ConfigError(
            f"{path}: expected a folder of your own with mode 0700; remove it, or set TMPDIR to another place"
        )
    return path


def own_temporary_folder() -> None:
    """Give this process a temporary folder of its own; if it is killed, the next process removes the folder.

    torch creates a temporary folder on import, and other libraries create more: each kill used to leave one
    for good. Nothing changes if the path would be too long for multiprocessing's sockets in it. TMPDIR is not
    set, as Ray looks there for other processes.
    """
    parent = scratch_folder()
    folder = AsideFolder(parent / "process")
    if len(os.fsencode(folder.path)) > LONGEST_SOCKET_PATH - len("/pymp-01234567/listener-01234567"):
        return
    # Later runs need what torch compiles, so it must not be in the temporary folder.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(parent / "torchinductor"))
    folder.__enter__()
    atexit.register(folder.__exit__)
    tempfile.tempdir = str(folder.path)
