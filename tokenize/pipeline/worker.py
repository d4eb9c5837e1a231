"""Chunks from start to end: items in, folders out.

What is in a folder depends on the chunk and the settings alone: not on the number of processes or threads,
not on time or place, not on what was killed before.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from unitoken.tokenize.job import Chunk, Job
from unitoken.tokenize.pipeline.concurrency import (
    ITEM_BYTES,
    ChunkWork,
    Group,
    Limits,
    MemoryBudget,
    encode_groups,
    run_in_thread,
)
from unitoken.tokenize.pipeline.item import Item
from unitoken.tokenize.pipeline.timing import Times, timed
from unitoken.tokenize.pipeline.tokenizer import Tokenizer, group_items
from unitoken.tokenize.pipeline.writer import write_chunk_files

ReportItems = Callable[[int, int], None]  # (items finished, of them rejected), since the last call


def write_chunks(
    tokenizer: Tokenizer, chunks: Iterable[Chunk], report: ReportItems, limits: Limits | None = None
) -> Times:
    """Tokenize chunks and publish their folders.

    What is raised in any of the threads is raised here, and no thread outlives the call.

    Args:
        tokenizer: the loaded models, with the job.
        chunks: the chunks, in the order in which they are written.
        report: called for items that are finished.
        limits: how much travels together and is in memory at once; None for the defaults.

    Returns:
        Where the time went.
    """
    return _ChunkPipeline(tokenizer, report, limits or Limits()).run(chunks)


class _ChunkPipeline:
    """The threads of one call of `write_chunks`, and what they share."""

    def __init__(self, tokenizer: Tokenizer, report: ReportItems, limits: Limits) -> None:
        self._tokenizer, self._report, self._limits = tokenizer, report, limits
        self._budget, self._times = MemoryBudget(limits.held_bytes), Times()

    def run(self, chunks: Iterable[Chunk]) -> Times:
        vision, batch_size = self._tokenizer.vision, self._tokenizer.job.config.vision.batch_size
        start, waited = time.perf_counter(), 0.0

        def add_wait(seconds: float) -> None:
            nonlocal waited
            waited += seconds

        with ThreadPoolExecutor(self._tokenizer.threads, "pictures") as pool:
            opening = run_in_thread(self._read_groups(chunks, pool), "reader")
            opened = (future.result() for future in opening)
            encoded = run_in_thread(
                encode_groups(opened, vision, batch_size, self._times, self._limits.flushed_bytes), "encoder"
            )
            try:
                for work, groups in itertools.groupby(timed(encoded, add_wait), key=lambda group: group.work):
                    self._write_chunk(work, groups)
            finally:
                self._budget.close()
                pool.shutdown(wait=False, cancel_futures=True)
                encoded.close()
                opening.close()
        self._times.total = time.perf_counter() - start
        self._times.write = self._times.total - waited
        return self._times

    def _read_groups(
        self, chunks: Iterable[Chunk], pool: ThreadPoolExecutor
    ) -> Generator[Future[Group], None, None]:
        """In the reader thread: items in groups, whose pictures the pool opens."""

        def add_read(seconds: float) -> None:
            self._times.read += seconds

        for chunk in chunks:
            work = ChunkWork(chunk)
            conversations = self._tokenizer.conversations(chunk, work.rejects)
            groups = group_items(conversations, self._limits.group_items, self._limits.group_images)
            for items in timed(groups, add_read):
                self._budget.wait()
                held = len(items) * ITEM_BYTES
                self._budget.take(held)
                yield pool.submit(self._open_group, Group(work, items, held=held))
            last: Future[Group] = Future()
            last.set_result(Group(work, last=True))
            yield last

    def _open_group(self, group: Group) -> Group:
        """In a picture thread: fetch, decode and crop the pictures of a group."""
        start = time.perf_counter()
        group.items = list(self._tokenizer.with_pictures(group.items, group.work.rejects))
        size = sum(len(picture.original) + picture.pixels.nbytes for picture in group.pictures())
        self._budget.take(size)
        group.held += size
        self._times.add_pictures(time.perf_counter() - start)
        return group

    def _write_chunk(self, work: ChunkWork, groups: Iterable[Group]) -> None:
        """In the worker's own thread: write the folder of a chunk and publish it."""
        samples = self._tokenizer.samples(self._items(work, groups), work.rejects)
        with self._tokenizer.job.output.chunk(work.chunk.name) as folder:
            write_chunk_files(samples, work.rejects, folder.path, self._tokenizer.vocabulary, self._report)
            folder.publish()

    def _items(self, work: ChunkWork, groups: Iterable[Group]) -> Iterator[Item]:
        """Yield the items of a chunk's groups; after each group release its memory and report its rejects."""
        reported = 0
        for group in groups:
            yield from group.items
            self._budget.release(group.held)
            rejected = len(work.rejects.lines) - reported
            self._report(rejected, rejected)
            reported += rejected


def run_rank(job: Job, rank: int, splits: int, report: ReportItems) -> Times:
    """Write the chunks at the places `rank`, `rank + splits`, ... of the job that are not done."""
    mine = job.chunks()[rank::splits]
    done = job.output.done()
    missing = [chunk for chunk in mine if chunk.name not in done]
    if not missing:
        return Times()
    # Checked again when its turn comes: another run may have written the chunk in the meantime.
    still_missing = (chunk for chunk in missing if not job.output.is_done(chunk.name))
    return run_chunks(job, still_missing, report, "cuda" if torch.cuda.is_available() else "cpu")


def run_chunks(job: Job, chunks: Iterable[Chunk], report: ReportItems, device: str) -> Times:
    """Write chunks. The models stay loaded for the next call."""
    with on_one_thread(device):
        return write_chunks(_load_tokenizer_once(job, device), chunks, report)


@contextlib.contextmanager
def on_one_thread(device: str) -> Iterator[None]:
    """Let torch compute with one thread on a CPU.

    The order of a sum depends on the number of threads: with 1 the codes are the same on every machine.
    """
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)  # for a program that goes on with other work


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of giving it back to the kernel with each large tensor.

    To get it anew, in 270,000 page faults a picture of 512 x 512, was more than half of the encoder's time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        libc.mallopt(m_arena_max, 1)  # the arenas of threads other than the first hold 64 MiB at most


_loaded_tokenizers: dict[str, Tokenizer] = {}  # one at most


def _load_tokenizer_once(job: Job, device: str) -> Tokenizer:
    key = f"{device} {job.config.model_dump_json()} {job.file.model_dump_json()}"
    if key not in _loaded_tokenizers:
        _loaded_tokenizers.clear()
        _loaded_tokenizers[key] = Tokenizer(job, device)
    tokenizer = _loaded_tokenizers[key]
    tokenizer.job = job  # its rounds of retries may have changed
    return tokenizer
