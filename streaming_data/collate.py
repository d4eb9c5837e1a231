"""Packs of records -> a batch of fixed shape, and what else is done to a batch.

input_ids, labels, position_ids  (P, L) int64    0, IGNORED, 0 in padding; labels are not shifted
document_ids                     (P, L) int32    0, 1, ... inside a pack, -1 in padding
pixel_values                     (N, 3, S, S) uint8
image_rows                       (N,) int64      the pack an image belongs to, ascending
feature_positions                (N, F) int64    where in its row an image's features go
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unitoken.streaming_data.images import ImageError, vision_pixels
from unitoken.streaming_data.record import IGNORED, Record

Batch = dict[str, torch.Tensor]
Ids = npt.NDArray[np.int64]
PER_IMAGE = ("pixel_values", "image_rows", "feature_positions")


def featured(labels: Ids, image_spans: npt.NDArray[np.uint32], continuous: str) -> list[int]:
    """Which images bring their continuous features: `all`, `none`, or those in `questions`, which are not trained on."""
    if continuous == "none":
        return []
    return [image for image, (first, *_) in enumerate(image_spans) if continuous == "all" or labels[first] == IGNORED]


def insert_features(
    tokens: npt.NDArray[Any],
    labels: Ids,
    image_spans: npt.NDArray[np.uint32],
    features: int,
    continuous: str,
    separator: int,
    compat: bool,
) -> tuple[Ids, Ids, list[tuple[int, int]]]:
    """Make room for the continuous features of a document's images: `[image_start ... separator, F places, image_end]`.

    Args:
        tokens, labels: (T,) the document; labels are not shifted.
        image_spans: (N, 4) as in the record: first token, end, height, width.
        compat: the separator is trained on wherever it stands, as in the reference; otherwise never.

    Returns:
        ids, labels: (T + (1 + F) * images with features,). Places have id 0 and label IGNORED.
        The images with features, by number, each with the position of its first feature.
    """
    ids_parts: list[Any] = []
    label_parts: list[Any] = []
    places: list[tuple[int, int]] = []
    separator_label = separator if compat else IGNORED
    copied = length = 0
    for image in featured(labels, image_spans, "all" if compat and continuous != "none" else continuous):
        end = int(image_spans[image][1]) - 1  # of image_end
        ids_parts += [tokens[copied:end], [separator], np.zeros(features, np.int64)]
        label_parts += [labels[copied:end], [separator_label], np.full(features, IGNORED)]
        length += end - copied + 1 + features
        places.append((image, length - features))
        copied = end
    ids = np.concatenate([*ids_parts, tokens[copied:]]).astype(np.int64)
    return ids, np.concatenate([*label_parts, labels[copied:]]).astype(np.int64), places


@dataclasses.dataclass(frozen=True)
class Collate:
    """Packs -> batch. An object, so that DataLoader workers can be started by fork or spawn."""

    length: int  # L
    features: int  # F
    image_size: int  # S, pixels
    continuous: str
    separator: int
    compat: bool

    def __call__(self, packs: Sequence[Sequence[Record]]) -> Batch:
        shape = (len(packs), self.length)
        input_ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        position_ids, document_ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
        pixels: list[npt.NDArray[np.uint8]] = []
        image_rows: list[int] = []
        starts: list[int] = []
        for row, records in enumerate(packs):
            begin = 0
            for document, record in enumerate(records):
                ids, targets, places = insert_features(
                    record.tokens, record.labels(), record.image_spans, self.features, self.continuous, self.separator, self.compat
                )
                end = begin + len(ids)
                if end > self.length:
                    raise ValueError(f"sample '{record.id}' ends at {end} in a pack of {self.length}: its sidecar is wrong")
                targets[0] = IGNORED  # or the document before would predict it
                input_ids[row, begin:end], labels[row, begin:end] = ids, targets
                position_ids[row, begin:end], document_ids[row, begin:end] = np.arange(len(ids)), document
                for image, start in places:
                    pixels.append(self._pixels(record, image))
                    image_rows.append(row)
                    starts.append(begin + start)
                begin = end
        size = self.image_size
        positions = np.array(starts, np.int64)[:, None] + np.arange(self.features)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "document_ids": torch.from_numpy(document_ids),
            "pixel_values": torch.from_numpy(np.stack(pixels)) if pixels else torch.empty((0, 3, size, size), dtype=torch.uint8),
            "image_rows": torch.tensor(image_rows, dtype=torch.int64),
            "feature_positions": torch.from_numpy(positions),
        }

    def _pixels(self, record: Record, image: int) -> npt.NDArray[np.uint8]:
        try:
            return vision_pixels(record.images[image], self.image_size, self.compat)
        except (ImageError, IndexError) as error:
            raise ValueError(f"sample '{record.id}', image {image}: {error}") from error


def split_batch(batch: Batch, microbatch_packs: int) -> list[Batch]:
    """Cut a batch into microbatches of so many packs (the last may have fewer); images follow their rows."""
    rows, packs = batch["image_rows"], num_packs(batch)
    parts = []
    for begin in range(0, packs, microbatch_packs):
        end = min(begin + microbatch_packs, packs)
        mine = (rows >= begin) & (rows < end)
        part = {name: value[mine] if name in PER_IMAGE else value[begin:end] for name, value in batch.items()}
        part["image_rows"] = part["image_rows"] - begin
        parts.append(part)
    return parts


def num_packs(batch: Batch) -> int:
    """Composer's `get_num_samples_in_batch`: the packs are the samples."""
    return len(batch["input_ids"])


def num_tokens(batch: Batch) -> dict[str, int]:
    """Composer's `get_num_tokens_in_batch`: tokens that are no padding, and labels that the loss counts."""
    return {"total": int((batch["document_ids"] >= 0).sum()), "loss_generating": int((batch["labels"][:, 1:] != IGNORED).sum())}
