"""Encoded bytes -> pixels, safely: the one place that decodes a picture (image_files.py opens it).

The discrete path (image tokens) takes `decode` + `fit`; the continuous path (SigLIP) takes `decode` + `resized` (views.py). By
default both see the same picture: turned as EXIF says, transparency blended on white. With `compat` they see what the
reference saw: no EXIF, modes kept while resizing, and hidden colours behind transparency on the continuous path.
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
    QUIET,
    ImageError,
    decoded_pixels,
    open_image,
    read_header,
    reason_of,
    turn_of,
)

MEMORY_BYTES = 2 << 30  # that the pictures which are being decoded take, over all threads of a process
EXTRA_BYTES = 16  # a pixel, at most, beyond the decoded picture, while it is blended and converted
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 0x0102, 0x0106, 0  # TIFF tags, and a value of the second
STRIP_PIXELS = 1 << 18  # that are blended at a time: 72 bytes each
ON_ITS_SIDE = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)

_MODE_BYTES = {
    "1": 1,
    "L": 1,
    "P": 1,
    "I;16": 2,
    "I;16B": 2,
    "I;16L": 2,
}  # that Pillow keeps a pixel in; all others: 4
# A pixel, that a format's own library takes while it decodes (measured; JPEG 2000 with the smallest code blocks).
_DECODER_BYTES = {"WEBP": 8, "AVIF": 8, "JPEG2000": 32}


class _Memory:
    """The bytes that all threads together may decode into: who needs more waits. A picture larger than all of it goes alone."""

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


def _fresh_memory() -> None:
    """A process that was forked has none of its parent's threads, which would give back what they hold."""
    global _memory
    _memory = _Memory(MEMORY_BYTES)


os.register_at_fork(after_in_child=_fresh_memory)


@contextlib.contextmanager
def decoded(data: bytes | memoryview, compat: bool = False) -> Iterator[Image.Image]:
    """The picture to cut and tokenize, in RGB; `compat` leaves its mode and orientation as they are stored.

    Inside the block it counts towards what all threads may take together. Raises ImageError, also for whatever goes wrong
    with the picture inside the block.
    """
    header = read_header(data)
    plain = header.mode in ("RGB", "L") and "transparency" not in header.info
    each = (
        _MODE_BYTES.get(header.mode, 4)
        + (4 if plain else EXTRA_BYTES)
        + _DECODER_BYTES.get(header.format or "", 0)
    )
    size = decoded_pixels(header) * each
    del header
    with _memory.hold(size):
        image = open_image(data)
        try:
            yield image if compat else _seen(image)
        except ImageError:
            raise
        except Exception as error:  # Pillow's conversions and resizing raise all kinds
            raise ImageError(f"cannot be converted to RGB: {reason_of(error)}") from None


def decode(data: bytes | memoryview, compat: bool = False) -> Image.Image:
    """As `decoded`, for a single picture at a time."""
    with decoded(data, compat) as image:
        return image


def seen_size(data: bytes | memoryview, compat: bool = False) -> tuple[int, int]:
    """(width, height) of the picture that `decode` would give, by its header alone. Raises ImageError."""
    header = read_header(data)
    on_its_side = (
        not compat and header.format != "TIFF" and turn_of(header) in ON_ITS_SIDE
    )  # Pillow turns a TIFF itself
    return (header.height, header.width) if on_its_side else header.size


def _seen(image: Image.Image) -> Image.Image:
    """As a person sees it: turned as EXIF says, transparency blended on white, in RGB."""
    turn = turn_of(image) if image.format != "TIFF" else None
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image)
    if image.mode == "RGB" and "transparency" in image.info:  # a PNG may name one colour that is transparent
        image = image.convert("RGBA")
    if turn is not None:
        image = image.transpose(turn)
    return on_white(image)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Rows of the picture, STRIP_PIXELS at a time, with the number of the first."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits -> of 8. Where no format says what white is, the largest value tells: 1, 255 or 65535.

    Raises ImageError for other ranges.
    """
    low, high = 0.0, 65535.0
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # all others have 16 bits
        ends = [
            (float(part.min()), float(part.max()))
            for part in (np.asarray(strip) for _, strip in _strips(image))
        ]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        if not (low >= 0 and high <= 65535):  # so written, as NaN is neither
            wanted = "0 to 1, 0 to 255 or 0 to 65535" if image.mode == "F" else "0 to 255 or 0 to 65535"
            raise ImageError(f"greys of mode {image.mode} from {low:g} to {high:g}, expected {wanted}")
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    twelve = image.mode.startswith("I;16") and tags.get(BITS) == (12,)
    clear = image.info.get("transparency")  # the one grey of a PNG that is transparent
    result = Image.new("L", image.size)
    for top, strip in _strips(image):
        stored = values = np.asarray(strip)
        if high > 255:
            values = values.astype(np.int32).clip(0, 65535) >> (4 if twelve else 8)
        elif image.mode == "F":
            values = np.rint(values * (255.0 if high <= 1 else 1.0))
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns those of 8 bits and less
            values = 255 - values
        if isinstance(clear, int):
            values = np.where(stored == clear, 255, values)
        result.paste(Image.fromarray(values.astype(np.uint8)), (0, top))
    return result


def on_white(image: Image.Image) -> Image.Image:
    """To RGB; what is transparent becomes white. As the reference's `_whiten_transparency`, which leaves mode RGB as it is."""
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
    """Lumina-mGPT's `generate_crop_size_list`: (width, height) multiples of `patch` of about target_size**2 pixels."""
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


def crops(crop: str, target_size: int, unit: int) -> list[tuple[int, int]]:
    """The (width, height) in pixels that an image may be cut to: `crop` is a setting of the tokenization."""
    return [(target_size, target_size)] if crop == "square" else crop_sizes(target_size, patch=unit)


def choose_crop(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The crop that keeps most of an image of `size` (width, height); the first wins a tie."""

    def kept(crop: tuple[int, int]) -> float:
        ratios = (crop[0] / size[0], crop[1] / size[1])
        return min(ratios) / max(ratios)

    return max(sizes, key=kept)


def crop_chance(seed: int, item: str, number: int) -> np.random.Generator:
    """What decides where image `number` of an item is cut: the same whatever else is in the input."""
    digest = hashlib.sha256(json.dumps([seed, item, number]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def fit(image: Image.Image, crop: tuple[int, int], chance: np.random.Generator | None = None) -> Image.Image:
    """Scale so that `crop` (width, height) is just covered, then cut its centre, or where `chance` has it.

    As the reference's `center_crop`: BOX halving while the image is at least twice too large, then BICUBIC.
    Raises ImageError for an extreme shape.
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
    if chance is None:
        left, upper = (image.width - crop[0]) // 2, (image.height - crop[1]) // 2
    else:
        left, upper = (
            int(chance.integers(0, side, endpoint=True))
            for side in (image.width - crop[0], image.height - crop[1])
        )
    return image.crop((left, upper, left + crop[0], upper + crop[1]))


def tokenizer_pixels(
    image: Image.Image, crop: tuple[int, int], chance: np.random.Generator | None = None
) -> npt.NDArray[np.uint8]:
    """The picture as the image tokenizer sees it: (height, width, 3)."""
    return np.asarray(on_white(fit(image, crop, chance)))


def opaque(image: Image.Image, compat: bool) -> Image.Image:
    """To RGB for the vision tower; with `compat` the colours that hide behind transparency show."""
    # From the array: PIL keeps info["transparency"] after convert("RGB"), and later steps would blend it.
    if not compat:
        return on_white(image)
    with QUIET:  # Pillow warns of a palette with transparency, and means to be asked for RGBA
        return Image.fromarray(np.asarray(image.convert("RGB")))


def resized(
    image: Image.Image, sizes: Sequence[tuple[int, int]], compat: bool
) -> list[npt.NDArray[np.uint8]]:
    """BICUBIC, from RGB to (3, height, width) for each (width, height).

    By Pillow with `compat`, so as the reference to the bit; else by torch, which takes a fifth of the time and differs by 1
    or 2 of 255 in some pixels, as its weights have 16 bits.
    """
    if compat:
        of_pillow = (np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes)
        return [pixels.transpose(2, 0, 1) for pixels in of_pillow]
    import torch  # tokenizing has no use for it here

    with QUIET:  # torch warns of memory that it must not write to, and nothing here does
        pixels = torch.from_numpy(_as_it_lies(image)).permute(2, 0, 1)[None]
    resize = functools.partial(torch.nn.functional.interpolate, pixels, mode="bicubic", antialias=True)
    return [(pixels if size == image.size else resize(size=size[::-1]))[0, :3].numpy() for size in sizes]


def _as_it_lies(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(height, width, 4): where Pillow keeps an RGB picture, with a byte to spare a pixel; or (height, width, 3), copied."""
    try:
        return np.asarray(pyarrow.array(image).flatten()).reshape(image.height, image.width, 4)
    except (TypeError, ValueError):  # Pillow before 11.2; a picture that it keeps in several pieces
        return np.asarray(image)
