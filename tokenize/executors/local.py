"""SPLITS worker processes on this machine, and what to say when one of them dies."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import operator
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from unitoken.common.errors import ConfigError, one_line
from unitoken.tokenize.executors.progress import Progress, share_of, show_progress
from unitoken.tokenize.job import Job
from unitoken.tokenize.pipeline.timing import Times

REPORT_SECONDS = 0.2


@dataclass
class _Worker:
    rank: int
    process: SpawnProcess
    # A pipe for each: with one queue for all, a worker killed while it holds the queue's lock would stop the others.
    messages: Connection
    failure: str | None = None


def launch(job: Job, splits: int) -> list[str]:
    """Tokenize the missing chunks with up to `splits` processes. Returns what went wrong, a line for each that died.

    Raises:
        ConfigError: what a worker found not to fit, such as weights.
    """
    chunks, done = job.chunks(), job.output.done()
    ranks = sorted({place % splits for place, chunk in enumerate(chunks) if chunk.name not in done})
    if not ranks:
        return []
    workers = [
        _start(job, rank, splits, device) for rank, device in zip(ranks, _devices(len(ranks)), strict=True)
    ]
    try:
        with show_progress(share_of(job, chunks)) as bar:
            times = _listen(workers, bar)
    finally:
        for worker in workers:
            worker.process.terminate()
    for worker in workers:
        worker.process.join()
    show_times(times)
    died = [worker for worker in workers if worker.process.exitcode]
    return [f"worker {worker.rank} {worker.failure or _ending(worker.process.exitcode)}" for worker in died]


def run_here(job: Job, rank: int, splits: int) -> None:
    """One rank's share in this process, with its own progress."""
    from unitoken.tokenize.pipeline.worker import run_rank

    with show_progress(share_of(job, job.chunks()[rank::splits])) as bar:

        def report(finished: int, rejected: int) -> None:
            bar.advance(finished, rejected)
            bar.show()

        times = run_rank(job, rank, splits, report)
    show_times([times])


def show_times(times: Sequence[Times]) -> None:
    """Where the time went, over all processes."""
    if times:
        print(functools.reduce(operator.add, times).summary(), file=sys.stderr)


def _ending(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    memory = " (perhaps by the kernel, which is out of memory)" if -status == signal.SIGKILL else ""
    return f"was killed by signal {-status}{memory}"


def _devices(count: int) -> list[str | None]:
    """A value of CUDA_VISIBLE_DEVICES for each process: one GPU each, shared in turn if there are fewer."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        return [None] * count
    return [gpus[number % len(gpus)] for number in range(count)]


def _start(job: Job, rank: int, splits: int, device: str | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(job, rank, splits, sender, tempfile.tempdir), name=f"tokenize-{rank}", daemon=True
    )
    with _environment("CUDA_VISIBLE_DEVICES", device):
        process.start()
    sender.close()  # else the end of the worker would not end its messages
    return _Worker(rank, process, receiver)


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif value is not None:
            del os.environ[name]


def _listen(workers: list[_Worker], bar: Progress) -> list[Times]:
    """Until every worker has ended, however it did. Returns the times of those that came to their end."""
    times: list[Times] = []
    open_ends: dict[Any, _Worker] = {worker.messages: worker for worker in workers}
    while open_ends:
        for connection in wait(list(open_ends), timeout=1.0):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):  # OSError: killed while it wrote
                del open_ends[connection]
                continue
            if isinstance(message, ConfigError):
                raise message
            if isinstance(message, tuple):
                bar.advance(*message)
            elif isinstance(message, str):
                open_ends[connection].failure = message
            else:
                times.append(message)
        bar.show()
    return times


# --- in the worker ---------------------------------------------------------------------------------------------------


def _work(job: Job, rank: int, splits: int, messages: Connection, temporary: str | None = None) -> None:
    tempfile.tempdir = temporary  # the parent's own, which it removes
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    reporter = Reporter(messages)
    try:
        from unitoken.tokenize.pipeline.worker import run_rank

        times = run_rank(job, rank, splits, reporter)
        reporter.flush()
        messages.send(times)
    except ConfigError as error:
        messages.send(error)
    except (OSError, MemoryError) as error:  # a disk that is full, a bucket that is gone
        reporter.flush()
        messages.send(f"stopped: {failure_line(error)}")
        sys.exit(1)


def failure_line(error: OSError | MemoryError) -> str:
    return "out of memory" if isinstance(error, MemoryError) else one_line(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Reporter:
    """Collects counts, so that a fast worker does not fill its pipe."""

    def __init__(self, messages: Connection) -> None:
        self._messages = messages
        self._finished = self._rejected = 0
        self._sent = time.monotonic()

    def __call__(self, finished: int, rejected: int) -> None:
        self._finished += finished
        self._rejected += rejected
        if time.monotonic() - self._sent > REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._messages.send((self._finished, self._rejected))
        self._finished = self._rejected = 0
        self._sent = time.monotonic()
