"""What can be shown of a reply in the making: its text, its pictures, and the rows of the one being drawn."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from unitoken.dataset.vision_views import Pixels
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.chat.talk import Part
from unitoken.train.generation.command import png
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import split_reply

Codes = npt.NDArray[np.int64]

TEXT_SECONDS = 0.05
"""Between two looks at a reply."""
PICTURE_SECONDS = 0.3
"""Between two looks at the rows of a picture, at least."""
DECODING_SHARE = 0.2
"""The most of the time that decoding unfinished pictures may take."""


class OpenPicture(NamedTuple):
    """A picture that is being drawn: the codes (rows, w) of its complete rows, of `height` rows."""

    height: int
    codes: Codes


def split_growing_reply(
    vocabulary: Vocabulary, reply: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> list[list[int] | Codes | OpenPicture]:
    """Split a reply in the making into its parts, in order.

    Args:
        vocabulary: of the model.
        reply: its ids so far.
        sizes: the (height, width) in latents that a picture may have.
    """
    ids = list(reply)
    start = len(ids) - 1 - ids[::-1].index(vocabulary.image_start) if vocabulary.image_start in ids else None
    if start is None or not sizes or vocabulary.image_end in ids[start:]:
        return [*split_reply(vocabulary, ids)]
    parts: list[list[int] | Codes | OpenPicture] = [*split_reply(vocabulary, ids[:start])]
    opened = _open_picture(vocabulary, ids[start:], sizes)
    return [*parts, opened] if opened is not None else parts


def _open_picture(
    vocabulary: Vocabulary, ids: list[int], sizes: Sequence[tuple[int, int]]
) -> OpenPicture | None:
    """Return the complete rows of a picture that begins with `ids`; None before the first."""
    image = vocabulary.image
    headers = [(size, image.header_ids(*size)) for size in sizes]
    for (height, width), header in headers:
        if tuple(ids[: len(header)]) != header:
            continue
        row = width + len(image.row_end)
        rows = (len(ids) - len(header)) // row
        end = len(header) + rows * row
        if rows:
            # As a whole block, with the last row in the place of those that are missing.
            block = ids[:end] + ids[end - row : end] * (height - rows) + list(image.end)
            return OpenPicture(height, vocabulary.image_codes(np.array(block))[:rows])
    return None


class GrowingReply:
    """Decodes a reply in the making, its finished pictures once and the rows of an unfinished one rarely.

    Args:
        dialogue: decodes texts and pictures.
        sizes: the (height, width) in latents that a picture may have.
        clock: returns seconds.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        sizes: Sequence[tuple[int, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dialogue, self._sizes, self._clock = dialogue, sizes, clock
        self._finished: dict[int, bytes] = {}  # by the part's place
        self._rows: tuple[int, int] = (0, 0)  # part and rows of the picture that was decoded last
        self._shown: bytes | None = None
        self._looked, self._decoded, self._took = float("-inf"), float("-inf"), 0.0

    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return self._clock() - self._looked >= TEXT_SECONDS

    def parts(self, reply: Sequence[int], unfinished: bool = True) -> list[Part]:
        """Return what can be shown of the ids so far.

        Args:
            reply: the ids so far.
            unfinished: with the rows of an unfinished picture, of which the latest may be missing.
        """
        shown: list[Part] = []
        for place, part in enumerate(split_growing_reply(self._dialogue.vocabulary, reply, self._sizes)):
            if isinstance(part, OpenPicture):
                if unfinished and (picture := self._open(place, part)) is not None:
                    shown.append(picture)
            elif isinstance(part, np.ndarray):
                if place not in self._finished:
                    self._finished[place] = png(self._dialogue.vision.decode(part[None])[0])
                shown.append(self._finished[place])
            else:
                shown.append(self._dialogue.tokenizer.decode(part, skip_special_tokens=True))
        self._looked = self._clock()
        return shown

    def _open(self, place: int, picture: OpenPicture) -> bytes | None:
        """Return the rows of a picture in the making, decoded now or before."""
        begun = self._clock()
        pause = max(PICTURE_SECONDS, self._took / DECODING_SHARE)
        same_picture, rows = self._rows[0] == place, len(picture.codes)
        if not same_picture:
            self._shown = None
        if begun - self._decoded >= pause and self._rows != (place, rows):
            pixels = self._dialogue.vision.decode(picture.codes[None])[0]
            self._shown = _with_missing_rows(pixels, picture.height * self._dialogue.vision.downsampling)
            self._rows, self._decoded = (place, rows), self._clock()
            self._took = self._decoded - begun
        return self._shown


def _with_missing_rows(pixels: Pixels, height: int) -> bytes:
    """Encode the upper part of a picture as PNG of the full height; the rest is transparent."""
    canvas = np.zeros((height, pixels.shape[1], 4), np.uint8)
    canvas[: len(pixels), :, :3] = pixels
    canvas[: len(pixels), :, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
