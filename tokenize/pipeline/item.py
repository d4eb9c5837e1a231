"""What travels through the stages of a worker, and the items that fall out on the way.

    SourceItem  ->  Item  ->  Item with pictures  ->  Sample
    as read         parsed    cropped, then encoded   tokenized

A stage is a function of one item. `Rejects.apply` runs it on an iterator of items, and notes those for which
it raises ItemError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from unitoken.codec.conversations import Conversation, ItemError
from unitoken.codec.image_tokenizer.encoder import Codes, Pixels
from unitoken.dataset.record import Record

NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Place:
    """An item's place in the input, and its id."""

    piece: int
    file: str
    position: int  # in its file
    id: str


@dataclass(frozen=True, slots=True)
class SourceItem:
    """An item as its source holds it, or as an adapter has rewritten it."""

    place: Place
    value: object  # an ItemError where the item could not be read
    folder: str  # the folder or URL where relative names of its images begin


@dataclass(eq=False)
class Picture:
    """An image of an item: its original bytes, and the pixels or codes made from them."""

    original: bytes
    size: Size  # of the original, as it is seen
    pixels: Pixels  # cropped for the image tokenizer; empty once there are codes
    codes: Codes | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation on its way to tokens; it has no pictures until they are opened."""

    place: Place
    conversation: Conversation
    folder: str  # as in SourceItem
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenized item with what only its row of the sidecar and its chunk's index need."""

    place: Place
    record: Record
    image_sizes: tuple[Size, ...]  # of the originals
    turns_left_out: int = 0  # by an adapter


class HasPlace(Protocol):
    """Any of the items above."""

    @property
    def place(self) -> Place:
        """The item's place in the input, and its id."""
        ...


T = TypeVar("T", bound=HasPlace)
K = TypeVar("K", bound=HasPlace)


@dataclass
class Rejects:
    """The rejected items of a chunk. Safe to use from several threads."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def apply(self, stage: str, function: Callable[[T], K], items: Iterable[T]) -> Iterator[K]:
        """Apply a stage to each item.

        An item for which the stage raises ItemError becomes a reject and goes no further.

        Args:
            stage: the name of the stage in the line of a reject.
            function: the stage.
            items: what comes out of the stage before.
        """
        for item in items:
            try:
                result = function(item)
            except ItemError as error:
                self.lines.append(reject_line(item.place, stage, str(error)))
            else:
                yield result

    def dump(self) -> bytes:
        """Return the rejects as JSON lines, ordered by the items' places."""
        lines = sorted(self.lines, key=lambda line: (line["chunk"], line["position"]))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return text.encode(errors="backslashreplace")  # an escaped surrogate is valid JSON


def reject_line(place: Place, stage: str, reason: str) -> dict[str, Any]:
    """Return the fields of a line of `rejects.jsonl`."""
    return {
        "chunk": place.piece,
        "file": place.file,
        "position": place.position,
        "id": place.id,
        "stage": stage,
        "reason": reason,
    }
