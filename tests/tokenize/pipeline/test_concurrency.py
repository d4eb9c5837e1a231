"""Stages side by side: the order is kept, batches follow from the chunk alone, and ends are prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from unitoken.codec.conversations import Conversation
from unitoken.tokenize.job import Chunk
from unitoken.tokenize.pipeline.concurrency import (
    IN_FLIGHT,
    ChunkWork,
    Closed,
    Group,
    Limits,
    MemoryBudget,
    encode_groups,
    run_in_thread,
)
from unitoken.tokenize.pipeline.item import Item, Picture, Place
from unitoken.tokenize.pipeline.timing import Times, timed


def counting(stop: int, seen: list[int] | None = None) -> Generator[int, None, None]:
    for number in range(stop):
        if seen is not None:
            seen.append(number)
        yield number


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_values_come_in_their_order_and_from_another_thread() -> None:
    def thread_name() -> Generator[str, None, None]:
        yield threading.current_thread().name

    assert list(run_in_thread(counting(1000), "a")) == list(range(1000))
    assert list(run_in_thread(thread_name(), "maker")) == ["maker"]


def test_an_exception_of_the_thread_comes_after_its_values() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise MemoryError("full")

    values = run_in_thread(failing(), "a")
    assert next(values) == 1
    with pytest.raises(MemoryError, match="full"):
        next(values)


def test_closing_ends_the_thread_and_its_generator() -> None:
    closed = []

    def endless() -> Generator[int, None, None]:
        try:
            number = 0
            while True:
                time.sleep(0.001)
                yield (number := number + 1)
        finally:
            closed.append(threading.current_thread().name)

    values = run_in_thread(endless(), "maker")
    assert next(values) == 1
    values.close()
    assert closed == ["maker"]


def test_one_thread_reads_from_another() -> None:
    first = run_in_thread(counting(100), "a")
    assert list(run_in_thread((2 * number for number in first), "b")) == [2 * number for number in range(100)]


def test_a_producer_waits_until_the_budget_has_room() -> None:
    budget = MemoryBudget(100)
    steps: list[str] = []

    def produce() -> None:
        for _ in range(3):
            budget.wait()
            budget.take(60)
            steps.append("take")

    thread = threading.Thread(target=produce)
    thread.start()
    while len(steps) < 2:  # 60 held is below the limit, 120 is not
        time.sleep(0.001)
    time.sleep(0.02)
    steps.append("release")
    budget.release(60)
    thread.join(5)
    assert steps == ["take", "take", "release", "take"]


def test_a_closed_budget_ends_all_waiting() -> None:
    budget = MemoryBudget(1)
    budget.take(5)
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(Closed):
            budget.wait()
        ended.append("closed")

    thread = threading.Thread(target=wait)
    thread.start()
    budget.close()
    thread.join(5)
    assert ended == ["closed"]


class Vision:
    """Its codes are the names of the pictures; they are made when they are collected, and not before."""

    codebook_size, downsampling, fingerprint = 10, 1, "fake"

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.landed: list[int] = []
        self.most_in_flight = 0

    def begin(self, pictures: Sequence[np.ndarray]) -> Any:
        number = len(self.batches)
        self.batches.append([int(picture[0, 0, 0]) for picture in pictures])
        self.most_in_flight = max(self.most_in_flight, len(self.batches) - len(self.landed))
        return Pending(self, number)


class Pending:
    def __init__(self, vision: Vision, number: int) -> None:
        self.vision, self.number = vision, number
        self.started, self.ended = number * 10.0 + 5, number * 10.0 + 12 - 3

    def codes(self) -> np.ndarray:
        self.vision.landed.append(self.number)
        return np.array(self.vision.batches[self.number])[:, None, None]


def group(chunk: str, *pictures: tuple[int, int], last: bool = False, held: int = 0) -> Group:
    """Each picture is given as (its name, its side)."""
    items = []
    for name, side in pictures:
        picture = Picture(b"", (side, side), np.full((side, side, 3), name, np.uint8))
        conversation = Conversation(str(name), (), ("x",))
        items.append(Item(Place(0, "f", name, str(name)), conversation, ".", (picture,)))
    return Group(ChunkWork(Chunk(chunk, ())), items, last, held)


def run(
    groups: list[Group], batch_size: int, flushed_bytes: int = Limits.flushed_bytes
) -> tuple[Vision, list[Group], Times]:
    vision, times = Vision(), Times()
    out = list(encode_groups(iter(groups), vision, batch_size, times, flushed_bytes))  # type: ignore[arg-type]
    return vision, out, times


def test_batches_hold_pictures_of_one_size_and_one_chunk() -> None:
    groups = [
        group("a", (1, 8), (2, 16), (3, 8)),
        group("a", (4, 8), (5, 16)),
        group("a", last=True),
        group("b", (6, 8)),
        group("b", last=True),
    ]
    vision, out, _ = run(groups, 2)
    assert vision.batches == [[1, 3], [2, 5], [4], [6]]
    assert out == groups
    for one in out:
        for item in one.items:
            (picture,) = item.pictures
            assert picture.codes is not None
            assert picture.codes.tolist() == [[item.place.position]]
            assert picture.pixels.size == 0


def test_batches_do_not_depend_on_the_chunks_before() -> None:
    def chunk(name: str) -> list[Group]:
        groups = [
            group(name, *[(n, 8 * (n % 3 + 1)) for n in range(k, k + 3)], held=30) for k in range(0, 30, 3)
        ]
        return [*groups, group(name, last=True)]

    alone, _, _ = run(chunk("b"), 4)
    both, _, _ = run([*chunk("a"), *chunk("b")], 4)
    assert both.batches == [*alone.batches, *alone.batches]


def test_a_rare_size_holds_up_the_others_for_a_while_only() -> None:
    groups = [
        group("a", (0, 16), held=25),
        *[group("a", (n, 8), held=25) for n in range(1, 8)],
        group("a", last=True),
    ]
    vision, _, _ = run(groups, 4, flushed_bytes=100)
    assert vision.batches == [[1, 2, 3], [0], [4, 5, 6, 7]]


def test_a_second_batch_starts_before_the_first_is_collected() -> None:
    vision, _, times = run([group("a", *[(n, 8) for n in range(12)]), group("a", last=True)], 2)
    assert vision.most_in_flight == IN_FLIGHT == 2
    assert vision.landed == list(range(6))
    assert times.images == 12


def test_the_next_chunk_is_read_while_a_batch_is_in_flight() -> None:
    vision = Vision()
    groups = [group("a", (1, 8)), group("a", last=True), group("b", (2, 8)), group("b", last=True)]
    read: list[str] = []

    def reading() -> Iterator[Group]:
        for one in groups:
            read.append(one.work.chunk.name)
            yield one

    first = next(encode_groups(reading(), vision, 8, Times()))  # type: ignore[arg-type]
    assert first is groups[0]
    assert read == ["a", "a", "b", "b"]


def test_times_show_how_long_the_image_tokenizer_waited() -> None:
    _, _, times = run([group("a", *[(n, 8) for n in range(4)]), group("a", last=True)], 1)
    assert times.encode == pytest.approx(4 * 4)
    assert times.encode_span == pytest.approx(39 - 5)
    assert times.gpu_wait_share == pytest.approx(1 - 16 / 34)
    assert "waited 53% of the time" in times.summary()
    both = times + times
    assert (both.images, both.workers, both.gpu_wait_share) == (8, 2, times.gpu_wait_share)


def test_times_without_images_have_a_summary() -> None:
    assert "no images" in Times().summary()
    assert Times().gpu_wait_share == 0


def test_timed_counts_only_the_seconds_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    seconds: list[float] = []

    def slow() -> Iterator[int]:
        for number in range(3):
            clock[0] += 1
            yield number

    for _ in timed(slow(), seconds.append):
        clock[0] += 10
    assert seconds == [1, 1, 1, 0]
