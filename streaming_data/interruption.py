"""SIGTERM and Ctrl-C: a command ends at once with one line; training first finishes its step and saves.

Installed before anything heavy is imported, since a KeyboardInterrupt in the middle of `import torch` is a page of traceback.
Nothing here is heavy.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 4.0  # seconds for what is to be tidied up
ECHO_SECONDS = 3.0  # a launcher passes on what the terminal has sent to all: no second signal
PR_SET_PDEATHSIG = 1

_installed = False  # a program that only imports ours keeps its own handlers
_received = 0
_received_at = 0.0


def install_handlers(words: str) -> None:
    """For a program's first lines: see `end_on_signals`."""
    global _installed
    _installed = True
    end_on_signals(words)


def end_on_signals(words: str) -> None:
    """From now on a signal prints `words` and ends the process with status 143 or 130, in `PATIENCE` seconds at most."""
    if not _installed:
        return

    def end(number: int, _: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            print(words, file=sys.stderr, flush=True)
        # What is raised in some places (a destructor, an import that tries all) is lost: then this thread ends it.
        threading.Thread(target=_end_later, args=(128 + number,), daemon=True).start()
        raise SystemExit(128 + number)

    for one in SIGNALS:
        signal.signal(one, end)


def _end_later(status: int) -> None:
    time.sleep(PATIENCE)
    os._exit(status)


def remember_signals() -> None:
    """From now on a signal is remembered (`received`), and a second one ends the process at once."""
    if not _installed:
        return

    def remember(number: int, _: FrameType | None) -> None:
        global _received, _received_at
        if not _received:
            _received, _received_at = number, time.monotonic()
        elif time.monotonic() - _received_at > ECHO_SECONDS:
            os._exit(128 + number)

    for one in SIGNALS:
        signal.signal(one, remember)


def received() -> int:
    """The signal that was remembered; 0: none."""
    return _received


def leave_signals_to_parent() -> None:
    """In a process that loads data: what is sent to the whole group is the parent's to act on. It ends when the parent ends it,
    and with the parent."""
    parent = os.getppid()

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:  # a launcher's, a scheduler's
            pass
        os._exit(0)  # no failure: torch would raise it in the parent, wherever that is

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that begin from now on, too: `watch` alone is told
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
