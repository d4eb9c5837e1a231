"""One chunk from start to end: items in, a folder out.

What is in the folder depends on the chunk and the settings alone: not on the number of processes, not on time or
place, not on what was killed before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from streaming import MDSWriter

from unitoken.streaming_data import images
from unitoken.streaming_data.files import AsideFolder
from unitoken.streaming_data.manifest import REJECTS, SIDECAR, VOCABULARY, samples_schema
from unitoken.streaming_data.record import Record, columns
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.tokenize.conversations import Conversation, ItemError, item_id, parse
from unitoken.tokenize.job import Job
from unitoken.tokenize.sequence import assemble
from unitoken.tokenize.sources import Chunk, cut, load_items
from unitoken.tokenize.text import TextEncoder, load_tokenizer
from unitoken.tokenize.vision import VisionCodec, load_vision

SHARD_BYTES = 1 << 26  # 64 MiB
MAX_ITEM_BYTES = 1 << 30  # of encoded images; a shard's offsets end at 4 GiB

Report = Callable[[int, int], None]  # (items finished, of them rejected), since the last call
Codes = npt.NDArray[np.int64]  # (h, w)
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Picture:
    original: bytes
    size: tuple[int, int]  # width, height, as it is seen
    pixels: npt.NDArray[np.uint8]  # (H, W, 3), as the image tokenizer sees it


@dataclass(frozen=True)
class Item:
    """An item on its way through the stages: `value` is what the last stage made of it."""

    position: int
    id: str


@dataclass
class Rejects:
    """Runs stages, and keeps what falls out of them."""

    report: Report
    lines: list[dict[str, Any]] = field(default_factory=list)

    def sift(self, stage: str, function: Callable[[Item, A], B], values: Iterable[tuple[Item, A]]) -> Iterator[tuple[Item, B]]:
        for item, value in values:
            try:
                result = function(item, value)
            except ItemError as error:
                self.lines.append({"position": item.position, "id": item.id, "stage": stage, "reason": str(error)})
                self.report(1, 1)
            else:
                yield item, result

    def dump(self) -> bytes:
        """JSON lines by position."""
        lines = sorted(self.lines, key=lambda line: int(line["position"]))
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


class Tokenizer:
    """What a worker loads once, for all its chunks."""

    def __init__(self, job: Job, device: str) -> None:
        self.job = job
        compat = job.config.compat is not None
        self.vocabulary = Vocabulary.load(job.out / VOCABULARY)
        self.text = TextEncoder(load_tokenizer(job.config.tokenizer), self.vocabulary, compat)
        self.vision = load_vision(job.config.vision.weights, device)
        self.compat = compat
        size, unit = job.config.target_size, self.vision.downsampling * 2
        self.crops = [(size, size)] if job.config.crop == "square" else images.crop_sizes(size, patch=unit)

    def write_chunk(self, chunk: Chunk, report: Report) -> None:
        rejects = Rejects(report)
        items = ((Item(position, _name(item, position)), item) for position, item in enumerate(chunk.items, chunk.start))
        conversations = rejects.sift("conversation", lambda item, raw: parse(raw, item.position), items)
        pictured = rejects.sift("image", self._open, conversations)
        encoded = encode_images(pictured, self.vision, self.job.config.vision.batch_size)
        records = rejects.sift("sequence", self._assemble, encoded)
        with AsideFolder(self.job.out / chunk.name) as folder:
            write(records, folder.path, self.vocabulary, report)
            (folder.path / REJECTS).write_bytes(rejects.dump())
            folder.publish()

    def _open(self, _: Item, conversation: Conversation) -> tuple[Conversation, list[Picture]]:
        """Relative paths start at the input file. One bad image spoils the item."""
        pictures: list[Picture] = []
        room = MAX_ITEM_BYTES
        for path in conversation.images:
            data = read_image(self.job.source.parent, path, room)
            room -= len(data)
            try:
                image = images.decode(data, self.compat)
                crop = images.choose_crop(image.size, self.crops)
                pictures.append(Picture(data, image.size, images.tokenizer_pixels(image, crop)))
            except images.ImageError as error:
                raise ItemError(f"unusable image: {path}: {error}") from None
        return conversation, pictures

    def _assemble(self, _: Item, value: tuple[Conversation, list[Picture], list[Codes]]) -> tuple[Record, list[tuple[int, int]]]:
        conversation, pictures, codes = value
        record = assemble(conversation, codes, [picture.original for picture in pictures], self.text, self.vocabulary)
        return record, [picture.size for picture in pictures]


def _name(item: object, position: int) -> str:
    try:
        return item_id(item, position)
    except ItemError:
        return str(position)


def read_image(base: Path, path: str, room: int) -> bytes:
    try:
        file = base / path
        if not file.is_file():  # before it is opened: a pipe would never end
            raise ItemError(f"no such image file: {path}")
        if (size := file.stat().st_size) > room:
            raise ItemError(f"images too large: {path}: {size} bytes, {room} are left of {MAX_ITEM_BYTES} for an item")
        return file.read_bytes()
    except OSError as error:
        raise ItemError(f"unreadable image file: {path}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, ItemError):
            raise
        raise ItemError(f"no such image file: {path!r}: {error}") from None  # a zero byte in the path


def encode_images(
    values: Iterable[tuple[Item, tuple[Conversation, list[Picture]]]], vision: VisionCodec, batch_size: int
) -> Iterator[tuple[Item, tuple[Conversation, list[Picture], list[Codes]]]]:
    """Image codes for each item, in batches over items and by size. Batches end with the chunk, so that the codes,
    whose last bits may depend on the batch, do not depend on which process did which chunk."""
    waiting: list[tuple[Item, tuple[Conversation, list[Picture]]]] = []
    images_waiting = 0
    for value in values:
        waiting.append(value)
        images_waiting += len(value[1][1])
        if images_waiting >= batch_size or len(waiting) >= 1024:
            yield from _encode_all(waiting, vision, batch_size)
            waiting, images_waiting = [], 0
    yield from _encode_all(waiting, vision, batch_size)


def _encode_all(
    waiting: list[tuple[Item, tuple[Conversation, list[Picture]]]], vision: VisionCodec, batch_size: int
) -> Iterator[tuple[Item, tuple[Conversation, list[Picture], list[Codes]]]]:
    pixels = [picture.pixels for _, (_, pictures) in waiting for picture in pictures]
    codes: dict[int, Codes] = {}
    for shape in sorted({array.shape for array in pixels}):
        same = [number for number, array in enumerate(pixels) if array.shape == shape]
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            codes.update(zip(batch, vision.encode(np.stack([pixels[number] for number in batch])), strict=True))
    taken = 0
    for item, (conversation, pictures) in waiting:
        yield item, (conversation, pictures, [codes[taken + n] for n in range(len(pictures))])
        taken += len(pictures)


def write(
    records: Iterable[tuple[Item, tuple[Record, list[tuple[int, int]]]]], folder: Path, vocabulary: Vocabulary, report: Report
) -> None:
    """Shards with their index, and the chunk's part of the samples sidecar."""
    rows: list[dict[str, Any]] = []
    with MDSWriter(out=str(folder), columns=columns(vocabulary.size), hashes=["sha1"], size_limit=SHARD_BYTES) as writer:
        for _, (record, sizes) in records:
            writer.write(record.to_mds())
            rows.append(_row(record, sizes))
            report(1, 0)
    write_samples(pa.Table.from_pylist(rows, samples_schema()), folder / SIDECAR)


def _row(record: Record, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    targets = record.labels() >= 0
    return {
        "id": record.id,
        "tokens": len(record.tokens),
        "target_tokens": int(targets.sum()),
        "images": len(sizes),
        "question_images": int((~targets[record.image_spans[:, 0]]).sum()),
        "image_sizes": [side for size in sizes for side in size],
    }


def write_samples(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")


def run_rank(job: Job, rank: int, splits: int, report: Report) -> None:
    """The chunks `rank`, `rank + splits`, ... that are not done."""
    if torch.cuda.is_available():
        device = "cuda"
    else:
        device = "cpu"
        torch.set_num_threads(1)  # a sum's order depends on the threads: 1 everywhere gives the same codes everywhere
    mine = [number for number in job.missing() if number % splits == rank]
    if not mine:
        return
    items = load_items(job.source)
    tokenizer = Tokenizer(job, device)
    for number in mine:
        if number in job.missing():  # another run may have done it
            tokenizer.write_chunk(cut(items, job.file.chunk_size, number), report)
