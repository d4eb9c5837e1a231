"""SPLITS worker processes on this machine, one progress bar, and what to say when one of them dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from unitoken.streaming_data.config import ConfigError
from unitoken.tokenize.job import Job

REPORT_SECONDS = 0.2
PLAIN_SECONDS = 10.0  # between the lines of a progress that no terminal shows


@dataclass
class _Worker:
    rank: int
    process: SpawnProcess
    # A pipe for each: with one queue for all, a worker killed while it holds the queue's lock would stop the others.
    messages: Connection


def launch(job: Job, splits: int) -> list[str]:
    """Tokenize the missing chunks with up to `splits` processes. Returns what went wrong, a line for each that died.

    Raises:
        ConfigError: what a worker found not to fit, such as weights.
    """
    missing = job.missing()
    ranks = sorted({number % splits for number in missing})
    if not ranks:
        return []
    workers = [_start(job, rank, splits, device) for rank, device in zip(ranks, _devices(len(ranks)), strict=True)]
    try:
        with progress(*_share(job, 0, 1)) as bar:
            _listen(workers, bar)
    finally:
        for worker in workers:
            worker.process.terminate()
    for worker in workers:
        worker.process.join()
    return [f"worker {worker.rank} {_ending(worker.process.exitcode)}" for worker in workers if worker.process.exitcode]


def run_here(job: Job, rank: int, splits: int) -> None:
    """One rank's share in this process, with its own progress."""
    from unitoken.tokenize.worker import run_rank

    with progress(*_share(job, rank, splits)) as bar:

        def report(finished: int, rejected: int) -> None:
            bar.advance(finished, rejected)
            bar.show()

        run_rank(job, rank, splits, report)


def _share(job: Job, rank: int, splits: int) -> tuple[int, int]:
    """A rank's items, and how many of them are done."""
    missing = set(job.missing())
    size = job.file.chunk_size
    items = {number: min(size, job.file.items - number * size) for number in range(rank, job.file.chunks, splits)}
    return sum(items.values()), sum(count for number, count in items.items() if number not in missing)


def _ending(status: int | None) -> str:
    return f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"


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
    process = context.Process(target=_work, args=(job, rank, splits, sender), name=f"tokenize-{rank}", daemon=True)
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


def _listen(workers: list[_Worker], bar: Progress) -> None:
    """Until every worker has ended, however it did."""
    open_ends: dict[Any, _Worker] = {worker.messages: worker for worker in workers}
    while open_ends:
        for connection in wait(list(open_ends), timeout=1.0):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except EOFError:
                del open_ends[connection]
                continue
            if isinstance(message, str):
                raise ConfigError(message)
            bar.advance(*message)
        bar.show()


# --- in the worker ---------------------------------------------------------------------------------------------------


def _work(job: Job, rank: int, splits: int, messages: Connection) -> None:
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    reporter = Reporter(messages)
    try:
        from unitoken.tokenize.worker import run_rank  # torch, transformers and streaming: 10 s

        run_rank(job, rank, splits, reporter)
        reporter.flush()
    except ConfigError as error:
        messages.send(str(error))


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


# --- progress --------------------------------------------------------------------------------------------------------


class Progress(Protocol):
    def advance(self, finished: int, rejected: int) -> None: ...

    def show(self) -> None: ...


@contextlib.contextmanager
def progress(total: int, done: int) -> Iterator[Progress]:
    """A bar on a terminal, a line now and then elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        lines = _Lines(total, done)
        yield lines
        lines.show(last=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("tokenize"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rejected]} rejected"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, total, done)


class _Count:
    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.rejected = total, done, 0
        self._begun_with = done
        self._start: float | None = None  # of the first item: loading the models is no rate
        self._last = 0.0

    def advance(self, finished: int, rejected: int) -> None:
        if self._start is None:
            self._start = time.monotonic()
            self._begun_with = self.done + finished
        self.done += finished
        self.rejected += rejected
        self._last = time.monotonic()

    @property
    def rate(self) -> float:
        """Items a second."""
        if self._start is None:
            return 0.0
        end = self._last if self.done >= self.total else time.monotonic()  # workers take a while to end
        seconds = end - self._start
        return (self.done - self._begun_with) / seconds if seconds > 0 else 0.0

    def __str__(self) -> str:
        if self._start is None:
            return f"{self.done:,}/{self.total:,} items, loading the models"
        left = f", {(self.total - self.done) / self.rate / 60:.1f} min left" if self.rate and self.done < self.total else ""
        return f"{self.done:,}/{self.total:,} items, {self.rate:.1f} items/s{left}, {self.rejected} rejected"


class _Lines(_Count):
    _shown = 0.0

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._shown > PLAIN_SECONDS:
            self._shown = now
            print(f"tokenize: {self}", file=sys.stderr, flush=True)


class _Bar(_Count):
    def __init__(self, bar: Any, total: int, done: int) -> None:
        super().__init__(total, done)
        self._bar = bar
        self._task = bar.add_task("tokenize", total=total, completed=done, rate="loading the models", rejected=0)

    def show(self) -> None:
        rate = f"{self.rate:.1f} items/s" if self._start is not None else "loading the models"
        self._bar.update(self._task, completed=self.done, rate=rate, rejected=self.rejected)
