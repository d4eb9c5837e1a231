"""Chunks from start to end: items in, folders out.

What is in a folder depends on the chunk and the settings alone: not on the number of processes or threads, not on time
or place, not on what was killed before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from unitoken.codec.conversations import Conversation, ItemError, item_id, parse, refuse_empty, short_name
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.codec.sequence import assemble, check_length
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.manifest import INDEX, REJECTS
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, image_tokens
from unitoken.storage.store import is_url, split
from unitoken.tokenize.job import Chunk, Job
from unitoken.tokenize.pipeline import concurrency
from unitoken.tokenize.pipeline.concurrency import Group, Room
from unitoken.tokenize.pipeline.item import Picture, Place, Rejects
from unitoken.tokenize.pipeline.timing import Times, timed
from unitoken.tokenize.pipeline.writer import PictureSizes, note_left_out, write
from unitoken.tokenize.sources import reader
from unitoken.tokenize.sources.adapters import find_adapter
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES, PictureReader

GROUP_ITEMS, GROUP_IMAGES = 64, 8  # that travel together; a thread decodes the images of a group
MAX_THREADS = 8

ReportItems = Callable[[int, int], None]  # (items finished, of them rejected), since the last call


@dataclass(eq=False)
class ChunkWork:
    """A chunk on its way through the stages."""

    chunk: Chunk
    rejects: Rejects = field(default_factory=Rejects)
    turns_left_out: int = 0


class Tokenizer:
    """What a worker loads once, for all its chunks."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self._config = job, job.config
        self._compat = job.config.compat is not None
        self.vocabulary = job.vocabulary()
        self._text = TextEncoder(load_tokenizer(job.config.tokenizer), self.vocabulary, self._compat)
        self.vision = load_vision(job.config.vision, device)
        self._adapter = find_adapter(job.config.adapter)
        self._pictures = PictureReader(
            job.config.allow_http, job.config.allow_private, job.config.timeout_seconds
        )
        self._threads = job.config.threads or min(MAX_THREADS, os.cpu_count() or 1)
        unit = self.vision.downsampling * LATENTS_PER_GRID_UNIT
        self._crops = images.crops(job.config.crop, job.config.target_size, unit)

    def write_chunks(self, chunks: Iterable[Chunk], report: ReportItems) -> Times:
        """What is raised in any of the threads is raised here, and no thread outlives that."""
        times, room = Times(), Room(concurrency.HELD_BYTES)
        start, waited = time.perf_counter(), 0.0

        def wait(seconds: float) -> None:
            nonlocal waited
            waited += seconds

        with ThreadPoolExecutor(self._threads, "pictures") as pool:
            opened = concurrency.ahead(self._open_ahead(chunks, pool, room, times), "reader")
            groups = (future.result() for future in opened)
            encoded = concurrency.ahead(
                concurrency.encode(groups, self.vision, self._config.vision.batch_size, times), "encoder"
            )
            try:
                for work, of_chunk in itertools.groupby(timed(encoded, wait), key=lambda group: group.chunk):
                    self._write(work, of_chunk, room, report)
            finally:
                room.close()
                pool.shutdown(wait=False, cancel_futures=True)
                encoded.close()
                opened.close()
        times.total = time.perf_counter() - start
        times.write = times.total - waited
        return times

    # --- reader thread ---

    def _open_ahead(
        self, chunks: Iterable[Chunk], pool: ThreadPoolExecutor, room: Room, times: Times
    ) -> Generator[Future[Group], None, None]:
        def read(seconds: float) -> None:
            times.read += seconds

        for chunk in chunks:
            work = ChunkWork(chunk)
            for items in timed(_grouped(self._conversations(work)), read):
                room.wait()
                held = len(items) * concurrency.ITEM_BYTES
                room.take(held)
                yield pool.submit(self._open_group, Group(work, held=held), items, room, times)
            last: Future[Group] = Future()
            last.set_result(Group(work, last=True))
            yield last

    def _conversations(self, work: ChunkWork) -> Iterator[tuple[Place, tuple[Conversation, str]]]:
        """The chunk's conversations, and where the names of their images begin."""
        raw = (
            (self._place(item), item)
            for piece, taken in work.chunk.parts
            for item in reader.read_piece(self.job.input, piece, taken)
        )
        items = work.rejects.sift("source", _readable, raw)
        adapted = work.rejects.sift("adapter", self._adapt, items)
        return work.rejects.sift("conversation", self._parse, adapted)

    def _place(self, item: reader.Item) -> Place:
        name = reader.item_name(self.job.input, item)
        with contextlib.suppress(ItemError):
            name = item_id(item.value, name)
        return Place(item.piece, _file_name(self.job.input.files[item.file].name), item.position, name)

    def _adapt(self, _: Place, item: reader.Item) -> tuple[dict[str, Any], str]:
        return self._adapter(item.value), reader.folder_of(self.job.input, item.file)  # type: ignore[arg-type]

    def _parse(self, place: Place, value: tuple[dict[str, Any], str]) -> tuple[Conversation, str]:
        conversation = parse(value[0], place.id)
        if not self._compat:
            refuse_empty(conversation)
        return conversation, value[1]

    # --- threads for pictures ---

    def _open_group(
        self, group: Group, items: list[tuple[Place, tuple[Conversation, str]]], room: Room, times: Times
    ) -> Group:
        start = time.perf_counter()
        group.items = list(group.chunk.rejects.sift("image", self._open, items))
        size = sum(len(picture.original) + picture.pixels.nbytes for picture in group.pictures())
        room.take(size)
        group.held += size
        times.add_pictures(time.perf_counter() - start)
        return group

    def _open(self, _: Place, value: tuple[Conversation, str]) -> tuple[Conversation, list[Picture]]:
        """One bad image spoils the item."""
        conversation, base = value
        pictures: list[Picture] = []
        room = MAX_ITEM_BYTES
        tokens = 0
        for number, source in enumerate(conversation.images):
            data = self._pictures.read(base, source, room)
            room -= len(data)
            try:
                picture = self._crop(data, conversation.id, number)
            except ImageError as error:
                raise ItemError(f"unusable image: {short_name(source)}: {error}") from None
            tokens += image_tokens(*(side // self.vision.downsampling for side in picture.pixels.shape[:2]))
            check_length(tokens, self._config.max_tokens, "tokens in its images alone")
            pictures.append(picture)
        return conversation, pictures

    def _crop(self, data: bytes, item: str, number: int) -> Picture:
        with images.decoded(data, self._compat) as image:
            crop = images.choose_crop(image.size, self._crops)
            chance = (
                images.crop_chance(self._config.seed, item, number)
                if self._config.crop_position == "random"
                else None
            )
            return Picture(data, image.size, images.tokenizer_pixels(image, crop, chance))

    # --- the worker's own thread ---

    def _write(self, work: ChunkWork, groups: Iterable[Group], room: Room, report: ReportItems) -> None:
        items = _items(groups, work.rejects, room, report)
        records = work.rejects.sift("sequence", functools.partial(self._assemble, work), items)
        with self.job.output.chunk(work.chunk.name) as folder:
            write((value for _, value in records), folder.path, self.vocabulary, report)
            (folder.path / REJECTS).write_bytes(work.rejects.dump())
            note_left_out(folder.path / INDEX, work.turns_left_out)
            folder.publish()

    def _assemble(
        self, work: ChunkWork, _: Place, value: tuple[Conversation, list[Picture]]
    ) -> tuple[Record, PictureSizes]:
        conversation, pictures = value
        codes = [picture.codes for picture in pictures if picture.codes is not None]
        record = assemble(
            conversation, codes, [picture.original for picture in pictures], self._text, self.vocabulary
        )
        check_length(len(record.tokens), self._config.max_tokens)
        work.turns_left_out += conversation.turns_left_out
        return record, [picture.size for picture in pictures]


def _file_name(name: str) -> str:
    """Without its folder, on which a dataset does not depend, and without what signs a URL."""
    return split(name.partition("?")[0] if is_url(name) else name)[1]


def _readable(_: Place, item: reader.Item) -> reader.Item:
    if isinstance(item.value, ItemError):
        raise item.value
    return item


def _grouped(
    conversations: Iterable[tuple[Place, tuple[Conversation, str]]],
) -> Iterator[list[tuple[Place, tuple[Conversation, str]]]]:
    group: list[tuple[Place, tuple[Conversation, str]]] = []
    pictures = 0
    for place, (conversation, base) in conversations:
        group.append((place, (conversation, base)))
        pictures += len(conversation.images)
        if len(group) == GROUP_ITEMS or pictures >= GROUP_IMAGES:
            yield group
            group, pictures = [], 0
    if group:
        yield group


def _items(
    groups: Iterable[Group], rejects: Rejects, room: Room, report: ReportItems
) -> Iterator[tuple[Place, tuple[Conversation, list[Picture]]]]:
    """The items of a chunk's groups; what has been written makes room."""
    reported = 0
    for group in groups:
        yield from group.items
        room.give_back(group.held)
        fallen = len(rejects.lines) - reported
        report(fallen, fallen)
        reported += fallen


def run_rank(job: Job, rank: int, splits: int, report: ReportItems) -> Times:
    """The chunks at the places `rank`, `rank + splits`, ... that are not done."""
    mine = job.chunks()[rank::splits]
    done = job.output.done()
    missing = [chunk for chunk in mine if chunk.name not in done]
    if not missing:
        return Times()
    # Asked once more when its turn comes: another run may have done it.
    return run_chunks(
        job, (chunk for chunk in missing if not job.output.is_done(chunk.name)), report, _device()
    )


def run_chunks(job: Job, chunks: Iterable[Chunk], report: ReportItems, device: str) -> Times:
    """The models stay loaded for the next call."""
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(
            1
        )  # a sum's order depends on the threads: 1 everywhere gives the same codes everywhere
        keep_freed_memory()
    try:
        return _tokenizer(job, device).write_chunks(chunks, report)
    finally:
        torch.set_num_threads(threads)  # of a program that goes on with other work


def keep_freed_memory() -> None:
    """Let glibc use freed memory again instead of giving it back to the kernel with each large tensor: getting it anew,
    in 270,000 page faults a picture of 512 x 512, was more than half of the encoder's time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        libc.mallopt(m_arena_max, 1)  # the arenas of threads other than the first hold 64 MiB at most


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


_loaded: dict[str, Tokenizer] = {}


def _tokenizer(job: Job, device: str) -> Tokenizer:
    key = f"{device} {job.config.model_dump_json()} {job.file.model_dump_json()}"
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = Tokenizer(job, device)
    tokenizer = _loaded[key]
    tokenizer.job = job  # its rounds of retries may be others
    return tokenizer
