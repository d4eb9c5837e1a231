"""How a command ends with an error: one line, an exit status, and a hint only if it is true."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from unitoken.common.cli import one_line_errors
from unitoken.common.errors import ConfigError
from unitoken.storage.open import open_store
from unitoken.storage.shard_cache import ShardError, TransientShardError
from unitoken.storage.store import MissingError, StoreError, TransientStoreError


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a: b"), 2, "a: b"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "[Errno 28] No space left on device; go on"),
        (OSError(errno.EACCES, "Permission denied"), 1, "[Errno 13] Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), 1, "[Errno 30] Read-only file system"),
        (TimeoutError("no answer"), 1, "no answer; go on"),
        (StoreError("s3://b/a: permission denied"), 1, "s3://b/a: permission denied"),
        (MissingError("s3://b/a: not there"), 1, "s3://b/a: not there"),
        (TransientStoreError("s3://b/a: HTTP 503"), 1, "s3://b/a: HTTP 503; go on"),
        (ShardError("shard 3 is corrupt"), 1, "shard 3 is corrupt"),
        (TransientShardError("shard 3: HTTP 503"), 1, "shard 3: HTTP 503; go on"),
        (MemoryError(), 1, "out of memory"),
        (ConfigError("a\nb\x1b[2J"), 2, "a?b?[2J"),
    ],
)
def test_errors_are_one_line_and_hint_at_resuming_if_transient(
    error: Exception, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors("go on"):
        raise error
    assert caught.value.code == status
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="bug"), one_line_errors("go on"):
        raise RuntimeError("bug")


def test_a_full_disk_is_transient_and_a_wrong_path_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "index.json")

    monkeypatch.setattr("unitoken.storage.folder.write_aside", full)
    with pytest.raises(TransientStoreError, match=r"index\.json: No space left on device"):
        store.write("index.json", b"")
    monkeypatch.undo()
    (tmp_path / "a").mkdir()
    with pytest.raises(StoreError) as error:
        store.write("a", b"")
    assert not isinstance(error.value, TransientStoreError)
