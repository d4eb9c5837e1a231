"""Packs of records -> a batch of fixed shape, and what else is done to a batch.

input_ids, labels, position_ids  (P, L) int64    0, IGNORED, 0 in padding; labels are not shifted
document_ids                     (P, L) int32    0, 1, ... inside a pack, -1 in padding
kinds                            (P, L) int8     2 * kind of the document (KINDS) + 1 inside an image; -1 in padding
stream_tokens                    (P, S) int64    tokens of each stream of the mixture
pixel_values                     (V, 3, S, S) uint8  the views of all images that bring features
view_rows                        (V,) int64      the pack a view belongs to, ascending
feature_rows, feature_columns    (M,) int64      the places of features
feature_views, feature_patches   (M,) int64      which feature goes there: of which view, and which of its F
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unitoken.dataset.image_files import ImageError
from unitoken.dataset.record import IGNORED, Record
from unitoken.dataset.vision_views import NEWLINE, Pixels, Views
from unitoken.storage.shard_cache import ShardError

Batch = dict[str, torch.Tensor]
Ids = npt.NDArray[np.int64]
PER_VIEW = ("pixel_values", "view_rows")
PER_FEATURE = ("feature_rows", "feature_columns", "feature_views", "feature_patches")
KINDS = ("text", "understanding", "generation")  # no image; all are asked about; one at least is drawn
NO_VIEWS = Views(image_size=1, patch_size=1)  # shapes of a batch for a model without vision tower


def featured(labels: Ids, image_spans: npt.NDArray[np.uint32], continuous: str) -> list[int]:
    """Which images bring their continuous features: `all`, `none`, or those in `questions`, which are not trained on."""
    if continuous == "none":
        return []
    return [
        image
        for image, (first, *_) in enumerate(image_spans)
        if continuous == "all" or labels[first] == IGNORED
    ]


@dataclass(frozen=True, eq=False)
class Document:
    """A record with room for the features of its images."""

    ids: Ids  # (T,) 0 where a feature goes
    labels: Ids  # (T,)
    blocks: Ids  # (N, 2) the images, features included: first token, end
    places: tuple[
        tuple[int, int], ...
    ]  # the images with features, by number, each with the position of its first feature

    def cut(self, limit: int) -> Document:
        """The first `limit` positions, or fewer where an image would be cut."""
        if len(self.ids) <= limit:
            return self
        inside = (self.blocks[:, 0] < limit) & (self.blocks[:, 1] > limit)
        end = int(self.blocks[inside, 0].min(initial=limit))
        return Document(
            self.ids[:end],
            self.labels[:end],
            self.blocks[self.blocks[:, 1] <= end],
            tuple((image, start) for image, start in self.places if start < end),
        )


def insert_features(record: Record, counts: dict[int, int], separator: int, compat: bool = False) -> Document:
    """Make room for continuous features: `[image_start ... separator, places of the features, image_end]`.

    Args:
        counts: positions for the features of each image that brings any, by its number.
        compat: the separator is trained on wherever it stands, as in the reference; otherwise never.
    """
    labels = record.labels()
    ids_parts: list[Any] = []
    label_parts: list[Any] = []
    places: list[tuple[int, int]] = []
    blocks = record.image_spans[:, :2].astype(np.int64)
    separator_label = separator if compat else IGNORED
    copied = length = 0
    for image, count in counts.items():
        end = int(record.image_spans[image][1]) - 1  # of image_end
        ids_parts += [record.tokens[copied:end], [separator], np.zeros(count, np.int64)]
        label_parts += [labels[copied:end], [separator_label], np.full(count, IGNORED)]
        length += end - copied + 1 + count
        places.append((image, length - count))
        copied = end
        blocks[image, 1] += 1 + count
        blocks[image + 1 :] += 1 + count
    ids = np.concatenate([*ids_parts, record.tokens[copied:]]).astype(np.int64)
    return Document(
        ids, np.concatenate([*label_parts, labels[copied:]]).astype(np.int64), blocks, tuple(places)
    )


@dataclass(frozen=True)
class Collate:
    """Packs -> batch. An object, so that DataLoader workers can be started by fork or spawn."""

    length: int  # L
    views: Views | None  # None: no image brings features
    continuous: str
    separator: int
    newline: int
    compat: bool
    streams: int = 1  # S
    limits: tuple[int, ...] | None = None  # by stream: longer documents are cut; None: they are an error
    vocabulary_size: int | None = None  # ids from it on are an error; None: unchecked

    def __call__(self, packs: Sequence[Sequence[Record]]) -> Batch:
        views, shape = self.views or NO_VIEWS, (len(packs), self.length)
        input_ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        position_ids, document_ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
        kinds, stream_tokens = np.full(shape, -1, np.int8), np.zeros((len(packs), self.streams), np.int64)
        pixels: list[Pixels] = [np.zeros((0, 3, views.image_size, views.image_size), np.uint8)]
        view_rows: list[int] = []
        features: list[Ids] = [np.zeros((0, 4), np.int64)]  # row, column, view, patch
        seen = self._look(packs)
        for row, records in enumerate(packs):
            parts: list[Any] = []
            begin = 0
            for record in records:
                if not len(record.image_spans):
                    ids = (
                        record.tokens if self.limits is None else record.tokens[: self.limits[record.stream]]
                    )
                    self._fits(record, begin + len(ids))
                    for start, end in record.target_spans.tolist():
                        labels[row, begin + start : begin + min(end, len(ids))] = ids[start:end]
                    kinds[row, begin : begin + len(ids)] = 0
                else:
                    images = next(seen)
                    document = self._document(
                        record, {image: views.count(*size) for image, (_, size) in images.items()}
                    )
                    ids = document.ids
                    self._fits(record, begin + len(ids))
                    labels[row, begin : begin + len(ids)] = document.labels
                    kind = 4 if (document.labels[document.blocks[:, 0]] != IGNORED).any() else 2
                    kinds[row, begin : begin + len(ids)] = kind
                    for first, end in document.blocks.tolist():
                        kinds[row, begin + first : begin + end] = kind + 1
                    for image, start in document.places:
                        picture, size = images[image]
                        layout = views.layout(*size)
                        ids[start : start + len(layout)] = np.where(layout == NEWLINE, self.newline, 0)
                        places = np.flatnonzero(layout != NEWLINE)
                        view, patch = np.divmod(layout[places], views.features)
                        features.append(
                            np.stack(
                                [
                                    np.full(len(places), row),
                                    begin + start + places,
                                    view + len(view_rows),
                                    patch,
                                ],
                                1,
                            )
                        )
                        pixels.append(picture)
                        view_rows += [row] * len(picture)
                labels[row, begin] = IGNORED  # or the document before would predict it
                stream_tokens[row, record.stream] += len(ids)
                parts.append(ids)
                begin += len(ids)
            lengths = [len(part) for part in parts]
            input_ids[row, :begin] = np.concatenate(parts)
            position_ids[row, :begin] = np.arange(begin) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            document_ids[row, :begin] = np.repeat(np.arange(len(parts)), lengths)
            self._check_ids(records, input_ids[row])
        batch: dict[str, npt.NDArray[Any]] = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "document_ids": document_ids,
        }
        batch |= {"kinds": kinds, "stream_tokens": stream_tokens}
        batch |= {"pixel_values": np.concatenate(pixels), "view_rows": np.array(view_rows, np.int64)}
        batch |= zip(PER_FEATURE, np.ascontiguousarray(np.concatenate(features).T), strict=True)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _fits(self, record: Record, end: int) -> None:
        if end > self.length:
            raise ShardError(
                f"sample '{record.id}' ends at {end} in a pack of {self.length}: its sidecar is wrong"
            )

    def _check_ids(self, records: Sequence[Record], ids: Ids) -> None:
        """A GPU would say no more of it than that an assertion failed, and the process could not go on."""
        if self.vocabulary_size is not None and ids.max() >= self.vocabulary_size:
            record = next(
                record for record in records if record.tokens.max(initial=0) >= self.vocabulary_size
            )
            raise ShardError(
                f"sample '{record.id}' holds the token id {record.tokens.max()}, the vocabulary has {self.vocabulary_size}: "
                "its shard is wrong"
            )

    def _document(self, record: Record, counts: dict[int, int]) -> Document:
        document = insert_features(record, counts, self.separator, self.compat)
        return document if self.limits is None else document.cut(self.limits[record.stream])

    def _look(self, packs: Sequence[Sequence[Record]]) -> Iterator[dict[int, tuple[Pixels, tuple[int, int]]]]:
        """For each record with images those that bring features, by number: views and size. Pictures are decoded by threads."""
        continuous = "none" if self.views is None else self.continuous
        records = [record for pack in packs for record in pack if len(record.image_spans)]
        wanted = [featured(record.labels(), record.image_spans, continuous) for record in records]
        jobs = [(record, image) for record, images in zip(records, wanted, strict=True) for image in images]
        if len(jobs) > 1 and (threads := _threads()) > 1:
            with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
                seen = pool.map(self._pixels, *zip(*jobs, strict=True))
                yield from [{image: next(seen) for image in images} for images in wanted]
        else:
            for record, images in zip(records, wanted, strict=True):
                yield {image: self._pixels(record, image) for image in images}

    def _pixels(self, record: Record, image: int) -> tuple[Pixels, tuple[int, int]]:
        assert self.views is not None
        try:
            return self.views.pixels(record.images[image], self.compat)
        except (ImageError, IndexError) as error:
            raise ValueError(f"sample '{record.id}', image {image}: {error}") from error


def _threads() -> int:
    """This process's share of the machine's cores."""
    info = torch.utils.data.get_worker_info()
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (info.num_workers if info else 1)
    return max(1, len(os.sched_getaffinity(0)) // sharing)


def split_batch(batch: Batch, microbatch_packs: int) -> list[Batch]:
    """Cut a batch into microbatches of so many packs (the last may have fewer); views and features follow their rows."""
    packs = num_packs(batch)
    parts = []
    for begin in range(0, packs, microbatch_packs):
        end = min(begin + microbatch_packs, packs)
        borders = torch.tensor([begin, end], device=batch["view_rows"].device)
        first_view, last_view = torch.searchsorted(batch["view_rows"], borders).tolist()
        first, last = torch.searchsorted(batch["feature_rows"], borders).tolist()
        cuts = dict.fromkeys(PER_VIEW, (first_view, last_view)) | dict.fromkeys(PER_FEATURE, (first, last))
        part = {name: value[slice(*cuts.get(name, (begin, end)))] for name, value in batch.items()}
        part |= {name: part[name] - begin for name in ("view_rows", "feature_rows")}
        part["feature_views"] = part["feature_views"] - first_view
        parts.append(part)
    return parts


def num_packs(batch: Batch) -> int:
    """Composer's `get_num_samples_in_batch`: the packs are the samples."""
    return len(batch["input_ids"])


def num_tokens(batch: Batch) -> dict[str, int]:
    """Composer's `get_num_tokens_in_batch`: tokens that are no padding, and labels that the loss counts."""
    return {
        "total": int((batch["document_ids"] >= 0).sum()),
        "loss_generating": int((batch["labels"][:, 1:] != IGNORED).sum()),
    }
