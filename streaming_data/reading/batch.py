"""A batch as it travels, its microbatches, and what a model reads of one.

What a worker sends to the process that trains, and that to the GPU, is a `PackedBatch`: 2 to 5 bytes a token,
besides pixels.

    input_ids      (P, L) uint16           0 in padding and in the places of features; int32 for a vocabulary
                                           of more than 65,536 ids
    documents      (D, 4) int32            row, start, end, kind (its place in KINDS)
    target_spans   (S, 3) int32            row, start, end of what is in the loss
    image_spans    (I, 3) int32            row, start, end of an image, its features included
    feature_runs   (R, 5) int32            row, start, view, first patch, length: features side by side
    stream_tokens  (P, streams) int64      tokens of each stream of the mixture
    pixel_values   (V, 3, S, S) uint8      the views of all images that have features
    view_rows      (V,) int64              the pack a view belongs to, ascending
    targets        number                  tokens in the loss
    features       number                  places of features

Rows are ascending. `unpack` makes a `Batch` of it, on the device, where it has 29 bytes a token:

    input_ids, labels, position_ids  (P, L) int64        0, IGNORED, 0 in padding; labels are not shifted
    document_ids                     (P, L) int32        0, 1, ... inside a pack, -1 in padding
    kinds                            (P, L) int8         2 * kind of the document + 1 inside an image; -1 in
                                                         padding
    target_rows, target_columns      (n,) int64          the places of labels in the loss, in order
    feature_rows, feature_columns    (M,) int64          the places of features
    feature_views, feature_patches   (M,) int64          which feature belongs there: of which view, and which
                                                         of its F
    stream_tokens, pixel_values, view_rows               as above

The two numbers are counted on the CPU: a host that asks a GPU for a value waits until all work before it is
done.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from unitoken.dataset.record import IGNORED


class PackedBatch(TypedDict):
    """A batch of P packs of L positions; see the module's docstring."""

    input_ids: Tensor
    documents: Tensor
    target_spans: Tensor
    image_spans: Tensor
    feature_runs: Tensor
    stream_tokens: Tensor
    pixel_values: Tensor
    view_rows: Tensor
    targets: int
    features: int


Batch = dict[str, Tensor]


def split_batch(batch: PackedBatch, microbatch_packs: int) -> list[PackedBatch]:
    """Cut a batch on the CPU into microbatches of `microbatch_packs` packs; the last may have fewer."""
    packs = num_packs(batch)
    borders = torch.tensor([*range(0, packs, microbatch_packs), packs])

    def cut(rows: Tensor) -> list[slice]:
        places = torch.searchsorted(rows.long(), borders).tolist()
        return [slice(first, end) for first, end in itertools.pairwise(places)]

    documents, targets = cut(batch["documents"][:, 0]), cut(batch["target_spans"][:, 0])
    images, runs = cut(batch["image_spans"][:, 0]), cut(batch["feature_runs"][:, 0])
    views = cut(batch["view_rows"])
    parts = []
    for number, first in enumerate(range(0, packs, microbatch_packs)):
        rows = slice(first, first + microbatch_packs)
        target_spans = _less(batch["target_spans"][targets[number]], first, 0, 0)
        feature_runs = _less(batch["feature_runs"][runs[number]], first, 0, views[number].start, 0, 0)
        part = PackedBatch(
            input_ids=batch["input_ids"][rows],
            documents=_less(batch["documents"][documents[number]], first, 0, 0, 0),
            target_spans=target_spans,
            image_spans=_less(batch["image_spans"][images[number]], first, 0, 0),
            feature_runs=feature_runs,
            stream_tokens=batch["stream_tokens"][rows],
            pixel_values=batch["pixel_values"][views[number]],
            view_rows=batch["view_rows"][views[number]] - first,
            targets=int((target_spans[:, 2] - target_spans[:, 1]).sum()),
            features=int(feature_runs[:, 4].sum()),
        )
        parts.append(part)
    return parts


def _less(table: Tensor, *numbers: int) -> Tensor:
    """Subtract a number from each column of a table."""
    return table - torch.tensor(numbers, dtype=table.dtype)


def num_packs(batch: Mapping[str, Any]) -> int:
    """Return the number of packs, which are the samples: Composer's `get_num_samples_in_batch`."""
    return len(batch["input_ids"])


def num_tokens(batch: Mapping[str, Any]) -> int:
    """Return the number of tokens besides padding, of a batch on the CPU."""
    return int(batch["stream_tokens"].sum())


def num_targets(batch: Mapping[str, Any]) -> int:
    """Return the number of tokens in the loss, also of an unpacked batch, without waiting for its device."""
    targets: int = batch["targets"] if "targets" in batch else len(batch["target_rows"])
    return targets


def unpack(batch: PackedBatch) -> Batch:
    """Return the tensors that the model and its measures read, on the device of the batch."""
    ids = batch["input_ids"].long()
    shape = packs, length = ids.shape
    places = torch.arange(packs * length, device=ids.device)  # row * L + column
    documents, targets = batch["documents"].long(), batch["target_spans"].long()
    images, runs = batch["image_spans"].long(), batch["feature_runs"].long()
    numbers = _find(places, documents, length)  # (P * L,) from 1 on, 0 in padding
    row, start, _, kind = F.pad(documents, (0, 0, 1, 0))[numbers].T
    is_token = numbers > 0
    first_document = torch.searchsorted(documents[:, 0].contiguous(), torch.arange(packs, device=ids.device))
    in_image = _find(places, images, length) > 0
    in_loss = _find(places, targets, length).view(shape) > 0
    span, target_offset = _spread(targets[:, 2] - targets[:, 1], batch["targets"])
    run, feature_offset = _spread(runs[:, 4], batch["features"])
    return {
        "input_ids": ids,
        "labels": torch.where(in_loss, ids, IGNORED),
        "position_ids": ((places - row * length - start) * is_token).view(shape),
        "document_ids": torch.where(is_token, numbers - 1 - first_document[row], -1).view(shape).int(),
        "kinds": torch.where(is_token, 2 * kind + in_image, -1).view(shape).to(torch.int8),
        "target_rows": targets[span, 0],
        "target_columns": targets[span, 1] + target_offset,
        "feature_rows": runs[run, 0],
        "feature_columns": runs[run, 1] + feature_offset,
        "feature_views": runs[run, 2],
        "feature_patches": runs[run, 3] + feature_offset,
        "stream_tokens": batch["stream_tokens"],
        "pixel_values": batch["pixel_values"],
        "view_rows": batch["view_rows"],
    }


def _find(places: Tensor, spans: Tensor, length: int) -> Tensor:
    """Return the number, from 1 on, of the span that holds each place; 0 where none does.

    Args:
        places: ascending, row * length + column.
        spans: (S, 3 or more), row, start, end; ascending, and none is in another.
        length: L.
    """
    rows = spans[:, 0] * length
    # An empty span comes first, so that the last one that begins at or before a place always exists.
    starts, ends = F.pad(rows + spans[:, 1], (1, 0)), F.pad(rows + spans[:, 2], (1, 0))
    found = torch.searchsorted(starts, places, right=True) - 1
    return found * (places < ends[found])


def _spread(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return for each of `total` elements of runs side by side which run it is of, and its place in that."""
    ends, elements = lengths.cumsum(0), torch.arange(total, device=lengths.device)
    runs = torch.searchsorted(ends, elements, right=True)
    return runs, elements - (ends - lengths)[runs]


def target_places(labels: Tensor) -> Batch:
    """Return `target_rows` and `target_columns` of labels (P, L) on the CPU, for batches made by hand."""
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # nothing predicts the first column
    return {"target_rows": rows, "target_columns": columns + 1}
