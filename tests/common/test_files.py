"""Atomic writes: no half-written file has its real name, and only files of dead processes are removed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from unitoken.common import files
from unitoken.common.files import AsideFolder, remove_abandoned, write_aside


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


def test_the_first_of_two_folders_is_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with AsideFolder(tmp_path / "done") as folder:
            (folder.path / "x").write_text(text)
            folder.publish()
    assert (tmp_path / "done" / "x").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys, time
from pathlib import Path
from unitoken.common.files import AsideFolder
with AsideFolder(Path(sys.argv[1])) as folder:
    (folder.path / "x").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_only_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
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
        (tmp_path / ".aside-file-0123456789ab").write_text("half")
        for path in tmp_path.iterdir():
            os.utime(path, (time.time() - 5, time.time() - 5))
        remove_abandoned(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert [name.rsplit("-", 1)[0] for name in left] == [".aside-alive"] * 2
        assert left[1] == f"{left[0]}.lock"
    finally:
        alive.kill()
        alive.wait()


def test_a_new_file_is_kept_as_it_may_not_be_locked_yet(tmp_path: Path) -> None:
    (tmp_path / ".aside-x-0123456789ab").write_text("half")
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_hidden_files_of_other_programs_are_kept(tmp_path: Path) -> None:
    """For example checkpoints that torch is writing: a model may be exported into the folder of a run."""
    for name in (".aside-step-00000010.pt", ".aside-lock", ".aside-0123456789ab"):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (1, 1))
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


FILE_WRITERS = {
    "write_aside": "import os; os.fsync = wait; write_aside(Path(sys.argv[1], 'a'), b'1')",
    "upload": "import os; os.fsync = wait; open_store(sys.argv[1]).upload(Path(sys.argv[0]), 'a')",
    "claim": "import os; os.link = wait; Output(sys.argv[1]).claim('a', b'1')",
    "folder": "folder = AsideFolder(Path(sys.argv[1], 'a')).__enter__(); wait()",
}


@pytest.mark.parametrize("kind", FILE_WRITERS)
def test_the_next_writer_removes_what_dead_writers_left(kind: str, tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from unitoken.common.files import AsideFolder, write_aside
from unitoken.storage.open import open_store
from unitoken.tokenize.output import Output
sys.argv[0] = __import__('os').__file__
def wait(*_):
    print("writing", flush=True)
    time.sleep(60)
{FILE_WRITERS[kind]}
"""
    folder = tmp_path / "out"
    folder.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.stdout.close()
        written = sorted(folder.iterdir())
        assert written
        for is_dead in (False, True):
            for path in written:
                os.utime(path, (1, 1))
            files._cleaned_folders.clear()
            write_aside(folder / "b", b"2")
            assert sorted(set(folder.iterdir()) - {folder / "b"}) == ([] if is_dead else written)
            writer.kill()
            writer.wait()
    finally:
        writer.kill()
        writer.wait()


OWN_FOLDER = """
import os, sys, tempfile, time
from unitoken.common.files import own_temporary_folder
own_temporary_folder()
print(tempfile.mkdtemp(), tempfile.gettempdir(), os.environ.get("TORCHINDUCTOR_CACHE_DIR"), flush=True)
time.sleep(float(sys.argv[1]))
"""


def started_with_own_folder(parent: Path, seconds: str) -> tuple[subprocess.Popen[str], list[Path]]:
    environment = {**os.environ, "TMPDIR": str(parent)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    program = [sys.executable, "-c", OWN_FOLDER, seconds]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    words = process.stdout.readline().split()
    if seconds == "60":
        process.kill()
    process.communicate()
    return process, [Path(word) for word in words]


def test_a_killed_programs_temporary_folder_is_removed() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # the paths of sockets may not be long
        _, (made, temporary, compiled) = started_with_own_folder(Path(short), "60")
        assert made.parent == temporary
        assert compiled.parent == temporary.parent, "compiled code is kept for the next run"
        assert made.is_dir()
        for path in temporary.parent.iterdir():
            os.utime(path, (1, 1))
        started_with_own_folder(Path(short), "0")
        assert list(temporary.parent.iterdir()) == []


def test_a_path_too_long_for_sockets_leaves_the_temporary_folder(tmp_path: Path) -> None:
    (long := tmp_path / ("long" * 15)).mkdir()
    _, (made, temporary, compiled) = started_with_own_folder(long, "0")
    assert (made.parent, temporary, str(compiled)) == (long, long, "None")
