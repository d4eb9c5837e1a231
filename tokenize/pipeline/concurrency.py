"""What lets a worker's stages run side by side.

    reader thread           threads for pictures        encoder thread            the worker's own thread
    items -> conversations  fetch, decode, crop    ->   batches -> codes     ->   records -> shards -> chunk
          -> groups

Groups of items go from one to the next in the order of the input, over the borders of chunks. `Room` bounds what is on
the way. Batches hold pictures of one chunk, and which ones follows from the chunk alone: the codes, whose last bits may
depend on the batch, do not depend on what else a process does, or when.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from unitoken.codec.conversations import Conversation
from unitoken.codec.image_tokenizer.encoder import Pending, VisionCodec
from unitoken.tokenize.pipeline.item import NO_PIXELS, Picture, Place
from unitoken.tokenize.pipeline.timing import Times

A = TypeVar("A")

HELD_BYTES = 1 << 30  # on the way between reading and writing
FLUSHED_BYTES = HELD_BYTES // 4  # see `encode`
ITEM_BYTES = 1 << 18  # that an item counts without its pictures: at most 4,096 are on the way
IN_FLIGHT = 2  # batches: while the GPU computes one, the next is there


@dataclass(eq=False)
class Group:
    """Some items of a chunk, in order. The last group of each chunk is empty and says so."""

    chunk: Any  # whatever its groups share
    items: list[tuple[Place, tuple[Conversation, list[Picture]]]] = field(default_factory=list)
    last: bool = False
    held: int = 0  # bytes

    def pictures(self) -> Iterator[Picture]:
        return (picture for _, (_, pictures) in self.items for picture in pictures)

    @property
    def encoded(self) -> bool:
        return all(picture.codes is not None for picture in self.pictures())


class Closed(Exception):  # noqa: N818 - no error: the work ends early
    """Nobody waits for the values any more."""


class Room:
    """Bounds the bytes on the way: who brings more waits while they are too many."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._closed = limit, 0, False
        self._changed = threading.Condition()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._held < self._limit or self._closed)
            if self._closed:
                raise Closed

    def take(self, size: int) -> None:
        with self._changed:
            self._held += size

    def give_back(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def ahead(values: Generator[A, None, None], name: str) -> Generator[A, None, None]:
    """The values, made by a thread of their own while the caller works on those before.

    Whatever is raised there is raised here. Closing it ends the thread behind the value that it is at.
    """
    messages: queue.SimpleQueue[A | _End] = queue.SimpleQueue()
    closed = threading.Event()

    def make() -> None:
        error: BaseException | None = None
        try:
            for value in values:
                messages.put(value)
                if closed.is_set():
                    break
            values.close()
        except BaseException as caught:
            error = caught
        messages.put(_End(error))

    thread = threading.Thread(target=make, name=name)
    thread.start()
    try:
        while not isinstance(message := messages.get(), _End):
            yield message
        if message.error is not None:
            raise message.error
    finally:
        closed.set()
        thread.join()


def encode(
    groups: Iterable[Group], vision: VisionCodec, batch_size: int, times: Times
) -> Generator[Group, None, None]:
    """Groups whose pictures have codes.

    Pictures of one size wait until they fill a batch. What waits is encoded as it is at the end of a chunk, and when
    the groups that came meanwhile hold FLUSHED_BYTES: a rare size must not hold up the others for a whole chunk.
    """
    waiting: deque[Group] = deque()
    batches: dict[tuple[int, ...], list[Picture]] = {}
    held = 0
    flight = Flight(vision, times)
    for group in groups:
        waiting.append(group)
        held += group.held
        for picture in group.pictures():
            batch = batches.setdefault(picture.pixels.shape, [])
            batch.append(picture)
            if len(batch) == batch_size:
                flight.start(batches.pop(picture.pixels.shape))
        if group.last or held >= FLUSHED_BYTES:
            for shape in sorted(batches):
                flight.start(batches.pop(shape))
            held = 0
        while waiting and waiting[0].encoded:
            yield waiting.popleft()
    flight.land(0)
    yield from waiting


class Flight:
    """Batches that were started, and whose codes have not been waited for."""

    def __init__(self, vision: VisionCodec, times: Times) -> None:
        self._vision, self._times = vision, times
        self._batches: deque[tuple[list[Picture], Pending]] = deque()
        self._first: float | None = None

    def start(self, pictures: list[Picture]) -> None:
        pending = self._vision.begin([picture.pixels for picture in pictures])
        self._batches.append((pictures, pending))
        self.land(IN_FLIGHT - 1)

    def land(self, left: int) -> None:
        """Wait for the codes of all batches but the last `left`."""
        while len(self._batches) > left:
            pictures, pending = self._batches.popleft()
            for picture, codes in zip(pictures, pending.codes(), strict=True):
                picture.codes, picture.pixels = codes, NO_PIXELS
            if self._first is None:
                self._first = pending.started
            self._times.images += len(pictures)
            self._times.encode += pending.ended - pending.started
            self._times.encode_span = pending.ended - self._first
