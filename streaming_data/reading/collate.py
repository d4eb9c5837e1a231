"""Packs of records -> a batch of fixed shape; and splitting and counting batches.

    input_ids, labels, position_ids  (P, L) int64        0, IGNORED, 0 in padding; labels are not shifted
    document_ids                     (P, L) int32        0, 1, ... inside a pack, -1 in padding
    kinds                            (P, L) int8         2 * kind of the document (KINDS) + 1 inside an image;
                                                         -1 in padding
    stream_tokens                    (P, S) int64        tokens of each stream of the mixture
    target_rows, target_columns      (n,) int64          the places of labels in the loss, in order
    pixel_values                     (V, 3, S, S) uint8  the views of all images that have features
    view_rows                        (V,) int64          the pack a view belongs to, ascending
    feature_rows, feature_columns    (M,) int64          the places of features
    feature_views, feature_patches   (M,) int64          which feature belongs there: of which view, and which
                                                         of its F

Numbers that depend on values are counted on the CPU, and are shapes of a batch: a host that asks a GPU for a
value waits until all work before it is done.
"""

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
from unitoken.dataset.record import IGNORED, Record
from unitoken.dataset.vision_views import NEWLINE, Pixels, Views
from unitoken.storage.shard_cache import ShardError
from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.kinds import KINDS, kind_numbers
from unitoken.streaming_data.plan.feature_cost import feature_cost

Batch = dict[str, torch.Tensor]
PER_VIEW = ("pixel_values", "view_rows")
PER_TARGET = ("target_rows", "target_columns")
PER_FEATURE = ("feature_rows", "feature_columns", "feature_views", "feature_patches")
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
    """A batch under construction: documents are appended to its packs."""

    def __init__(self, packs: int, length: int, streams: int, views: Views, newline: int) -> None:
        self.ends = [0] * packs  # of what each pack holds so far
        self.input_ids = np.zeros((packs, length), np.int64)
        self._labels = np.full((packs, length), IGNORED, np.int64)
        self._position_ids = np.zeros((packs, length), np.int64)
        self._document_ids = np.full((packs, length), -1, np.int32)
        self._kinds = np.full((packs, length), -1, np.int8)
        self._stream_tokens = np.zeros((packs, streams), np.int64)
        self._pixels: list[Pixels] = [np.zeros((0, 3, views.image_size, views.image_size), np.uint8)]
        self._view_rows: list[int] = []
        self._features = [np.zeros((0, 4), np.int64)]  # row, column, view, patch
        self._documents = [0] * packs
        self._views, self._newline = views, newline

    def append_text(self, row: int, record: Record, ids: npt.NDArray[Any]) -> None:
        """Append a record without images, of which `ids` are the tokens to keep."""
        begin = self.ends[row]
        for start, end in record.target_spans.tolist():
            self._labels[row, begin + start : begin + min(end, len(ids))] = ids[start:end]
        self._kinds[row, begin : begin + len(ids)] = 2 * KINDS.index("text")
        self._append(row, record.stream, ids)

    def append_document(
        self, row: int, record: Record, document: Document, pictures: Mapping[int, _Picture]
    ) -> None:
        """Append a record with images."""
        begin, end = self.ends[row], self.ends[row] + len(document.ids)
        self._labels[row, begin:end] = document.labels
        images = len(record.image_spans)
        generated = int((document.labels[document.blocks[:, 0]] != IGNORED).sum())
        kind = 2 * int(kind_numbers(images, images - generated))
        self._kinds[row, begin:end] = kind
        for first, block_end in document.blocks.tolist():
            self._kinds[row, begin + first : begin + block_end] = kind + 1
        self._append(row, record.stream, document.ids)
        for place in document.places:
            self._append_features(row, begin + place.start, pictures[place.image])

    def _append(self, row: int, stream: int, ids: npt.NDArray[Any]) -> None:
        begin, end = self.ends[row], self.ends[row] + len(ids)
        self.input_ids[row, begin:end] = ids
        self._labels[row, begin] = IGNORED  # or the document before would predict it
        self._position_ids[row, begin:end] = np.arange(len(ids))
        self._document_ids[row, begin:end] = self._documents[row]
        self._stream_tokens[row, stream] += len(ids)
        self._documents[row] += 1
        self.ends[row] = end

    def _append_features(self, row: int, start: int, picture: _Picture) -> None:
        layout = self._views.layout(*picture.size)
        self.input_ids[row, start : start + len(layout)] = np.where(layout == NEWLINE, self._newline, 0)
        places = np.flatnonzero(layout != NEWLINE)
        view, patch = np.divmod(layout[places], self._views.features)
        rows, views = np.full(len(places), row), view + len(self._view_rows)
        self._features.append(np.stack([rows, start + places, views, patch], axis=1))
        self._pixels.append(picture.views)
        self._view_rows += [row] * len(picture.views)

    def batch(self) -> Batch:
        """Return the batch as tensors."""
        features = np.ascontiguousarray(np.concatenate(self._features).T)
        arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.input_ids,
            "labels": self._labels,
            "position_ids": self._position_ids,
            "document_ids": self._document_ids,
            "kinds": self._kinds,
            "stream_tokens": self._stream_tokens,
            "pixel_values": np.concatenate(self._pixels),
            "view_rows": np.array(self._view_rows, np.int64),
            **dict(zip(PER_FEATURE, features, strict=True)),
        }
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return batch | target_places(batch["labels"])


def target_places(labels: torch.Tensor) -> Batch:
    """Return the places of a batch's supervised tokens, `target_rows` and `target_columns`.

    Args:
        labels: (P, L), on the CPU. Nothing predicts the first column.
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return {"target_rows": rows, "target_columns": columns + 1}


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
    vocabulary_size: int | None = None  # ids from it on are an error; None: unchecked
    threads: int | None = None  # that decode images; None: this process's share of the machine's cores

    def __call__(self, packs: Sequence[Sequence[Record]]) -> Batch:
        """Return the batch of `packs`.

        Raises:
            ShardError: a record does not fit its pack, or holds an id that the vocabulary lacks.
            ValueError: an image can not be decoded.
        """
        arrays = _Arrays(len(packs), self.length, self.streams, self.views or NO_VIEWS, self.newline)
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

    def _check_ids(self, records: Sequence[Record], ids: Integers) -> None:
        """Raise ShardError for an id outside the vocabulary: a GPU would end the process without a name."""
        if self.vocabulary_size is None or ids.max() < self.vocabulary_size:
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


def split_batch(batch: Batch, microbatch_packs: int) -> list[Batch]:
    """Cut a batch on the CPU into microbatches of `microbatch_packs` packs; the last may have fewer."""
    packs = num_packs(batch)
    borders = torch.tensor([*range(0, packs, microbatch_packs), packs])
    cuts = {  # where each kind of rows is cut
        name: torch.searchsorted(batch[name], borders).tolist()
        for name in ("view_rows", "feature_rows", "target_rows")
    }
    parts = []
    for number, begin in enumerate(range(0, packs, microbatch_packs)):
        views, features, targets = (slice(*cut[number : number + 2]) for cut in cuts.values())
        part = {}
        for name, value in batch.items():
            if name in PER_VIEW:
                part[name] = value[views]
            elif name in PER_FEATURE:
                part[name] = value[features]
            elif name in PER_TARGET:
                part[name] = value[targets]
            else:
                part[name] = value[begin : begin + microbatch_packs]
        for name in cuts:
            part[name] = part[name] - begin
        part["feature_views"] = part["feature_views"] - views.start
        parts.append(part)
    return parts


def num_packs(batch: Batch) -> int:
    """Return the number of packs, which are the samples: Composer's `get_num_samples_in_batch`."""
    return len(batch["input_ids"])


def num_tokens(batch: Batch) -> int:
    """Return the number of tokens besides padding, of a batch on the CPU."""
    return int(batch["stream_tokens"].sum())


def num_targets(batch: Batch) -> int:
    """Return the number of labels in the loss, without waiting for the device that the batch is on."""
    return len(batch["target_rows"])
