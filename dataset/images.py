"""Encoded bytes -> pixels: the only module that decodes pictures, within a bound on memory.

The image tokenizer uses `decode` and `scale_and_crop`; the vision tower (SigLIP) uses `decode` and `resize`
(vision_views.py). By default both see the same picture: oriented by its EXIF, transparency blended on white.
With `compat` they see what the reference implementation saw: no EXIF, modes kept while resizing, and for the
vision tower the colours hidden behind transparency.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow
from PIL import Image, TiffImagePlugin

from unitoken.dataset.image_files import (
    MAX_PIXELS,
    ImageError,
    decoded_pixels,
    exif_transpose,
    ignored_warnings,
    open_image,
    read_header,
    reason_of,
)

MEMORY_BYTES = 2 << 30  # for the pictures that all threads of a process are decoding
EXTRA_BYTES = 16  # a pixel, at most, beyond the decoded picture, while it is blended and converted
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 0x0102, 0x0106, 0  # two TIFF tags, and a value of the second
STRIP_PIXELS = 1 << 18  # pixels that are blended at a time, at 72 bytes each
SWAPS_SIDES = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)

# Bytes in which Pillow stores a pixel; 4 in all other modes.
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# Bytes a pixel that a format's own library takes while it decodes (measured; JPEG 2000 with the smallest
# code blocks).
_DECODER_BYTES = {"WEBP": 8, "AVIF": 8, "JPEG2000": 32}


class _Memory:
    """A limit of bytes that all threads may hold together; a thread that needs more waits.

    A thread that needs more than the whole limit waits until no other holds any.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


_memory = _Memory(MEMORY_BYTES)


def _reset_memory() -> None:
    """Forget what the parent's threads hold: a forked process does not have these threads to release it."""
    global _memory
    _memory = _Memory(MEMORY_BYTES)


os.register_at_fork(after_in_child=_reset_memory)


@contextlib.contextmanager
def decoded(data: bytes | memoryview, compat: bool = False) -> Iterator[Image.Image]:
    """Decode a picture; inside the block it counts towards the memory limit of all threads.

    Args:
        data: the encoded picture.
        compat: keep mode and orientation as they are stored; otherwise the picture is RGB.

    Raises:
        ImageError: also for any error inside the block.
    """
    header = read_header(data)
    is_plain = header.mode in ("RGB", "L") and "transparency" not in header.info
    bytes_per_pixel = (
        _MODE_BYTES.get(header.mode, 4)
        + (4 if is_plain else EXTRA_BYTES)
        + _DECODER_BYTES.get(header.format or "", 0)
    )
    size = decoded_pixels(header) * bytes_per_pixel
    del header
    with _memory.hold(size):
        image = open_image(data)
        try:
            yield image if compat else _displayed(image)
        except ImageError:
            raise
        except Exception as error:  # Pillow's conversions and resizing raise errors of many kinds
            raise ImageError(f"cannot be converted to RGB: {reason_of(error)}") from None


def decode(data: bytes | memoryview, compat: bool = False) -> Image.Image:
    """Decode one picture, as `decoded` does."""
    with decoded(data, compat) as image:
        return image


def displayed_size(data: bytes | memoryview, compat: bool = False) -> tuple[int, int]:
    """Return the (width, height) that `decode` would give, from the header alone. Raises ImageError."""
    header = read_header(data)
    if compat or header.format == "TIFF":  # Pillow itself orients a TIFF
        return header.size
    return (header.height, header.width) if exif_transpose(header) in SWAPS_SIDES else header.size


def _displayed(image: Image.Image) -> Image.Image:
    """Return the picture as it is displayed: oriented by its EXIF, transparency blended on white, in RGB."""
    transpose = exif_transpose(image) if image.format != "TIFF" else None
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image)
    if image.mode == "RGB" and "transparency" in image.info:  # one colour of a PNG may be transparent
        image = image.convert("RGBA")
    if transpose is not None:
        image = image.transpose(transpose)
    return blend_on_white(image)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield (number of the first row, rows) in strips of about STRIP_PIXELS."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert greys of 16 or 32 bits to 8.

    If the format does not define white, the largest value decides whether it is 1, 255 or 65535.

    Raises:
        ImageError: the greys have another range.
    """
    low, high = 0.0, 65535.0
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # all other greys have 16 bits
        ends = [
            (float(part.min()), float(part.max()))
            for part in (np.asarray(strip) for _, strip in _strips(image))
        ]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        if not (low >= 0 and high <= 65535):  # in this form, NaN is an error, too
            expected = "0 to 1, 0 to 255 or 0 to 65535" if image.mode == "F" else "0 to 255 or 0 to 65535"
            raise ImageError(f"greys of mode {image.mode} from {low:g} to {high:g}, expected {expected}")
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    is_12_bits = image.mode.startswith("I;16") and tags.get(BITS) == (12,)
    transparent = image.info.get("transparency")  # one grey of a PNG may be transparent
    result = Image.new("L", image.size)
    for top, strip in _strips(image):
        stored = values = np.asarray(strip)
        if high > 255:
            values = values.astype(np.int32).clip(0, 65535) >> (4 if is_12_bits else 8)
        elif image.mode == "F":
            values = np.rint(values * (255.0 if high <= 1 else 1.0))
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts those of up to 8 bits itself
            values = 255 - values
        if isinstance(transparent, int):
            values = np.where(stored == transparent, 255, values)
        result.paste(Image.fromarray(values.astype(np.uint8)), (0, top))
    return result


def blend_on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB and blend transparency on white.

    The same as `_whiten_transparency` of the reference implementation (UniToken), which also leaves RGB
    unchanged.
    """
    if image.mode == "RGB":
        return image
    if image.mode in ("P", "PA") and image.palette is None:
        raise ImageError(f"mode {image.mode} without a palette")
    if not image.has_transparency_data:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):  # a whole picture at once takes 72 bytes a pixel
        rgba = np.asarray(strip.convert("RGBA"))
        alpha = rgba[:, :, 3:] / 255.0  # float64, and truncated
        blended = (
            ((1 - alpha) * 255 + alpha * rgba[:, :, :3]).astype(np.uint8)
            if alpha.min() < 1
            else rgba[:, :, :3]
        )
        result.paste(Image.fromarray(blended), (0, top))
    return result


def crop_sizes(target_size: int, patch: int = 32, max_ratio: float = 4.0) -> list[tuple[int, int]]:
    """Return the crops (width, height) of about `target_size`**2 pixels.

    The same as Lumina-mGPT's `generate_crop_size_list`.

    Args:
        target_size: in pixels, of a square crop.
        patch: in pixels; both sides are multiples of it.
        max_ratio: the largest ratio of the sides.
    """
    patches = (target_size // patch) ** 2
    sizes = []
    width, height = patches, 1
    while width > 0:
        if max(width, height) / min(width, height) <= max_ratio:
            sizes.append((width * patch, height * patch))
        if (height + 1) * width <= patches:
            height += 1
        else:
            width -= 1
    return sizes


def allowed_crops(crop: str, target_size: int, unit: int) -> list[tuple[int, int]]:
    """Return the (width, height) in pixels that an image may be cut to.

    Args:
        crop: the setting of the tokenization; "square" allows one crop, other values several shapes.
        target_size: in pixels, of a square crop.
        unit: in pixels; both sides of other crops are multiples of it.
    """
    return [(target_size, target_size)] if crop == "square" else crop_sizes(target_size, patch=unit)


def choose_crop(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the crop that keeps most of an image of `size` (width, height); the first one in a tie."""

    def kept_fraction(crop: tuple[int, int]) -> float:
        ratios = (crop[0] / size[0], crop[1] / size[1])
        return min(ratios) / max(ratios)

    return max(sizes, key=kept_fraction)


def crop_generator(seed: int, item: str, number: int) -> np.random.Generator:
    """Return the random generator for the position of a crop.

    It depends only on the arguments, not on what else is in the input.

    Args:
        seed: of the tokenization.
        item: the item's id.
        number: of the image in the item.
    """
    digest = hashlib.sha256(json.dumps([seed, item, number]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def scale_and_crop(
    image: Image.Image, crop: tuple[int, int], generator: np.random.Generator | None = None
) -> Image.Image:
    """Scale an image so that it just covers `crop` (width, height), and cut it to that size.

    The same as `center_crop` of the reference implementation (UniToken): BOX halving while the image is at
    least twice too large, then BICUBIC.

    Args:
        image: in any mode.
        crop: (width, height) of the result.
        generator: draws the position of the crop; None takes the centre.

    Raises:
        ImageError: the shape is too extreme.
    """
    while image.width >= 2 * crop[0] and image.height >= 2 * crop[1]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(crop[0] / image.width, crop[1] / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:  # 1 x 100,000 pixels would become 512 x 51 million
        raise ImageError(
            f"{image.width} x {image.height} pixels are too narrow to cover {crop[0]} x {crop[1]}"
        )
    image = image.resize(size, Image.Resampling.BICUBIC)
    spare_width, spare_height = image.width - crop[0], image.height - crop[1]
    if generator is None:
        left, upper = spare_width // 2, spare_height // 2
    else:
        left = int(generator.integers(0, spare_width, endpoint=True))
        upper = int(generator.integers(0, spare_height, endpoint=True))
    return image.crop((left, upper, left + crop[0], upper + crop[1]))


def tokenizer_pixels(
    image: Image.Image, crop: tuple[int, int], generator: np.random.Generator | None = None
) -> npt.NDArray[np.uint8]:
    """Return the picture as the image tokenizer sees it, (height, width, 3); see `scale_and_crop`."""
    return np.asarray(blend_on_white(scale_and_crop(image, crop, generator)))


def to_vision_rgb(image: Image.Image, compat: bool) -> Image.Image:
    """Convert to RGB for the vision tower; `compat` shows the colours that are hidden behind transparency."""
    if not compat:
        return blend_on_white(image)
    with ignored_warnings:  # Pillow recommends RGBA for a palette with transparency
        # From the array: PIL keeps info["transparency"] after convert("RGB"), and later steps would blend it.
        return Image.fromarray(np.asarray(image.convert("RGB")))


def resize(image: Image.Image, sizes: Sequence[tuple[int, int]], compat: bool) -> list[npt.NDArray[np.uint8]]:
    """Resize an RGB image to each (width, height) in `sizes`, BICUBIC.

    Args:
        image: in mode RGB.
        sizes: (width, height) in pixels.
        compat: use Pillow, for the same bits as the reference implementation. Otherwise use torch, which
            takes a fifth of the time and differs by 1 or 2 of 255 in some pixels, as its weights have 16
            bits.

    Returns:
        An array (3, height, width) for each size.
    """
    if compat:
        arrays = (np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes)
        return [pixels.transpose(2, 0, 1) for pixels in arrays]
    import torch  # not needed for tokenizing

    with ignored_warnings:  # torch warns that the array is read-only; nothing here writes to it
        pixels = torch.from_numpy(_stored_pixels(image)).permute(2, 0, 1)[None]
    interpolate = functools.partial(torch.nn.functional.interpolate, pixels, mode="bicubic", antialias=True)
    resized = [pixels if size == image.size else interpolate(size=size[::-1]) for size in sizes]
    return [batch[0, :3].numpy() for batch in resized]


def _stored_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return Pillow's memory of an RGB image, (height, width, 4), or else a copy, (height, width, 3)."""
    try:
        return np.asarray(pyarrow.array(image).flatten()).reshape(image.height, image.width, 4)
    except (TypeError, ValueError):  # Pillow before 11.2, or an image that it stores in several pieces
        return np.asarray(image)
