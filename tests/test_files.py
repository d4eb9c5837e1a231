"""What bears its real name is whole; what a killed process left behind is told from what is being written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unitoken.streaming_data.files import AsideFolder, remove_abandoned, write_aside


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_aside(tmp_path / "a", b"first")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_aside(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_appears_when_published_and_not_before(tmp_path: Path) -> None:
    with AsideFolder(tmp_path / "done") as folder:
        (folder.path / "x").write_text("x")
        assert not (tmp_path / "done").exists()
        folder.publish()
    with AsideFolder(tmp_path / "given-up") as folder:
        (folder.path / "x").write_text("x")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["done", "done/x"]


def test_the_first_of_two_stays(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with AsideFolder(tmp_path / "done") as folder:
            (folder.path / "x").write_text(text)
            folder.publish()
    assert (tmp_path / "done" / "x").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys, time
from pathlib import Path
from unitoken.streaming_data.files import AsideFolder
with AsideFolder(Path(sys.argv[1])) as folder:
    (folder.path / "x").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER]
    alive = subprocess.Popen([*command, tmp_path / "alive"], stdout=subprocess.PIPE)
    dead = subprocess.Popen([*command, tmp_path / "dead"], stdout=subprocess.PIPE)
    try:
        for process in (alive, dead):
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        (tmp_path / ".aside-file-0123").write_text("half")
        for path in tmp_path.iterdir():
            os.utime(path, (time.time() - 5, time.time() - 5))
        remove_abandoned(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert [name.rsplit("-", 1)[0] for name in left] == [".aside-alive"] * 2
        assert left[1] == f"{left[0]}.lock"
    finally:
        alive.kill()
        alive.wait()


def test_what_was_just_made_may_not_be_locked_yet(tmp_path: Path) -> None:
    (tmp_path / ".aside-x-0123").write_text("half")
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_only_what_was_left_of_one_name_is_removed_where_that_is_asked(tmp_path: Path) -> None:
    """A run writes its checkpoints aside, unlocked, in the folder into which a model may be exported."""
    for name in (".aside-model-0123", ".aside-step-00000010.pt"):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - 5, time.time() - 5))
    remove_abandoned(tmp_path, "model")
    assert [path.name for path in tmp_path.iterdir()] == [".aside-step-00000010.pt"]
