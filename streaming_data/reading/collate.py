"""Packs of records -> a batch: see batch.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from unitoken.dataset.image_files import ImageError
from unitoken.dataset.kinds import KINDS, kind_numbers
from unitoken.dataset.record import IGNORED, Record, spans_of
from unitoken.dataset.vision_views import NEWLINE, Pixels, Views
from unitoken.storage.shard_cache import ShardError
from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.plan.feature_cost import feature_cost
from unitoken.streaming_data.reading.batch import PackedBatch

NO_VIEWS = Views(image_size=1, patch_size=1)  # gives a batch its shapes for a model without a vision tower


def featured_images(labels: Integers, image_spans: npt.NDArray[np.uint32], continuous: str) -> list[int]:
    """Return which images of a record have continuous features.

    Args:
        labels: (T,) of the record; an image is generated if its first token is trained on.
        image_spans: (N, 4) of the record.
        continuous: "all", "none", or "questions" for all images that are not generated.
    """
    if continuous == "none":
        return []
    return [
        image
        for image, (first, *_) in enumerate(image_spans)
        if continuous == "all" or labels[first] == IGNORED
    ]


class FeaturePlace(NamedTuple):
    """Where an image's features go."""

    image: int
    start: int  # position of the first feature


@dataclass(frozen=True, eq=False)
class Document:
    """A record with room for the features of its images."""

    ids: Integers  # (T,) 0 in place of features
    labels: Integers  # (T,)
    blocks: Integers  # (N, 2) the images, features included: first token, end
    places: tuple[FeaturePlace, ...]  # of the images that have features

    def cut(self, limit: int) -> Document:
        """Return the first `limit` positions, or fewer, so that no image is cut."""
        if len(self.ids) <= limit:
            return self
        over_limit = (self.blocks[:, 0] < limit) & (self.blocks[:, 1] > limit)
        end = int(self.blocks[over_limit, 0].min(initial=limit))
        return Document(
            self.ids[:end],
            self.labels[:end],
            self.blocks[self.blocks[:, 1] <= end],
            tuple(place for place in self.places if place.start < end),
        )


def insert_features(
    record: Record, counts: Mapping[int, int], separator: int, compat: bool = False
) -> Document:
    """Make room for continuous features: `[image_start ... separator, places of the features, image_end]`.

    Args:
        record: a conversation.
        counts: positions for the features of each image that has any, by the image's number.
        separator: the token before the features.
        compat: train on the separator in every image, as the reference does; otherwise never.
    """
    labels = record.labels()
    ids_parts: list[Any] = []
    label_parts: list[Any] = []
    places: list[FeaturePlace] = []
    blocks = record.image_spans[:, :2].astype(np.int64)
    separator_label = separator if compat else IGNORED
    copied = length = 0
    for image, count in counts.items():
        end = int(record.image_spans[image][1]) - 1  # of image_end
        ids_parts += [record.tokens[copied:end], [separator], np.zeros(count, np.int64)]
        label_parts += [labels[copied:end], [separator_label], np.full(count, IGNORED)]
        cost = feature_cost(count)
        length += end - copied + cost
        places.append(FeaturePlace(image, length - count))
        copied = end
        blocks[image, 1] += cost
        blocks[image + 1 :] += cost
    ids = np.concatenate([*ids_parts, record.tokens[copied:]]).astype(np.int64)
    all_labels = np.concatenate([*label_parts, labels[copied:]]).astype(np.int64)
    return Document(ids, all_labels, blocks, tuple(places))


class _Picture(NamedTuple):
    """A decoded image."""

    views: Pixels  # (V, 3, S, S)
    size: tuple[int, int]  # width and height of the original


class _Arrays:
    """A batch under construction: documents are appended to its packs.

    Args:
        ids: (packs, length) zeros, for the ids.
        streams: number of streams of the mixture.
        views: how the vision tower sees an image.
        newline: the token at the ends of rows of features.
    """

    def __init__(self, ids: npt.NDArray[Any], streams: int, views: Views, newline: int) -> None:
        self.ends = [0] * len(ids)  # of what each pack holds so far
        self.input_ids = ids
        self._documents: list[tuple[int, ...]] = []
        self._target_spans: list[tuple[int, ...]] = []
        self._image_spans: list[tuple[int, ...]] = []
        self._stream_tokens = np.zeros((len(ids), streams), np.int64)
        self._pixels: list[Pixels] = [np.zeros((0, 3, views.image_size, views.image_size), np.uint8)]
        self._view_rows: list[int] = []
        self._runs = [np.zeros((0, 5), np.int32)]  # of features
        self._views, self._newline = views, newline

    def append_text(self, row: int, record: Record, ids: npt.NDArray[Any]) -> None:
        """Append a record without images, of which `ids` are the tokens to keep."""
        self._append(row, record.stream, ids, KINDS.index("text"), record.target_spans)

    def append_document(
        self, row: int, record: Record, document: Document, pictures: Mapping[int, _Picture]
    ) -> None:
        """Append a record with images."""
        begin, images = self.ends[row], len(record.image_spans)
        generated = int((document.labels[document.blocks[:, 0]] != IGNORED).sum())
        kind = int(kind_numbers(images, images - generated))
        self._image_spans += [(row, begin + first, begin + end) for first, end in document.blocks.tolist()]
        self._append(row, record.stream, document.ids, kind, spans_of(document.labels != IGNORED))
        for place in document.places:
            self._append_features(row, begin + place.start, pictures[place.image])

    def _append(
        self, row: int, stream: int, ids: npt.NDArray[Any], kind: int, target_spans: npt.NDArray[np.uint32]
    ) -> None:
        begin, end = self.ends[row], self.ends[row] + len(ids)
        self.input_ids[row, begin:end] = ids
        self._documents.append((row, begin, end, kind))
        for first, last in target_spans.tolist():
            # Without the document's first token, or the document before would predict it.
            span = (row, max(begin + first, begin + 1), min(begin + last, end))
            if span[1] < span[2]:
                self._target_spans.append(span)
        self._stream_tokens[row, stream] += len(ids)
        self.ends[row] = end

    def _append_features(self, row: int, start: int, picture: _Picture) -> None:
        layout = self._views.layout(*picture.size)
        self.input_ids[row, start : start + len(layout)] = np.where(layout == NEWLINE, self._newline, 0)
        places = np.flatnonzero(layout != NEWLINE)
        view, patch = np.divmod(layout[places], self._views.features)
        breaks = (np.diff(places) != 1) | (np.diff(view) != 0) | (np.diff(patch) != 1)
        firsts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        lengths = np.diff(firsts, append=len(places))
        columns, views = start + places[firsts], len(self._view_rows) + view[firsts]
        runs = [np.full(len(firsts), row), columns, views, patch[firsts], lengths]
        self._runs.append(np.stack(runs, axis=1).astype(np.int32))
        self._pixels.append(picture.views)
        self._view_rows += [row] * len(picture.views)

    def batch(self) -> PackedBatch:
        """Return the batch as tensors."""
        target_spans, runs = _table(self._target_spans, 3), np.concatenate(self._runs)
        return PackedBatch(
            input_ids=torch.from_numpy(self.input_ids),
            documents=torch.from_numpy(_table(self._documents, 4)),
            target_spans=torch.from_numpy(target_spans),
            image_spans=torch.from_numpy(_table(self._image_spans, 3)),
            feature_runs=torch.from_numpy(runs),
            stream_tokens=torch.from_numpy(self._stream_tokens),
            pixel_values=torch.from_numpy(np.concatenate(self._pixels)),
            view_rows=torch.from_numpy(np.array(self._view_rows, np.int64)),
            targets=int((target_spans[:, 2] - target_spans[:, 1]).sum()),
            features=int(runs[:, 4].sum()),
        )


def _table(rows: list[tuple[int, ...]], columns: int) -> npt.NDArray[np.int32]:
    return np.array(rows, np.int32).reshape(-1, columns)


@dataclass(frozen=True)
class Collate:
    """Turns packs into a batch. An object, so that DataLoader workers can be started by fork or spawn."""

    length: int  # L
    views: Views | None  # None: no image has features
    continuous: str
    separator: int
    newline: int
    compat: bool
    streams: int = 1  # S
    limits: tuple[int, ...] | None = None  # by stream: longer documents are cut; None: they are an error
    vocabulary_size: int | None = None  # ids from it on are an error; None: unchecked, and of 4 bytes
    threads: int | None = None  # that decode images; None: this process's share of the machine's cores

    def __call__(self, packs: Sequence[Sequence[Record]]) -> PackedBatch:
        """Return the batch of `packs`.

        Raises:
            ShardError: a record does not fit its pack, or holds an id that the vocabulary lacks.
            ValueError: an image can not be decoded.
        """
        fits = self.vocabulary_size is not None and self.vocabulary_size <= 1 << 16
        ids = np.zeros((len(packs), self.length), np.uint16 if fits else np.int32)
        arrays = _Arrays(ids, self.streams, self.views or NO_VIEWS, self.newline)
        pictures = self._decode(packs)
        for row, records in enumerate(packs):
            for record in records:
                if len(record.image_spans):
                    record_pictures = next(pictures)
                    document = self._document(record, record_pictures)
                    self._check_length(record, arrays.ends[row] + len(document.ids))
                    arrays.append_document(row, record, document, record_pictures)
                else:
                    ids = (
                        record.tokens if self.limits is None else record.tokens[: self.limits[record.stream]]
                    )
                    self._check_length(record, arrays.ends[row] + len(ids))
                    arrays.append_text(row, record, ids)
            self._check_ids(records, arrays.input_ids[row])
        return arrays.batch()

    def _check_length(self, record: Record, end: int) -> None:
        if end > self.length:
            raise ShardError(
                f"sample '{record.id}' ends at {end} in a pack of {self.length}: its sidecar is wrong"
            )

    def _check_ids(self, records: Sequence[Record], ids: npt.NDArray[Any]) -> None:
        """Raise ShardError for an id outside the vocabulary: a GPU would end the process without a name."""
        if self.vocabulary_size is None:
            return
        cut = any(record.tokens.itemsize > ids.itemsize for record in records)  # ids may have lost bytes
        if not cut and ids.max() < self.vocabulary_size:
            return
        for record in records:
            largest = record.tokens.max(initial=0)
            if largest >= self.vocabulary_size:
                raise ShardError(
                    f"sample '{record.id}' holds the token id {largest}, the vocabulary has "
                    f"{self.vocabulary_size}: its shard is wrong"
                )

    def _document(self, record: Record, pictures: Mapping[int, _Picture]) -> Document:
        views = self.views or NO_VIEWS
        counts = {image: views.count(*picture.size) for image, picture in pictures.items()}
        document = insert_features(record, counts, self.separator, self.compat)
        return document if self.limits is None else document.cut(self.limits[record.stream])

    def _decode(self, packs: Sequence[Sequence[Record]]) -> Iterator[dict[int, _Picture]]:
        """Yield for each record with images those that have features, by number. Threads decode them."""
        continuous = "none" if self.views is None else self.continuous
        records = [record for pack in packs for record in pack if len(record.image_spans)]
        images = [featured_images(record.labels(), record.image_spans, continuous) for record in records]
        jobs = [(record, image) for record, some in zip(records, images, strict=True) for image in some]
        threads = min(len(jobs), self.threads or _share_of_cores())
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                decoded = pool.map(self._picture, *zip(*jobs, strict=True))
                yield from [{image: next(decoded) for image in some} for some in images]
        else:
            for record, some in zip(records, images, strict=True):
                yield {image: self._picture(record, image) for image in some}

    def _picture(self, record: Record, image: int) -> _Picture:
        assert self.views is not None
        try:
            return _Picture(*self.views.pixels(record.images[image], self.compat))
        except (ImageError, IndexError) as error:
            raise ValueError(f"sample '{record.id}', image {image}: {error}") from error


def _share_of_cores() -> int:
    """Return how many of the machine's cores each process of this kind may use."""
    info = torch.utils.data.get_worker_info()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (info.num_workers if info else 1)
    return max(1, len(os.sched_getaffinity(0)) // processes)
