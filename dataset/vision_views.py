"""How the vision tower sees a picture: squashed to a square, and with AnyRes also in tiles.

AnyRes is that of the reference implementation (from LLaVA): the picture is scaled into the best of five
canvases of two to four views, with black at its sides, and each tile of the canvas is a view. Rows or
columns of features that only show black are left out, and a newline follows each row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.dataset.images import decoded, resize, to_vision_rgb

CANVASES = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # (columns, rows) of views
NEWLINE = -1  # in place of a feature

Pixels = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    """The views of a picture, and how their features are laid out.

    Attributes:
        image_size: the side of a view, in pixels.
        patch_size: the side of the patch that gives one feature, in pixels.
        anyres: whether tiles of the picture are further views.
    """

    image_size: int = 384
    patch_size: int = 14
    anyres: bool = False

    @property
    def side(self) -> int:
        """The number of features along a side of a view."""
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """The number of features of a view."""
        return self.side**2

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """Return the (columns, rows) of the canvas that shows most pixels of a picture and wastes least.

        The first canvas wins a tie.
        """

        def pixels_shown(canvas: tuple[int, int]) -> tuple[int, int]:
            columns, rows = canvas
            canvas_width, canvas_height = columns * self.image_size, rows * self.image_size
            scale = min(canvas_width / width, canvas_height / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - canvas_width * canvas_height

        return max(CANVASES, key=pixels_shown)

    def count(self, width: int, height: int) -> int:
        """Return the number of features of a picture of this size in pixels, including newlines."""
        return len(self.layout(width, height))

    def counts(self, sizes: npt.NDArray[np.integer[Any]]) -> Ids:
        """Return `count` (n,) for widths and heights (n, 2); 0, of images that were not kept, counts as 1."""
        if not self.anyres or not len(sizes):
            return np.full(len(sizes), self.features, np.int64)
        distinct, positions = np.unique(np.maximum(sizes, 1), axis=0, return_inverse=True)
        counts = np.array([self.count(width, height) for width, height in distinct.tolist()], np.int64)
        result: Ids = counts[positions.reshape(-1)]
        return result

    def layout(self, width: int, height: int) -> Ids:
        """Return the source of each feature: view * features + patch (view 0: whole picture), or NEWLINE."""
        return _layout(self, width, height) if self.anyres else _layout(self, 1, 1)

    def pixels(self, data: bytes | memoryview, compat: bool = False) -> tuple[Pixels, tuple[int, int]]:
        """Decode a picture and return its views and its size.

        Args:
            data: the encoded picture.
            compat: give the same bits as the reference implementation: no EXIF, colours behind transparency
                shown, resized by Pillow, which takes three to six times as long (see `images.resize`).

        Returns:
            Views (V, 3, image_size, image_size), not normalised, since uint8 is a quarter of the bytes to
            send; and (width, height) of the picture.

        Raises:
            ImageError: the picture cannot be decoded.
        """
        with decoded(data, compat) as picture:
            image, side = to_vision_rgb(picture, compat), self.image_size
            if not self.anyres:
                return np.ascontiguousarray(resize(image, [(side, side)], compat)[0])[None], image.size
            columns, rows = self.canvas(*image.size)
            width, height = _fit_into(image.size, (columns * side, rows * side))
            whole, scaled = resize(image, [(side, side), (width, height)], compat)
        left, upper = (columns * side - width) // 2, (rows * side - height) // 2
        canvas = np.zeros((3, rows * side, columns * side), np.uint8)
        canvas[:, upper : upper + height, left : left + width] = scaled
        grid = canvas.reshape(3, rows, side, columns, side)
        tiles = grid.transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)  # (rows * columns, 3, side, side)
        return np.concatenate([whole[None], tiles]), image.size


def _fit_into(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (width, height) of a picture's shape in a canvas, rounded up."""
    scale_x, scale_y = canvas[0] / size[0], canvas[1] / size[1]
    if scale_x < scale_y:
        return canvas[0], min(math.ceil(size[1] * scale_x), canvas[1])
    return min(math.ceil(size[0] * scale_y), canvas[0]), canvas[1]


@functools.lru_cache(maxsize=4096)
def _layout(views: Views, width: int, height: int) -> Ids:
    side, features = views.side, views.features
    whole = np.arange(features)
    if not views.anyres:
        return whole
    columns, rows = views.canvas(width, height)
    tiles = 1 + np.arange(rows * columns).reshape(rows, 1, columns, 1)
    grid = (tiles * features + whole.reshape(1, side, 1, side)).reshape(rows * side, columns * side)
    if width / height > grid.shape[1] / grid.shape[0]:  # black above and below
        black = (grid.shape[0] - int(height * (grid.shape[1] / width))) // 2
        grid = grid[black : grid.shape[0] - black]
    else:  # black left and right
        black = (grid.shape[1] - int(width * (grid.shape[0] / height))) // 2
        grid = grid[:, black : grid.shape[1] - black]
    lines = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)
    return np.concatenate([whole, lines.reshape(-1)])
