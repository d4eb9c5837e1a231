"""SIGTERM and Ctrl-C: most commands end at once with one line; training first finishes its step and saves.

A program installs the handlers before it imports anything heavy, since a KeyboardInterrupt in the middle of
`import torch` is a page of traceback. This module therefore imports nothing heavy.

Python runs a signal handler only when the main thread returns from C, which may be minutes later: in a
collective that waits for another rank, in a hash of 100 GB. So a thread is also notified of each signal,
through `signal.set_wakeup_fd`, and ends the process itself if the main thread does not return in time.
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

from unitoken.common.errors import exit_status_of_signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIDY_SECONDS = 4.0  # for cleaning up after a signal, before the process is ended by force
LONGEST_END = 20.0  # seconds for a process with an error to end; launchers send SIGKILL after 30
ECHO_SECONDS = 3.0  # a SIGTERM within this time is a launcher's copy of a Ctrl-C, and no second signal
PR_SET_PDEATHSIG = 1

_installed = False  # a program that only imports our modules keeps its own handlers
_deferred = False  # whether the first signal is only recorded, as in training
_received = 0
_received_at = 0.0
_last_message: list[str] = []  # printed at the end; a list, as `pop` is atomic and so prints it only once


def install_handlers(message: str) -> None:
    """Handle SIGTERM and Ctrl-C from now on, as `end_on_signals` does. Call this before heavy imports."""
    global _installed
    _installed = True
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_reset_after_fork)
    threading.Thread(target=_watch, args=(read_end,), daemon=True).start()
    end_on_signals(message)


def end_on_signals(message: str) -> None:
    """Make signals print `message` and end the process with status 143 or 130 within `TIDY_SECONDS`.

    A signal that `remember_signals` recorded, and that nobody has acted on, ends the process now.
    """
    global _deferred
    if not _installed:
        return
    _last_message[:] = [message]
    _deferred = False
    for number in SIGNALS:
        signal.signal(number, _end)
    if _received:
        _end(_received, None)


def remember_signals() -> None:
    """Only record the first signal (see `received_signal`); let a second one end the process at once."""
    global _deferred
    if not _installed:
        return
    _deferred = True
    for number in SIGNALS:
        signal.signal(number, _leave_it_to_watch)


def keep_status(status: int) -> None:
    """Make sure that a process that ends with an error exits with `status` and prints nothing more.

    SIGTERM is ignored: launchers send it to all ranks when one fails. Ctrl-C still ends the process, and so
    do `LONGEST_END` seconds.
    """
    if not _installed:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end() -> None:
        time.sleep(LONGEST_END)
        os._exit(status)

    threading.Thread(target=end, daemon=True).start()


def received_signal() -> int:
    """Return the number of the first signal that was received, or 0."""
    return _received


def _end(number: int, _: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    _print_last_message()
    raise SystemExit(exit_status_of_signal(number))


def _leave_it_to_watch(number: int, _: FrameType | None) -> None:
    pass


def _print_last_message() -> None:
    """Print the message once, and in a distributed run on the first rank only."""
    with contextlib.suppress(IndexError):
        message = _last_message.pop()
        if os.environ.get("RANK", "0") == "0":
            print(message, file=sys.stderr, flush=True)


def _watch(read_end: int) -> None:
    """Record each signal; end the process if the main thread does not, or on a second signal in training."""
    global _received, _received_at
    while True:
        number = os.read(read_end, 1)[0]
        if number not in SIGNALS:  # for example SIGCHLD
            continue
        if not _received:
            _received, _received_at = number, time.monotonic()
        elif _deferred and (number == signal.SIGINT or time.monotonic() - _received_at > ECHO_SECONDS):
            os._exit(exit_status_of_signal(number))
        if not _deferred:
            # SystemExit is lost if it is raised in a destructor, or in an import that catches everything.
            time.sleep(TIDY_SECONDS / 2)
            _print_last_message()
            time.sleep(TIDY_SECONDS / 2)
            os._exit(exit_status_of_signal(number))


def _reset_after_fork() -> None:
    """Restore the default handlers: a forked child has no watching thread and must not use its parent's."""
    global _installed
    _installed = False
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Start processes with SIGTERM and SIGINT blocked, until they call `leave_signals_to_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """In a process that loads data, ignore signals that are sent to the whole process group.

    The parent acts on them. This process ends when its parent ends it, or dies.
    """
    import multiprocessing
    import shutil

    parent = os.getppid()
    settings: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    parents_folder = settings.get("tempdir")

    def watch() -> None:
        while (
            signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent
        ):  # from a launcher or a scheduler: ignored
            pass
        # multiprocessing's folder, with the socket through which tensors are handed over.
        folder = settings.get("tempdir")
        if folder and folder != parents_folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # torch would raise any other status in the parent, wherever that is

    # Threads started from now on inherit the mask, so only `watch` receives the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()  # torch itself ends the process if the parent dies


def end_with_launcher() -> None:
    """Receive SIGTERM when the launcher dies: an orphaned rank would train on and keep its GPU."""
    launcher = os.getppid()
    _signal_when_parent_dies(signal.SIGTERM)
    if os.getppid() != launcher:  # the launcher died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def _signal_when_parent_dies(number: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(PR_SET_PDEATHSIG, number)
