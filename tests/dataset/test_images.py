"""Decoding and cropping: what the image tokenizer and the vision tower see of a picture."""

import io
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unitoken.dataset import image_files, images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import choose_crop, crop_sizes, decode, scale_and_crop, tokenizer_pixels
from unitoken.dataset.vision_views import Pixels, Views


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_crop_sizes_are_the_references(golden: Path) -> None:
    recorded = json.loads((golden / "dev" / "B_crop.json").read_text())
    for target, sizes in recorded["crop_size_lists"].items():
        assert [list(size) for size in crop_sizes(int(target))] == sizes


def test_every_resize_and_crop_is_the_references(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operations: list[list[object]] = []
    resize, crop = Image.Image.resize, Image.Image.crop

    def record_resize(self: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        operations.append(["resize", list(self.size), list(size), resample.name.lower()])
        return resize(self, size, Image.Resampling.NEAREST)

    def record_crop(self: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        operations.append(["crop", list(self.size), list(box)])
        return crop(self, box)

    monkeypatch.setattr(Image.Image, "resize", record_resize)
    monkeypatch.setattr(Image.Image, "crop", record_crop)
    for case in json.loads((golden / "dev" / "B_crop.json").read_text())["cases"]:
        for key in case.keys() - {"size"}:
            sizes = [(512, 512)] if key == "fixed512" else crop_sizes(int(key))
            chosen = choose_crop(tuple(case["size"]), sizes)
            assert list(chosen) == case[key]["crop_size"]
            operations.clear()
            scale_and_crop(Image.new("1", tuple(case["size"])), chosen)
            assert operations == case[key]["ops"], case["size"]


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 64]))
def test_a_crop_has_the_requested_size(width: int, height: int, target: int) -> None:
    crop = choose_crop((width, height), crop_sizes(target, patch=16))
    assert scale_and_crop(Image.new("L", (width, height)), crop).size == crop


def test_transparency_is_white_on_both_paths() -> None:
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (tokenizer_pixels(decode(encoded(hidden)), (8, 8)) == 255).all()
    assert (vision_pixels(encoded(hidden), 8) == 255).all()


def test_compat_shows_hidden_colours_on_the_continuous_path() -> None:
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert vision_pixels(encoded(hidden), 8, compat=True)[:, 0, 0].tolist() == [255, 0, 0]


def test_pictures_are_oriented_by_exif_unless_compat() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    assert decode(data).size == (10, 20)
    assert decode(data, compat=True).size == (20, 10)


def test_sixteen_bits_keep_their_greys_unless_compat() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
    assert len(np.unique(tokenizer_pixels(decode(encoded(ramp)), (8, 8)))) == 64
    assert len(np.unique(tokenizer_pixels(decode(encoded(ramp), compat=True), (8, 8)))) < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "F", "I;16"])
@pytest.mark.parametrize("compat", [False, True])
def test_every_mode_becomes_rgb(mode: str, compat: bool) -> None:
    data = encoded(Image.new(mode, (6, 6)), "TIFF" if mode in ("CMYK", "LAB", "I", "F") else "PNG")
    assert decode(data, compat=True).mode == mode
    pixels = tokenizer_pixels(decode(data, compat), (4, 4))
    assert pixels.shape == (4, 4, 3)
    assert pixels.dtype == np.uint8
    assert vision_pixels(data, 4, compat).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("data", "needed"),
    [
        (b"", "not an image: 0 bytes"),
        (b"hello, I am text", "not an image: 16 bytes"),
        (encoded(Image.effect_noise((99, 99), 50))[:500], "cannot be decoded: "),
        (encoded(Image.effect_noise((99, 99), 50), "JPEG")[:500], "cannot be decoded: .*truncated"),
    ],
)
def test_an_incomplete_image_is_an_error(data: bytes, needed: str) -> None:
    with pytest.raises(ImageError, match=needed):
        decode(data)


def test_a_decompression_bomb_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", 99)
    assert decode(encoded(Image.new("L", (9, 11)))).size == (9, 11)
    with pytest.raises(ImageError, match="10 x 10 pixels, at most 99 are decoded"):
        decode(encoded(Image.new("L", (10, 10))))


def test_an_extreme_shape_is_rejected() -> None:
    with pytest.raises(ImageError, match="1 x 60000 pixels are too narrow to cover 512 x 512"):
        scale_and_crop(Image.new("L", (1, 60_000)), (512, 512))


def test_a_transparent_colour_of_a_png_is_white_unless_compat() -> None:
    data = encoded(Image.new("RGB", (8, 8), (10, 20, 30)), transparency=(10, 20, 30))
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 255, 255]
    assert vision_pixels(data, 8)[:, 0, 0].tolist() == [255, 255, 255]
    assert tokenizer_pixels(decode(data, compat=True), (8, 8))[0, 0].tolist() == [10, 20, 30]
    assert vision_pixels(data, 8, compat=True)[:, 0, 0].tolist() == [10, 20, 30]


def test_a_random_crop_only_moves_the_window() -> None:
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (20, 1)))
    lefts = {
        int(np.asarray(scale_and_crop(ramp, (20, 20), images.crop_generator(0, "a", number)))[0, 0])
        for number in range(200)
    }
    assert min(lefts) < 10
    assert max(lefts) > 170
    assert len(lefts) > 80
    square = Image.effect_noise((40, 40), 50)
    assert (
        np.asarray(scale_and_crop(square, (20, 20), images.crop_generator(0, "a", 0)))
        == np.asarray(scale_and_crop(square, (20, 20)))
    ).all()


def test_a_random_crop_is_seeded_by_item_and_number() -> None:
    first = [
        images.crop_generator(*key).random() for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    ]
    assert len(set(first)) == 4
    assert images.crop_generator(0, "a", 0).random() == first[0] == pytest.approx(0.5, abs=0.5)


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    """Pillow warns from half the limit on; `catch_warnings` in each thread left its filters behind."""
    data = encoded(Image.new("L", (64, 64)))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
        assert all(image.size == (64, 64) for image in pool.map(images.open_image, [data] * 500))
    assert list(warnings.filters) == before


def vision_pixels(data: bytes, size: int, compat: bool = False) -> Pixels:
    """Return the whole picture as the vision tower sees it: (3, size, size)."""
    return Views(size, size).pixels(data, compat)[0][0]
