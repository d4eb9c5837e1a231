"""What the stages of a worker have in common: an item's place, its pictures, and what falls out on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from unitoken.codec.conversations import ItemError
from unitoken.codec.image_tokenizer.encoder import Codes, Pixels

A = TypeVar("A")
B = TypeVar("B")

NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Place:
    """An item's place in the input, and its id."""

    piece: int
    file: str
    position: int  # in its file
    id: str


@dataclass(eq=False)
class Picture:
    original: bytes
    size: tuple[int, int]  # width, height, as it is seen
    pixels: Pixels  # as the image tokenizer sees it; none once there are codes
    codes: Codes | None = None


@dataclass
class Rejects:
    """Runs the stages of a chunk, and keeps what falls out of them."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def sift(
        self, stage: str, function: Callable[[Place, A], B], values: Iterable[tuple[Place, A]]
    ) -> Iterator[tuple[Place, B]]:
        for place, value in values:
            try:
                result = function(place, value)
            except ItemError as error:
                self.lines.append({**_line(place), "stage": stage, "reason": str(error)})
            else:
                yield place, result

    def dump(self) -> bytes:
        """JSON lines by the items' places."""
        lines = sorted(self.lines, key=lambda line: (line["chunk"], line["position"]))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return text.encode(errors="backslashreplace")  # JSON's own escapes


def _line(place: Place) -> dict[str, Any]:
    return {"chunk": place.piece, "file": place.file, "position": place.position, "id": place.id}
