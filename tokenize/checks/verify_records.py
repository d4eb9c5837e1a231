"""What must hold of every sample of a dataset: a decoded record and its row of the sidecar -> what is wrong, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.manifest import SIDECAR, Manifest
from unitoken.dataset.record import Record, token_type
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, Vocabulary

MIGRATED, WITHOUT_IMAGES = (
    "record.json",
    "record.json without images",
)  # as the manifest's `adapter` (migrate.py)


@dataclass(frozen=True)
class Rules:
    vocabulary: Vocabulary
    sizes: frozenset[tuple[int, int]]  # height, width in latents that an image may have
    compat: bool  # special tokens may come from the text; EXIF is ignored
    originals: bool  # every image is there as it was before it became tokens

    @classmethod
    def of(cls, manifest: Manifest, vocabulary: Vocabulary) -> Rules:
        sizes = crop_latents(manifest.crop, manifest.target_size, manifest.vision.downsampling)
        return cls(vocabulary, sizes, manifest.compat is not None, manifest.adapter != WITHOUT_IMAGES)

    @cached_property
    def token_type(self) -> str:
        return token_type(self.vocabulary.size)

    @cached_property
    def placed(self) -> npt.NDArray[np.bool_]:
        """By id: has a fixed place, as the first token or in an image."""
        placed = np.zeros(self.vocabulary.size, bool)
        placed[list(self.vocabulary.special_ids - {self.vocabulary.end_of_turn})] = True
        return placed


def crop_latents(crop: str, target_size: int, downsampling: int) -> frozenset[tuple[int, int]]:
    """The (height, width) in latents that a setting's crops can have."""
    crops = images.allowed_crops(crop, target_size, downsampling * LATENTS_PER_GRID_UNIT)
    return frozenset((height // downsampling, width // downsampling) for width, height in crops)


def wrong_with(record: Record, row: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    """Every broken rule in a line. What stands on a broken one is not looked at."""
    tokens, targets, spans = record.tokens, record.target_spans, record.image_spans
    if tokens.ndim != 1 or tokens.dtype.name != rules.token_type:
        yield f"tokens: {tokens.dtype.name} {tokens.shape}, expected {rules.token_type} (T,)"
        return
    if int(tokens.max()) >= rules.vocabulary.size:
        yield f"token {int(tokens.max())} is outside the vocabulary of {rules.vocabulary.size}"
        return
    if targets.ndim != 2 or targets.shape[1] != 2:
        yield f"target_spans: shape {targets.shape}, expected (S, 2)"
        return
    unordered = [
        line
        for name, value in (("target", targets), ("image", spans))
        for line in _unordered(name, value, len(tokens))
    ]
    yield from unordered
    if unordered:
        return
    yield from _blocks(tokens, spans, rules)
    if not rules.compat:
        yield from _misplaced(tokens, spans, rules)
    yield from _row(record, row)
    yield from _originals(record, row, rules)


def _unordered(name: str, spans: npt.NDArray[np.uint32], length: int) -> Iterator[str]:
    starts, ends = spans[:, 0], spans[:, 1]
    if (starts >= ends).any():
        yield f"{name} spans: one is empty"
    if (starts[1:] < ends[:-1]).any():
        yield f"{name} spans: not in order, or one over the other"
    if len(ends) and int(ends.max()) > length:
        yield f"{name} spans: one ends at {int(ends.max())} of {length} tokens"


def _blocks(tokens: npt.NDArray[Any], spans: npt.NDArray[np.uint32], rules: Rules) -> Iterator[str]:
    for number, (start, end, height, width) in enumerate(spans.tolist()):
        try:
            found = rules.vocabulary.image_codes(tokens[start:end]).shape
        except (ValueError, IndexError) as error:
            yield f"image {number}: {error}"
            continue
        if found != (height, width):
            yield f"image {number}: {found[0]} x {found[1]} latents by its grid tokens, {height} x {width} by its span"
        elif found not in rules.sizes:
            yield f"image {number}: {height} x {width} latents, which the dataset's crops do not make"


def _misplaced(tokens: npt.NDArray[Any], spans: npt.NDArray[np.uint32], rules: Rules) -> Iterator[str]:
    if int(tokens[0]) != rules.vocabulary.bos:
        yield f"begins with token {int(tokens[0])}, expected {rules.vocabulary.bos}"
    placed = rules.placed[tokens]
    placed[0] = False
    for start, end in spans[:, :2].tolist():
        placed[start:end] = False
    if placed.any():
        position = int(placed.argmax())
        yield f"special token {int(tokens[position])} at {position}, outside an image"


def _row(record: Record, row: Mapping[str, Any]) -> Iterator[str]:
    targets, firsts = record.target_spans.astype(np.int64), record.image_spans[:, :1]
    trained = ((targets[:, 0] <= firsts) & (firsts < targets[:, 1])).any(1)  # (N,)
    found = {
        "id": record.id,
        "tokens": len(record.tokens),
        "target_tokens": int((targets[:, 1] - targets[:, 0]).sum()),
        "images": len(record.image_spans),
        "question_images": int((~trained).sum()),
        "generated": trained.tolist(),
    }
    for name, value in found.items():
        if row[name] != value:
            yield f"{name}: {value!r}, {SIDECAR} has {row[name]!r}"


def _originals(record: Record, row: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    sizes = row["image_sizes"]
    if not len(record.images) == len(record.image_spans) == len(sizes) / 2:
        yield f"{len(record.images)} images, {len(record.image_spans)} image spans, {len(sizes)} sides in {SIDECAR}"
        return
    for number, (data, width, height) in enumerate(zip(record.images, sizes[::2], sizes[1::2], strict=True)):
        if rules.originals:
            problem = _unlike(data, (width, height), rules.compat)
        else:
            problem = "bytes in a dataset without images" if data or width or height else None
        if problem:
            yield f"image {number}: {problem}"


def _unlike(data: bytes | memoryview, size: tuple[int, int], compat: bool) -> str | None:
    """Why the picture can not be one of (width, height), as far as its header says."""
    try:
        found = images.displayed_size(data, compat)
        if found != size:  # an orientation may stand behind the pixels: all of the picture is read for it
            found = images.decode(data, compat).size
    except ImageError as error:
        return f"no picture: {error}"
    return None if found == size else f"{found[0]} x {found[1]} pixels, {SIDECAR} has {size[0]} x {size[1]}"
