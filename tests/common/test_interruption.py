"""Signals end a program in time with one line and the right status; ranks without a launcher end, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.paths import ROOT
from unitoken.common.errors import ConfigError
from unitoken.train.distributed import ranks

ENDLESS = """
from unitoken.common.interruption import (
    end_on_signals, end_with_launcher, install_handlers, leave_signals_to_parent, remember_signals
)
import time
install_handlers("interrupted")
{}
print("ready", flush=True)
time.sleep(60)
print("went on", flush=True)
"""


# Minutes in C, without the GIL.
IN_C = 'print("ready", flush=True); import hashlib; hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)'


def started(body: str = "") -> subprocess.Popen[str]:
    program = [sys.executable, "-c", ENDLESS.format(body)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def holds(body: str) -> None:
    """Run a program's assertions: it is only ready if they hold."""
    process = started(body)
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_one_line(number: int, status: int) -> None:
    process = started()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (status, "", "interrupted\n")


def test_a_command_that_can_be_resumed_says_so() -> None:
    process = started('from unitoken.common.cli import one_line_errors; one_line_errors("go on").__enter__()')
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (143, "interrupted; go on\n")


def test_a_signal_does_not_change_the_status_of_an_error() -> None:
    """One rank ends first; the launcher sends SIGTERM to another that is ending with the same error."""
    body = """
import atexit
from unitoken.common.cli import one_line_errors
from unitoken.common.config import ConfigError
atexit.register(time.sleep, 1)
atexit.register(print, "ready", flush=True)
with one_line_errors("go on"):
    raise ConfigError("wrong")
"""
    process = started(body)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (2, "error: wrong\n")


def test_a_process_that_hangs_at_its_end_keeps_its_status() -> None:
    body = f"import unitoken.common.interruption as i; i.LONGEST_END = 0.3; i.keep_status(1); {IN_C}"
    process = started(body)
    process.communicate(timeout=10)
    assert process.returncode == 1


@pytest.mark.parametrize("module", ["unitoken.tokenize", "unitoken.streaming_data", "unitoken.train"])
@pytest.mark.parametrize("after", [0.15, 0.4, 0.8])
def test_a_signal_while_a_program_imports_is_no_traceback(module: str, after: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--help"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    time.sleep(after)  # somewhere in its imports
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    python_was_starting = "init_import_site" in err
    assert process.returncode in (0, 130, -signal.SIGINT) or python_was_starting, err
    if process.returncode == 130:
        assert err.startswith("interrupted")
        assert len(err.splitlines()) == 1


def test_training_ends_at_once_on_the_second_signal_only() -> None:
    process = started("import unitoken.common.interruption as i; i.ECHO_SECONDS = 0.2; remember_signals()")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # a launcher's copy of the same signal
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_a_signal_in_the_middle_of_c_code_ends_a_command() -> None:
    process = started(f"import unitoken.common.interruption as i; i.TIDY_SECONDS = 0.6; {IN_C}")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_in_the_middle_of_c_code_ends_training(second: int, status: int) -> None:
    process = started(
        f"import unitoken.common.interruption as i; i.ECHO_SECONDS = 0.2; remember_signals(); {IN_C}"
    )
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(second)
    process.communicate(timeout=10)
    assert process.returncode == status


def test_a_second_ctrl_c_counts_however_soon() -> None:
    process = started("remember_signals()")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=2)
    assert process.returncode == 130


def test_a_remembered_signal_ends_the_program_after_training() -> None:
    process = started(
        'remember_signals(); print("ready", flush=True); time.sleep(0.5); end_on_signals("after")'
    )
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (143, "after\n")


def test_a_forked_child_does_not_notify_its_parents_watch() -> None:
    body = """
import os
from unitoken.common.interruption import received_signal
remember_signals()
child = os.fork()
child or time.sleep(60)
time.sleep(0.2)
os.kill(child, 15)
assert os.waitpid(child, 0)[1] == 15
time.sleep(0.2)
assert not received_signal()
"""
    holds(body)


LOADER = """
import os, subprocess, sys
from unitoken.common.interruption import signals_blocked
with signals_blocked():
    child = os.fork()
    if not child:
        time.sleep({starts})  # imports, opening of files
        leave_signals_to_parent()
        time.sleep(60)
{signals}
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_loader_process_ignores_signals_to_the_group() -> None:
    signals = """
time.sleep(0.3)
kill = "import os, sys; [os.kill(int(sys.argv[1]), number) for number in (2, 15)]"
subprocess.run([sys.executable, "-c", kill, str(child)], check=True)  # from another process than its parent
time.sleep(0.3)
assert os.waitpid(child, os.WNOHANG) == (0, 0)
os.kill(child, 15)
"""
    holds(LOADER.format(starts=0, signals=signals))


def test_a_loader_process_ended_at_its_start_is_no_failure() -> None:
    """Torch raises an error in the parent if a loader process dies of a signal."""
    holds(LOADER.format(starts=0.5, signals="os.kill(child, 2); os.kill(child, 15)"))


@pytest.mark.parametrize("parents", [False, True])
def test_a_loader_process_removes_its_own_temporary_folder(parents: bool, tmp_path: Path) -> None:
    body = f"""
import multiprocessing, tempfile
from multiprocessing import util
tempfile.tempdir = {str(tmp_path)!r}
parents = util.get_temp_dir() if {parents} else None
def load():
    leave_signals_to_parent()
    util.get_temp_dir()
    queue.put(1)
    time.sleep(60)
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=load, daemon=True)
process.start()
queue.get()
assert len(__import__("os").listdir({str(tmp_path)!r})) == 1
process.terminate()
process.join()
assert __import__("os").listdir({str(tmp_path)!r}) == ([parents.rpartition("/")[2]] if parents else [])
"""
    holds(body)


def test_a_rank_ends_with_its_launcher() -> None:
    """The launcher is killed, and its rank ends."""
    launcher = f"""
import subprocess, sys, time
program = {ENDLESS.format("end_with_launcher()")!r}
process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    rank = int(process.stdout.readline())
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while (
        Path(f"/proc/{rank}").exists()
        and "Z" not in Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2][:3]
    ):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_rank_says_that_the_first_rank_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "FIRST_RANK_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"^rank 1: the first rank does not answer at 127\.0\.0\.1:9 "):
        ranks.connect()
    assert os.environ["NODE_RANK"]
    monkeypatch.delenv("NODE_RANK")
