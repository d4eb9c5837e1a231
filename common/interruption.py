"""SIGTERM and Ctrl-C: a command ends at once with one line; training first finishes its step and saves.

Installed before anything heavy is imported, since a KeyboardInterrupt in the middle of `import torch` is a page of traceback.
Nothing here is heavy.

Python runs a handler only when its main thread comes back from C, which may be minutes later: in a collective that waits for
another rank, in a hash of 100 GB. So a thread hears of each signal through `signal.set_wakeup_fd`, and sees to the end itself
where the main thread does not come back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIDY_SECONDS = 4.0  # seconds for what is to be tidied up
LONGEST_END = 20.0  # seconds for a process to come to its end; launchers send SIGKILL after 30
ECHO_SECONDS = 3.0  # a launcher passes a terminal's Ctrl-C on as a SIGTERM: no second signal
PR_SET_PDEATHSIG = 1

_installed = False  # a program that only imports ours keeps its own handlers
_remembers = False  # in training
_received = 0
_received_at = 0.0
_unsaid: list[str] = []  # the line to end with; `pop` is atomic, so it is said once


def install_handlers(words: str) -> None:
    """For a program's first lines: see `end_on_signals`."""
    global _installed
    _installed = True
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_all)
    threading.Thread(target=_watch, args=(heard,), daemon=True).start()
    end_on_signals(words)


def end_on_signals(words: str) -> None:
    """From now on a signal prints `words` and ends the process with status 143 or 130, in `PATIENCE` seconds at most.

    So does one that was remembered (`remember_signals`) and that nobody has acted on.
    """
    global _remembers
    if not _installed:
        return
    _unsaid[:] = [words]
    _remembers = False
    for one in SIGNALS:
        signal.signal(one, _end)
    if _received:
        _end(_received, None)


def remember_signals() -> None:
    """From now on a signal is remembered (`received`), and a second one ends the process at once."""
    global _remembers
    if not _installed:
        return
    _remembers = True
    for one in SIGNALS:
        signal.signal(one, _leave_it_to_watch)


def keep_status(status: int) -> None:
    """For a process that ends with an error: a launcher that ends all others with SIGTERM does not change its status, nor add a
    line. Ctrl-C still ends it, and after `LONGEST_END` it ends by itself.
    """
    if not _installed:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end() -> None:
        time.sleep(LONGEST_END)
        os._exit(status)

    threading.Thread(target=end, daemon=True).start()


def received() -> int:
    """The signal that came first; 0: none."""
    return _received


def _end(number: int, _: FrameType | None) -> None:
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    _say()
    raise SystemExit(128 + number)


def _leave_it_to_watch(number: int, _: FrameType | None) -> None:
    pass


def _say() -> None:
    with contextlib.suppress(IndexError):
        words = _unsaid.pop()
        if os.environ.get("RANK", "0") == "0":
            print(words, file=sys.stderr, flush=True)


def _watch(heard: int) -> None:
    global _received, _received_at
    while True:
        number = os.read(heard, 1)[0]
        if number not in SIGNALS:  # a child's end
            continue
        if not _received:
            _received, _received_at = number, time.monotonic()
        elif _remembers and (number == signal.SIGINT or time.monotonic() - _received_at > ECHO_SECONDS):
            os._exit(128 + number)
        if not _remembers:
            # What is raised in some places (a destructor, an import that tries all) is lost, too.
            time.sleep(TIDY_SECONDS / 2)
            _say()
            time.sleep(TIDY_SECONDS / 2)
            os._exit(128 + number)


def _forget_all() -> None:
    """A child that was forked has no thread that watches, and must not tell its parent's."""
    global _installed
    _installed = False
    signal.set_wakeup_fd(-1)
    for one in SIGNALS:
        signal.signal(one, signal.SIG_DFL)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Processes begun in this block get SIGTERM and SIGINT only when they are ready for them (`leave_signals_to_parent`)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """In a process that loads data: what is sent to the whole group is the parent's to act on. It ends when the parent ends it,
    and with the parent.
    """
    import multiprocessing
    import shutil

    parent = os.getppid()
    settings: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    parents_folder = settings.get("tempdir")

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:  # a launcher's, a scheduler's
            pass
        folder = settings.get(
            "tempdir"
        )  # multiprocessing's, with the socket by which tensors are handed over
        if folder and folder != parents_folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # no failure: torch would raise it in the parent, wherever that is

    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM}
    )  # threads that begin from now on, too: `watch` alone is told
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()  # torch's own watch ends it with a parent that died


def end_with_launcher() -> None:
    """A rank whose launcher has died gets SIGTERM; else it would train on as an orphan and keep its GPU."""
    launcher = os.getppid()
    _signal_at_parents_death(signal.SIGTERM)
    if os.getppid() != launcher:  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def _signal_at_parents_death(number: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(PR_SET_PDEATHSIG, number)
