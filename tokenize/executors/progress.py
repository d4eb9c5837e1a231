"""How far a run is: a bar on a terminal, a line now and then elsewhere; both on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unitoken.tokenize.job import Chunk, Job

PLAIN_SECONDS = 10.0  # between the lines of a progress that no terminal shows
CHUNK_SECONDS = 10.0  # between counts of the chunks that are done: each asks the file system or the bucket


@dataclass(frozen=True)
class RunProgress:
    """What is to be done, and what of it is done already."""

    items: int | None  # None: only reading tells
    done: int
    chunks: int
    chunks_done: Callable[[], int]


class Progress(Protocol):
    def advance(self, finished: int, rejected: int) -> None: ...

    def show(self) -> None: ...


def share_of(job: Job, chunks: Sequence[Chunk]) -> RunProgress:
    if job.work.rounds:  # what they try again is what the run is about; the rest is done
        chunks = [chunk for chunk in chunks if chunk.round == len(job.work.rounds)]

    def done() -> list[Chunk]:
        there = job.output.done()
        return [chunk for chunk in chunks if chunk.name in there]

    items = [job.work.items(chunk) for chunk in chunks]
    total = None if None in items else sum(count or 0 for count in items)
    return RunProgress(
        total, sum(job.work.items(chunk) or 0 for chunk in done()), len(chunks), lambda: len(done())
    )


@contextlib.contextmanager
def show_progress(share: RunProgress) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        lines = _Lines(share)
        yield lines
        lines.show(last=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("tokenize"), BarColumn(bar_width=None), TextColumn("{task.fields[state]}"))
    with Bar(
        *columns, console=Console(stderr=True), expand=True
    ) as bar:  # the bar takes what the words leave of the line
        shown = _Bar(share, bar)
        yield shown
        shown.show(last=True)


class _Count:
    def __init__(self, share: RunProgress) -> None:
        self.share, self.done, self.rejected = share, share.done, 0
        self._begun_with = share.done
        self._start = (
            time.monotonic()
        )  # loading the models counts: items come in bursts, and the first burst alone is no rate
        self._last: float | None = None  # when items came
        self._chunks, self._chunks_counted = 0, float("-inf")

    def advance(self, finished: int, rejected: int) -> None:
        self.done += finished
        self.rejected += rejected
        self._last = time.monotonic()

    @property
    def rate(self) -> float:
        """Items a second."""
        if self._last is None:
            return 0.0
        finished = self.share.items is not None and self.done >= self.share.items
        seconds = (self._last if finished else time.monotonic()) - self._start  # workers take a while to end
        return (self.done - self._begun_with) / seconds if seconds > 0 else 0.0

    def state(self, last: bool = False) -> str:
        total = self.share.items
        if total is not None:
            count = f"{self.done:,}/{total:,} items"
        else:
            count = f"{self.done:,} items, {self._count_chunks(last)}/{self.share.chunks:,} chunks"
        if self._last is None:
            return f"{count}, loading the models"
        rate = self.rate
        left = (
            f", {(total - self.done) / rate / 60:,.1f} min left"
            if total and rate and self.done < total
            else ""
        )
        speed = (
            f", {rate:,.0f}/s" if rate >= 100 else f", {rate:.3g}/s" if rate else ""
        )  # none yet where all came at once
        return f"{count}{speed}{left}, {self.rejected:,} rejected"

    def _count_chunks(self, now: bool) -> int:
        if now or time.monotonic() - self._chunks_counted > CHUNK_SECONDS:
            self._chunks = self.share.chunks_done()
            self._chunks_counted = time.monotonic()
        return self._chunks


class _Lines(_Count):
    _shown = float("-inf")
    _line = ""

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        line = f"tokenize: {self.state(last)}"
        if line != self._line and (last or now - self._shown > PLAIN_SECONDS):
            self._shown, self._line = now, line
            print(line, file=sys.stderr, flush=True)


class _Bar(_Count):
    def __init__(self, share: RunProgress, bar: Any) -> None:
        super().__init__(share)
        self._bar = bar
        self._task = bar.add_task("tokenize", total=share.items, completed=share.done, state=self.state())

    def show(self, last: bool = False) -> None:
        self._bar.update(self._task, completed=self.done, state=self.state(last))
