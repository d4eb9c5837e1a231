"""Show how far a run is, on stderr: as a bar on a terminal, as a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unitoken.common.cli import notify
from unitoken.tokenize.job import Chunk, Job

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
CHUNK_SECONDS = 10.0  # between counts of the chunks that are done: each asks the file system or the bucket


@dataclass(frozen=True)
class RunProgress:
    """How much work there is, and how much of it was done before the run began."""

    items: int | None  # None: known only after reading
    done: int  # items
    chunks: int
    count_done_chunks: Callable[[], int]


class Progress(Protocol):
    """What shows the progress of a run."""

    def advance(self, finished: int, rejected: int) -> None:
        """Count items that were finished since the last call, and how many of them were rejected."""
        ...

    def show(self) -> None:
        """Show the present state, if it is time to."""
        ...


def progress_of(job: Job, chunks: Sequence[Chunk]) -> RunProgress:
    """Count the work of a run that writes `chunks`, and what of it is done.

    After a round of retries was begun, only the last round counts: the rest is done.
    """
    if job.work.rounds:
        chunks = [chunk for chunk in chunks if chunk.round == len(job.work.rounds)]

    def done_chunks() -> list[Chunk]:
        names = job.output.done()
        return [chunk for chunk in chunks if chunk.name in names]

    counts = [job.work.count_items(chunk) for chunk in chunks]
    known = [count for count in counts if count is not None]
    return RunProgress(
        items=sum(known) if len(known) == len(counts) else None,
        done=sum(job.work.count_items(chunk) or 0 for chunk in done_chunks()),
        chunks=len(chunks),
        count_done_chunks=lambda: len(done_chunks()),
    )


@contextlib.contextmanager
def show_progress(work: RunProgress) -> Iterator[Progress]:
    """Show the progress of a run until the block ends."""
    if not sys.stderr.isatty():
        lines = ItemProgressLines(work)
        yield lines
        lines.show(last=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    # The bar takes the width that the texts leave.
    columns = (TextColumn("tokenize"), BarColumn(bar_width=None), TextColumn("{task.fields[state]}"))
    with RichProgress(*columns, console=Console(stderr=True), expand=True) as rich_progress:
        bar = ItemProgressBar(work, rich_progress)
        yield bar
        bar.show(last=True)


class ProgressCount:
    """Counts items and puts the state of a run into a few words."""

    def __init__(self, work: RunProgress) -> None:
        self.work, self.done, self.rejected = work, work.done, 0
        self._done_before = work.done
        # Loading the models counts: items come in bursts, and the first burst alone gives no rate.
        self._start = time.monotonic()
        self._last_items: float | None = None  # the time when items were finished last
        self._done_chunks, self._chunks_counted = 0, float("-inf")

    def advance(self, finished: int, rejected: int) -> None:
        """Count items that were finished since the last call."""
        self.done += finished
        self.rejected += rejected
        self._last_items = time.monotonic()

    @property
    def rate(self) -> float:
        """Items a second."""
        if self._last_items is None:
            return 0.0
        finished = self.work.items is not None and self.done >= self.work.items
        end = self._last_items if finished else time.monotonic()  # workers take a while to end
        seconds = end - self._start
        return (self.done - self._done_before) / seconds if seconds > 0 else 0.0

    def state(self, last: bool = False) -> str:
        """Return the counts, the rate, and the time left.

        Args:
            last: whether the run has ended; chunks are counted anew then.
        """
        total = self.work.items
        if total is not None:
            count = f"{self.done:,}/{total:,} items"
        else:
            count = f"{self.done:,} items, {self._count_chunks(last)}/{self.work.chunks:,} chunks"
        if self._last_items is None:
            return f"{count}, loading the models"
        rate = self.rate
        speed, left = "", ""
        if rate:  # 0 where all items came in no time
            speed = f", {rate:,.0f}/s" if rate >= 100 else f", {rate:.3g}/s"
            if total and self.done < total:
                left = f", {(total - self.done) / rate / 60:,.1f} min left"
        return f"{count}{speed}{left}, {self.rejected:,} rejected"

    def _count_chunks(self, now: bool) -> int:
        if now or time.monotonic() - self._chunks_counted > CHUNK_SECONDS:
            self._done_chunks = self.work.count_done_chunks()
            self._chunks_counted = time.monotonic()
        return self._done_chunks


class ItemProgressLines(ProgressCount):
    """Progress as lines of text."""

    _shown = float("-inf")
    _last_line = ""

    def show(self, last: bool = False) -> None:
        """Print the state if it has changed and the last line is old enough."""
        now = time.monotonic()
        line = f"tokenize: {self.state(last)}"
        if line != self._last_line and (last or now - self._shown > PLAIN_SECONDS):
            self._shown, self._last_line = now, line
            notify(line)


class ItemProgressBar(ProgressCount):
    """Progress as a bar of rich."""

    def __init__(self, work: RunProgress, rich_progress: Any) -> None:
        super().__init__(work)
        self._rich = rich_progress
        self._task = rich_progress.add_task(
            "tokenize", total=work.items, completed=work.done, state=self.state()
        )

    def show(self, last: bool = False) -> None:
        """Update the bar."""
        self._rich.update(self._task, completed=self.done, state=self.state(last))
