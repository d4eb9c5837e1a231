"""Where a worker's time went."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

T = TypeVar("T")

_LOCK = threading.Lock()


@dataclass
class Times:
    """Seconds in each stage. Stages run side by side, so they add up to more than `total`."""

    total: float = 0.0
    read: float = 0.0  # of the input, with adapter and conversation
    pictures: float = 0.0  # fetched, decoded, cropped; over all threads
    encode: float = 0.0  # the image tokenizer at work
    encode_span: float = 0.0  # from the start of its first batch to the end of its last
    write: float = 0.0  # text -> ids, shards, sidecar, publishing
    images: int = 0
    workers: int = 1

    @property
    def gpu_wait_share(self) -> float:
        """The share of the time from its first to its last batch in which the image tokenizer had no work."""
        return 1 - self.encode / self.encode_span if self.encode_span else 0.0

    def add_pictures(self, seconds: float) -> None:
        """Add to `pictures`. Safe to call from several threads."""
        with _LOCK:
            self.pictures += seconds

    def __add__(self, other: Times) -> Times:
        return Times(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def summary(self) -> str:
        """Return a line for the end of a run."""
        seconds = f"read {self.read:.1f} s, pictures {self.pictures:.1f} s, write {self.write:.1f} s"
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        if not self.images:
            return f"{seconds}, no images; {workers}"
        return (
            f"the image tokenizer waited {self.gpu_wait_share:.0%} of the time: "
            f"encode {self.encode:.1f} s of {self.encode_span:.1f} s for {self.images:,} images; "
            f"beside it {seconds}; {workers}"
        )


def timed(values: Iterable[T], add: Callable[[float], None]) -> Iterator[T]:
    """Yield the values, and call `add` with the seconds that each of them took to come."""
    iterator = iter(values)
    while True:
        start = time.perf_counter()
        try:
            value = next(iterator)
        except StopIteration:
            return
        finally:
            add(time.perf_counter() - start)
        yield value
