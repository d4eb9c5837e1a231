"""Tokenize with worker processes on this machine, and report what happened to a worker that dies."""

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

from unitoken.common.cli import notify
from unitoken.common.errors import ConfigError, one_line
from unitoken.tokenize.executors.progress import Progress, progress_of, show_progress
from unitoken.tokenize.job import Job
from unitoken.tokenize.pipeline.timing import Times

REPORT_SECONDS = 0.2


@dataclass
class _Worker:
    rank: int
    process: SpawnProcess
    # Each has a pipe of its own: with one queue for all, a worker killed while it holds the queue's lock
    # would stop the others.
    messages: Connection
    failure: str | None = None


def launch(job: Job, splits: int) -> list[str]:
    """Tokenize the missing chunks with up to `splits` processes.

    Returns:
        What went wrong, a line for each worker that died.

    Raises:
        ConfigError: a worker found that something does not fit, such as the weights.
    """
    chunks, done = job.chunks(), job.output.done()
    ranks = sorted({place % splits for place, chunk in enumerate(chunks) if chunk.name not in done})
    if not ranks:
        return []
    workers = [
        _start_worker(job, rank, splits, device)
        for rank, device in zip(ranks, _devices(len(ranks)), strict=True)
    ]
    try:
        with show_progress(progress_of(job, chunks)) as bar:
            times = _follow_workers(workers, bar)
    finally:
        for worker in workers:
            worker.process.terminate()
    for worker in workers:
        worker.process.join()
    show_times(times)
    return [
        f"worker {worker.rank} {worker.failure or _describe_exit(worker.process.exitcode)}"
        for worker in workers
        if worker.process.exitcode
    ]


def run_rank_here(job: Job, rank: int, splits: int) -> None:
    """Write the chunks of one rank in this process, and show the progress of this rank."""
    from unitoken.tokenize.pipeline.worker import run_rank

    with show_progress(progress_of(job, job.chunks()[rank::splits])) as bar:

        def report(finished: int, rejected: int) -> None:
            bar.advance(finished, rejected)
            bar.show()

        times = run_rank(job, rank, splits, report)
    show_times([times])


def show_times(times: Sequence[Times]) -> None:
    """Print on stderr where the time went, over all processes."""
    if times:
        notify(functools.reduce(operator.add, times).summary())


def _describe_exit(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    memory = " (perhaps by the kernel, which is out of memory)" if -status == signal.SIGKILL else ""
    return f"was killed by signal {-status}{memory}"


def _devices(count: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each process: one GPU each, shared in turn if there are fewer."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        return [None] * count
    return [gpus[number % len(gpus)] for number in range(count)]


def _start_worker(job: Job, rank: int, splits: int, device: str | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=run_worker,
        args=(job, rank, splits, sender, tempfile.tempdir),
        name=f"tokenize-{rank}",
        daemon=True,
    )
    with _environment("CUDA_VISIBLE_DEVICES", device):
        process.start()
    sender.close()  # otherwise the pipe would stay open when the worker ends
    return _Worker(rank, process, receiver)


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable for the block; None leaves it as it is."""
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


def _follow_workers(workers: list[_Worker], bar: Progress) -> list[Times]:
    """Receive messages until every worker has ended in some way. Returns the times of those that finished."""
    times: list[Times] = []
    open_pipes: dict[Any, _Worker] = {worker.messages: worker for worker in workers}
    while open_pipes:
        for connection in wait(list(open_pipes), timeout=1.0):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):  # OSError: killed while it wrote
                del open_pipes[connection]
                continue
            if isinstance(message, ConfigError):
                raise message
            if isinstance(message, tuple):
                bar.advance(*message)
            elif isinstance(message, str):
                open_pipes[connection].failure = message
            else:
                times.append(message)
        bar.show()
    return times


# --- in the worker ---


def run_worker(job: Job, rank: int, splits: int, messages: Connection, temporary: str | None = None) -> None:
    """Write the chunks of one rank, as a process of its own.

    Args:
        job: the run.
        rank: the worker's number, below `splits`.
        splits: how many workers share the chunks.
        messages: takes counts as (finished, rejected), and at the end the times, a failure as text, or a
            ConfigError.
        temporary: the parent's folder for temporary files, which the parent removes.
    """
    tempfile.tempdir = temporary
    _end_with_parent()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
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
    """Return what stopped a worker, in one line."""
    return "out of memory" if isinstance(error, MemoryError) else one_line(error)


def _end_with_parent() -> None:
    """End this process when the parent ends, however it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Reporter:
    """Collects counts and sends them now and then, so that a fast worker does not fill its pipe."""

    def __init__(self, messages: Connection) -> None:
        self._messages = messages
        self._finished = self._rejected = 0
        self._sent = time.monotonic()

    def __call__(self, finished: int, rejected: int) -> None:
        """Count items that were finished since the last call, and how many of them were rejected."""
        self._finished += finished
        self._rejected += rejected
        if time.monotonic() - self._sent > REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what was counted since the last time."""
        self._messages.send((self._finished, self._rejected))
        self._finished = self._rejected = 0
        self._sent = time.monotonic()
