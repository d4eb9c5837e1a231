"""Write aside, then rename: what bears its real name is whole.

A process holds a lock on what it writes aside, and its death gives the lock back, however it died: so what a killed
run left behind can be told from what another run is writing just now (`remove_abandoned`).
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

ASIDE = ".aside-"
LONGEST_PATH_OF_SOCKETS = 107  # bytes, on Linux
_NAME = re.compile(r"\.aside-.+-[0-9a-f]{12}(\.lock)?")  # as `aside` makes them

_tidied: set[tuple[int, Path]] = set()  # by which process, as forked ones are others


def aside(path: Path) -> Path:
    """A name beside `path` that no other process uses; hidden, and recognised by its prefix.

    A process that works in a folder for the first time removes what dead ones left there.
    """
    key = os.getpid(), path.parent
    if key not in _tidied:
        _tidied.add(key)
        remove_abandoned(path.parent)
    return path.with_name(f"{ASIDE}{path.name}-{uuid.uuid4().hex[:12]}")


@contextlib.contextmanager
def aside_file(path: Path) -> Iterator[BinaryIO]:
    """A locked file beside `path`, to be written and then published; its `name` says where. It is gone after the block."""
    temporary = aside(path)
    try:
        with open(temporary, "w+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def publish(file: BinaryIO, path: Path) -> None:
    """Bring a file that was written aside to the disk and give it its name."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)


def write_aside(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees all of it or nothing."""
    with aside_file(path) as file:
        file.write(data)
        publish(file, path)


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


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left aside in `folder`, and leave alone what is being written, and what is not ours."""
    for path in sorted(folder.glob(f"{ASIDE}*")):  # a folder before its lock
        if _NAME.fullmatch(path.name) and _is_abandoned(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def _is_abandoned(path: Path) -> bool:
    try:
        if time.time() - path.lstat().st_mtime < 1:
            return False  # perhaps just made and not yet locked
        if path.is_symlink():
            return True  # made and renamed within a moment
        with open(_lock_of(path) if path.is_dir() else path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return path.is_dir()  # a file's writer has just finished; a folder never is without its lock
    except OSError:  # it is held; or it is another user's, or nothing can be locked there
        return False
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


@contextlib.contextmanager
def held(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path`, where two who work in one folder would lose both; the holder's death gives it back.

    With POSIX's locks: flock's would live on in forked workers. Where a file system has none, one goes without.
    Raises ConfigError with `message` where another process has it.
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
    """Of this user alone. Names in the machine's temporary folder are everybody's: another user may have made this one,
    or a link that leads elsewhere.

    Raises:
        ConfigError: it is there and is no folder of this user's with mode 0700.
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
    """Give this process a temporary folder of its own, which the next one removes where it was killed.

    torch makes a temporary folder where it is imported, and libraries make others: each kill left one for good. Where its
    path would be too long for multiprocessing's sockets in it, all stays as it is. TMPDIR stays: Ray looks there for others.
    """
    parent = scratch_folder()
    folder = AsideFolder(parent / "process")
    if len(os.fsencode(folder.path)) > LONGEST_PATH_OF_SOCKETS - len("/pymp-01234567/listener-01234567"):
        return
    # What torch compiles is for the runs that follow, too; else it would lie in the temporary folder.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(parent / "torchinductor"))
    folder.__enter__()
    atexit.register(folder.__exit__)
    tempfile.tempdir = str(folder.path)
