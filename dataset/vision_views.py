"""How the vision tower sees a picture: the whole of it squashed to a square, and with AnyRes its tiles, too.

AnyRes is the reference's (LLaVA's): the picture is scaled into the best of five canvases, two to four views large, with
black at its sides; each tile of the canvas is a view. Of the tiles' features those that show only black are left out, and
a newline stands behind each row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.dataset.images import decoded, opaque, resized

CANVASES = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # views across and down
NEWLINE = -1  # in place of a feature

Pixels = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    image_size: int = 384  # pixels a view, each way
    patch_size: int = 14
    anyres: bool = False

    @property
    def side(self) -> int:
        """Features of a view, each way."""
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """Of one view."""
        return self.side**2

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """Views across and down of the canvas that shows most of a picture, and wastes least; the first wins a tie."""

        def shown(views: tuple[int, int]) -> tuple[int, int]:
            across, down = views[0] * self.image_size, views[1] * self.image_size
            scale = min(across / width, down / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - across * down

        return max(CANVASES, key=shown)

    def count(self, width: int, height: int) -> int:
        """Positions that the features of a picture of so many pixels take, newlines included."""
        return len(self.layout(width, height))

    def counts(self, sizes: npt.NDArray[np.integer[Any]]) -> Ids:
        """`count` of (n, 2) widths and heights: (n,). Sizes of 0, of images that were not kept, count as one pixel."""
        if not self.anyres or not len(sizes):
            return np.full(len(sizes), self.features, np.int64)
        distinct, which = np.unique(np.maximum(sizes, 1), axis=0, return_inverse=True)
        found = np.array([self.count(width, height) for width, height in distinct.tolist()], np.int64)
        each: Ids = found[which.reshape(-1)]
        return each

    def layout(self, width: int, height: int) -> Ids:
        """Where each feature of a picture comes from: view * features + patch, or NEWLINE. The whole picture is view 0."""
        return _layout(self, width, height) if self.anyres else _layout(self, 1, 1)

    def pixels(self, data: bytes | memoryview, compat: bool = False) -> tuple[Pixels, tuple[int, int]]:
        """An encoded picture -> its views (V, 3, S, S), not normalised, so that a quarter of the bytes travel; and its size.

        `compat`: what the reference saw, to the bit: no EXIF, colours behind transparency shown, resized by Pillow, which
        takes three to six times as long (see `resized`). Raises ImageError.
        """
        with decoded(data, compat) as picture:
            image, size = opaque(picture, compat), self.image_size
            if not self.anyres:
                return np.ascontiguousarray(resized(image, [(size, size)], compat)[0])[None], image.size
            across, down = self.canvas(*image.size)
            width, height = _inside(image.size, (across * size, down * size))
            whole, inside = resized(image, [(size, size), (width, height)], compat)
        left, upper = (across * size - width) // 2, (down * size - height) // 2
        canvas = np.zeros((3, down * size, across * size), np.uint8)
        canvas[:, upper : upper + height, left : left + width] = inside
        tiles = (
            canvas.reshape(3, down, size, across, size).transpose(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
        )
        return np.concatenate([whole[None], tiles]), image.size


def _inside(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) of the picture's shape in a canvas, rounded up."""
    across, down = canvas[0] / size[0], canvas[1] / size[1]
    if across < down:
        return canvas[0], min(math.ceil(size[1] * across), canvas[1])
    return min(math.ceil(size[0] * down), canvas[0]), canvas[1]


@functools.lru_cache(maxsize=4096)
def _layout(views: Views, width: int, height: int) -> Ids:
    side, features = views.side, views.features
    whole = np.arange(features)
    if not views.anyres:
        return whole
    across, down = views.canvas(width, height)
    tiles = 1 + np.arange(down * across).reshape(down, 1, across, 1)
    grid = (tiles * features + whole.reshape(1, side, 1, side)).reshape(down * side, across * side)
    if width / height > grid.shape[1] / grid.shape[0]:  # black above and below
        black = (grid.shape[0] - int(height * (grid.shape[1] / width))) // 2
        grid = grid[black : grid.shape[0] - black]
    else:
        black = (grid.shape[1] - int(width * (grid.shape[0] / height))) // 2
        grid = grid[:, black : grid.shape[1] - black]
    lines = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)
    return np.concatenate([whole, lines.reshape(-1)])
