"""Run a worker's stages side by side.

    reader thread           picture threads             encoder thread            the worker's own thread
    items -> conversations  fetch, decode, crop    ->   batches -> codes     ->   records -> shards -> chunk
          -> groups

Groups of items pass from stage to stage in the order of the input, across the borders of chunks.
`MemoryBudget` bounds the bytes on the way. A batch holds pictures of one chunk, and which pictures follows
from the chunk alone: codes, whose last bits may depend on the batch, then depend neither on the process's
other work nor on timing.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from unitoken.codec.image_tokenizer.encoder import Pending, VisionCodec
from unitoken.tokenize.job import Chunk
from unitoken.tokenize.pipeline.item import NO_PIXELS, Item, Picture, Rejects
from unitoken.tokenize.pipeline.timing import Times

T = TypeVar("T")

ITEM_BYTES = 1 << 18  # what an item counts without its pictures: at most 4,096 are on the way
IN_FLIGHT = 2  # batches: while the GPU computes one, the next is ready


@dataclass(frozen=True)
class Limits:
    """How much travels together, and how much may be on the way."""

    group_items: int = 64
    group_images: int = 8  # a thread decodes the images of a group
    held_bytes: int = 1 << 30  # on the way between reading and writing
    flushed_bytes: int = 1 << 28  # see `encode_groups`


@dataclass(eq=False)
class ChunkWork:
    """A chunk on its way through the stages."""

    chunk: Chunk
    rejects: Rejects = field(default_factory=Rejects)


@dataclass(eq=False)
class Group:
    """Some items of a chunk, in order. The last group of each chunk is empty and marked as the last."""

    work: ChunkWork
    items: list[Item] = field(default_factory=list)
    last: bool = False
    held: int = 0  # bytes that it counts in the budget

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures of all items."""
        return (picture for item in self.items for picture in item.pictures)

    @property
    def encoded(self) -> bool:
        """Whether every picture has its codes."""
        return all(picture.codes is not None for picture in self.pictures())


class Closed(Exception):  # noqa: N818 - no error: the work ends early
    """The budget was closed, because nobody needs further values."""


class MemoryBudget:
    """Bounds the bytes on the way: `wait` blocks the producer while they have reached the limit."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._closed = limit, 0, False
        self._changed = threading.Condition()

    def wait(self) -> None:
        """Block until less than the limit is taken. Raises Closed after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._held < self._limit or self._closed)
            if self._closed:
                raise Closed

    def take(self, size: int) -> None:
        """Count `size` more bytes, without waiting."""
        with self._changed:
            self._held += size

    def release(self, size: int) -> None:
        """Count `size` bytes less, and wake up whoever waits."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _EndOfValues:
    error: BaseException | None


def run_in_thread(values: Generator[T, None, None], name: str) -> Generator[T, None, None]:
    """Yield the values of a generator that runs ahead in a thread of its own.

    An exception that the generator raises is raised here, after the values before it. Closing the returned
    generator ends the thread after the value that it is making.

    Args:
        values: the generator to run.
        name: the thread's name.
    """
    messages: queue.SimpleQueue[T | _EndOfValues] = queue.SimpleQueue()
    closed = threading.Event()

    def produce() -> None:
        error: BaseException | None = None
        try:
            for value in values:
                messages.put(value)
                if closed.is_set():
                    break
            values.close()
        except BaseException as caught:
            error = caught
        messages.put(_EndOfValues(error))

    thread = threading.Thread(target=produce, name=name)
    thread.start()
    try:
        while True:
            message = messages.get()
            if isinstance(message, _EndOfValues):
                break
            yield message
        if message.error is not None:
            raise message.error
    finally:
        closed.set()
        thread.join()


def encode_groups(
    groups: Iterable[Group],
    vision: VisionCodec,
    batch_size: int,
    times: Times,
    flushed_bytes: int = Limits.flushed_bytes,
) -> Generator[Group, None, None]:
    """Yield the groups in order, their pictures with codes.

    Pictures of one size wait until they fill a batch. Unfilled batches are encoded at the end of a chunk, and
    whenever the groups that came since then hold `flushed_bytes`: a rare size must not hold up the others for
    a whole chunk.
    """
    waiting: deque[Group] = deque()
    batches: dict[tuple[int, ...], list[Picture]] = {}
    held = 0
    in_flight = BatchesInFlight(vision, times)
    for group in groups:
        waiting.append(group)
        held += group.held
        for picture in group.pictures():
            batch = batches.setdefault(picture.pixels.shape, [])
            batch.append(picture)
            if len(batch) == batch_size:
                in_flight.start(batches.pop(picture.pixels.shape))
        if group.last or held >= flushed_bytes:
            for shape in sorted(batches):
                in_flight.start(batches.pop(shape))
            held = 0
        while waiting and waiting[0].encoded:
            yield waiting.popleft()
    in_flight.finish(left=0)
    yield from waiting


class BatchesInFlight:
    """Batches that were started, and whose codes have not been collected yet."""

    def __init__(self, vision: VisionCodec, times: Times) -> None:
        self._vision, self._times = vision, times
        self._batches: deque[tuple[list[Picture], Pending]] = deque()
        self._first_started: float | None = None

    def start(self, pictures: list[Picture]) -> None:
        """Start to encode a batch of pictures of one size."""
        pending = self._vision.begin([picture.pixels for picture in pictures])
        self._batches.append((pictures, pending))
        self.finish(left=IN_FLIGHT - 1)

    def finish(self, left: int) -> None:
        """Wait for the codes of all batches but the last `left`."""
        while len(self._batches) > left:
            pictures, pending = self._batches.popleft()
            for picture, codes in zip(pictures, pending.codes(), strict=True):
                picture.codes, picture.pixels = codes, NO_PIXELS
            if self._first_started is None:
                self._first_started = pending.started
            self._times.images += len(pictures)
            self._times.encode += pending.ended - pending.started
            self._times.encode_span = pending.ended - self._first_started
