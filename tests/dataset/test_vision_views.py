"""The vision tower sees what it sees in the reference: sizes, pixels, and the order of features."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.paths import GOLDEN
from unitoken.dataset.images import resize
from unitoken.dataset.vision_views import NEWLINE, Views

BASE, ANYRES = Views(384, 14), Views(384, 14, anyres=True)


def golden(name: str) -> Any:
    return json.loads((GOLDEN / "dev" / name).read_text())


@pytest.mark.parametrize(
    "case", golden("C_anyres_sizes.json")["cases"], ids=lambda case: "x".join(map(str, case["size"]))
)
def test_sizes_are_the_references(case: dict[str, Any]) -> None:
    width, height = case["size"]
    assert list(ANYRES.canvas(width, height)) == case["grid_wh"]
    assert ANYRES.count(width, height) == case["n_continuous_tokens"]
    lines = ANYRES.layout(width, height)[729:]
    down, across = case["unpadded_hw"]
    assert (lines.reshape(down, across + 1)[:, -1] == NEWLINE).all()
    assert (lines.reshape(down, across + 1)[:, :-1] >= 729).all()
    assert BASE.count(width, height) == 729


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Normalise as the reference's processor does."""
    return np.ascontiguousarray(((pixels / 255).astype(np.float32) - np.float32(0.5)) / np.float32(0.5))


# Recorded with Pillow 13, which resizes this picture in another order: some values differ by one.
OTHER_PILLOW = ["d08_tall.jpg"]


@pytest.mark.parametrize("case", golden("C_pixels.json"), ids=lambda case: case["image"])
def test_pixels_are_the_references_to_the_bit(case: dict[str, Any]) -> None:
    data = (GOLDEN / "assets" / "images" / case["image"]).read_bytes()
    for views, expected in ((BASE, case["base"]), (ANYRES, case["anyres"])):
        pixels, size = views.pixels(data, compat=True)
        assert list(pixels.shape) == expected["shape"]
        assert list(size) == case["size"]
        values = normalised(pixels)
        name = f"{Path(case['image']).stem}.{'anyres' if views.anyres else 'base'}_stride24"
        if case["image"] not in OTHER_PILLOW:
            assert hashlib.sha256(values.tobytes()).hexdigest() == expected["float32_sha256"]
        with np.load(GOLDEN / "dev/C_pixels_strided.npz") as strided:
            assert abs(values[..., ::24, ::24] - strided[name]).max() <= 1 / 127
    assert ANYRES.count(*case["size"]) == case["n_continuous_tokens"]


@pytest.mark.parametrize("case", golden("C_pixels.json"), ids=lambda case: case["image"])
def test_without_compat_resizing_is_nearly_the_same(case: dict[str, Any]) -> None:
    """It is three to six times as fast, and differs by at most 2 of 255."""
    data = (GOLDEN / "assets" / "images" / case["image"]).read_bytes()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for size in ((384, 384), (500, 301)):
        (ours,), (pillows,) = (resize(image, [size], compat) for compat in (False, True))
        assert ours.shape == pillows.shape == (3, size[1], size[0])
        ours, pillows = ours.astype(int), pillows.astype(int)
        assert abs(ours - pillows).max() <= 2
        assert abs(ours - pillows).mean() < 0.6


def test_counts_are_those_of_each_size() -> None:
    sizes = np.array([[640, 480], [1920, 1080], [640, 480], [1, 1], [0, 0]])
    assert ANYRES.counts(sizes).tolist() == [2929, 2379, 2929, ANYRES.count(1, 1), ANYRES.count(1, 1)]
    assert BASE.counts(sizes).tolist() == [729] * 5
    assert ANYRES.counts(np.zeros((0, 2), np.int64)).tolist() == []


def test_features_of_tiles_are_in_the_order_of_the_picture() -> None:
    """A picture of two tiles side by side: a row of features runs through both."""
    views = Views(image_size=4, patch_size=2, anyres=True)
    assert views.canvas(80, 40) == (2, 1)
    whole, lines = views.layout(80, 40)[:4], views.layout(80, 40)[4:].reshape(2, 5)
    assert whole.tolist() == [0, 1, 2, 3]
    assert lines.tolist() == [[4, 5, 8, 9, NEWLINE], [6, 7, 10, 11, NEWLINE]]


def test_pictures_are_oriented_by_exif_unless_compat() -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert ANYRES.pixels(buffer.getvalue())[1] == (20, 40)
    assert ANYRES.pixels(buffer.getvalue(), compat=True)[1] == (40, 20)
