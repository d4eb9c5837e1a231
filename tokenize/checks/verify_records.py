"""For `verify`: check a sample's record and its row of the sidecar against the rules of the dataset."""

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
from unitoken.dataset.sidecar import sidecar_row
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, Vocabulary

# The manifest's `adapter` of a dataset that was migrated (migrate.py).
MIGRATED, WITHOUT_IMAGES = "record.json", "record.json without images"


@dataclass(frozen=True)
class Rules:
    """What the rules depend on in a dataset."""

    vocabulary: Vocabulary
    sizes: frozenset[tuple[int, int]]  # height, width in latents that an image may have
    compat: bool  # special tokens may come from the text; EXIF is ignored
    originals: bool  # the record holds every image as it was before it became tokens

    @classmethod
    def of(cls, manifest: Manifest, vocabulary: Vocabulary) -> Rules:
        """Return the rules of a dataset."""
        sizes = crop_latents(manifest.crop, manifest.target_size, manifest.vision.downsampling)
        return cls(vocabulary, sizes, manifest.compat is not None, manifest.adapter != WITHOUT_IMAGES)

    @cached_property
    def token_type(self) -> str:
        """The numpy type of the tokens."""
        return token_type(self.vocabulary.size)

    @cached_property
    def placed(self) -> npt.NDArray[np.bool_]:
        """By token id: whether its only place is the first token or an image."""
        placed = np.zeros(self.vocabulary.size, bool)
        placed[list(self.vocabulary.placed_ids)] = True
        return placed


def crop_latents(crop: str, target_size: int, downsampling: int) -> frozenset[tuple[int, int]]:
    """Return the (height, width) in latents that an image can have with these settings."""
    crops = images.allowed_crops(crop, target_size, downsampling * LATENTS_PER_GRID_UNIT)
    return frozenset((height // downsampling, width // downsampling) for width, height in crops)


def check_sample(record: Record, row: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    """Yield each broken rule, in one line. Checks that depend on a failed check are skipped.

    Args:
        record: the decoded sample.
        row: its row of the sidecar.
        rules: the dataset's rules.
    """
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
    problems = [
        *_check_order("target", targets, len(tokens)),
        *_check_order("image", spans, len(tokens)),
    ]
    if problems:
        yield from problems
        return
    yield from _check_image_blocks(tokens, spans, rules)
    if not rules.compat:
        yield from _check_special_tokens(tokens, spans, rules)
    yield from _check_row(record, row)
    yield from _check_originals(record, row, rules)


def _check_order(name: str, spans: npt.NDArray[np.uint32], length: int) -> Iterator[str]:
    starts, ends = spans[:, 0], spans[:, 1]
    if (starts >= ends).any():
        yield f"{name} spans: one is empty"
    if (starts[1:] < ends[:-1]).any():
        yield f"{name} spans: not in order, or one over the other"
    if len(ends) and int(ends.max()) > length:
        yield f"{name} spans: one ends at {int(ends.max())} of {length} tokens"


def _check_image_blocks(
    tokens: npt.NDArray[Any], spans: npt.NDArray[np.uint32], rules: Rules
) -> Iterator[str]:
    for number, (start, end, height, width) in enumerate(spans.tolist()):
        try:
            found = rules.vocabulary.image_codes(tokens[start:end]).shape
        except (ValueError, IndexError) as error:
            yield f"image {number}: {error}"
            continue
        if found != (height, width):
            yield (
                f"image {number}: {found[0]} x {found[1]} latents by its grid tokens, "
                f"{height} x {width} by its span"
            )
        elif found not in rules.sizes:
            yield f"image {number}: {height} x {width} latents, which the dataset's crops do not make"


def _check_special_tokens(
    tokens: npt.NDArray[Any], spans: npt.NDArray[np.uint32], rules: Rules
) -> Iterator[str]:
    first_ids = rules.vocabulary.conversation.first_ids()
    if first_ids is not None and int(tokens[0]) not in first_ids:
        yield f"begins with token {int(tokens[0])}, expected {' or '.join(map(str, sorted(first_ids)))}"
    misplaced = rules.placed[tokens]  # (T,)
    misplaced[0] = False
    for start, end in spans[:, :2].tolist():
        misplaced[start:end] = False
    if misplaced.any():
        position = int(misplaced.argmax())
        yield f"special token {int(tokens[position])} at {position}, outside an image"


def _check_row(record: Record, row: Mapping[str, Any]) -> Iterator[str]:
    expected = sidecar_row(record, [])
    del expected["image_sizes"]  # compared with the originals, which a dataset may lack
    for name, value in expected.items():
        if row[name] != value:
            yield f"{name}: {value!r}, {SIDECAR} has {row[name]!r}"


def _check_originals(record: Record, row: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    sides = row["image_sizes"]
    if not len(record.images) == len(record.image_spans) == len(sides) / 2:
        yield (
            f"{len(record.images)} images, {len(record.image_spans)} image spans, "
            f"{len(sides)} sides in {SIDECAR}"
        )
        return
    for number, (data, width, height) in enumerate(zip(record.images, sides[::2], sides[1::2], strict=True)):
        if rules.originals:
            problem = _check_original(data, (width, height), rules.compat)
        else:
            problem = "bytes in a dataset without images" if data or width or height else None
        if problem:
            yield f"image {number}: {problem}"


def _check_original(data: bytes | memoryview, size: tuple[int, int], compat: bool) -> str | None:
    """Return why the bytes can not be a picture of (width, height), or None. Reads mostly the header."""
    try:
        found = images.displayed_size(data, compat)
        if found != size:  # an EXIF orientation may follow the pixels: read the whole picture for it
            found = images.decode(data, compat).size
    except ImageError as error:
        return f"no picture: {error}"
    return None if found == size else f"{found[0]} x {found[1]} pixels, {SIDECAR} has {size[0]} x {size[1]}"
