"""Encoded bytes -> pixels, safely: the one place that decodes a picture.

The discrete path (image tokens) takes `decode` + `fit`; the continuous path (SigLIP) takes `decode` + `resized` (views.py). By
default both see the same picture: turned as EXIF says, transparency blended on white. With `compat` they see what the
reference saw: no EXIF, modes kept while resizing, and hidden colours behind transparency on the continuous path.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import threading
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # PIL's own limit for a decompression bomb: 4 bytes a pixel are 0.7 GB


class ImageError(ValueError):
    """An image that can not be used; the message says why."""


class _Quiet:
    """No warnings while any thread is inside. `warnings.catch_warnings` in two threads at once may leave its filters
    behind for good, or take them away from the other."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")  # Pillow warns from half the limit on; the limit itself is checked here

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_QUIET = _Quiet()


def open_image(data: bytes | memoryview) -> Image.Image:
    """Decode fully, in the image's own mode. Raises ImageError for anything that is not a whole image."""
    try:
        with _QUIET:
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
            image.load()
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image: {len(data)} bytes") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as error:
        raise ImageError(f"cannot be decoded: {error}") from None
    return image


def on_white(image: Image.Image) -> Image.Image:
    """To RGB; what is transparent becomes white. As the reference's `_whiten_transparency`, which leaves mode RGB as it is."""
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = np.asarray(image.convert("RGBA"))
    if rgba[:, :, 3].min() == 255:
        return image.convert("RGB")
    alpha = rgba[:, :, 3:] / 255.0  # float64, and truncated
    return Image.fromarray(((1 - alpha) * 255 + alpha * rgba[:, :, :3]).astype(np.uint8))


def decode(data: bytes | memoryview, compat: bool = False) -> Image.Image:
    """Bytes -> the picture to cut and tokenize, in RGB. `compat` leaves mode and orientation as they are stored."""
    image = open_image(data)
    if compat:
        return image
    try:
        if image.mode.startswith("I;16") or image.mode == "I":  # convert() would clip 16 bits to white
            depth = np.asarray(image).astype(np.int64)
            image = Image.fromarray((depth.clip(0, 65535) >> 8).astype(np.uint8))
        ImageOps.exif_transpose(image, in_place=True)  # else it copies where there is nothing to turn
        if image.mode == "RGB" and "transparency" in image.info:  # a PNG may name one colour that is transparent
            image = image.convert("RGBA")
        return on_white(image)
    except (OSError, ValueError, SyntaxError, TypeError, ZeroDivisionError) as error:
        raise ImageError(f"cannot be converted to RGB: {error}") from None


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
        raise ImageError(f"{image.width} x {image.height} pixels are too narrow to cover {crop[0]} x {crop[1]}")
    image = image.resize(size, Image.Resampling.BICUBIC)
    if chance is None:
        left, upper = (image.width - crop[0]) // 2, (image.height - crop[1]) // 2
    else:
        left, upper = (int(chance.integers(0, side, endpoint=True)) for side in (image.width - crop[0], image.height - crop[1]))
    return image.crop((left, upper, left + crop[0], upper + crop[1]))


def tokenizer_pixels(image: Image.Image, crop: tuple[int, int], chance: np.random.Generator | None = None) -> npt.NDArray[np.uint8]:
    """The picture as the image tokenizer sees it: (height, width, 3)."""
    return np.asarray(on_white(fit(image, crop, chance)))


def opaque(image: Image.Image, compat: bool) -> Image.Image:
    """To RGB for the vision tower; with `compat` the colours that hide behind transparency show."""
    # From the array: PIL keeps info["transparency"] after convert("RGB"), and later steps would blend it.
    return Image.fromarray(np.asarray(image.convert("RGB"))) if compat else on_white(image)


def resized(image: Image.Image, sizes: Sequence[tuple[int, int]], compat: bool) -> list[npt.NDArray[np.uint8]]:
    """BICUBIC, from RGB to (3, height, width) for each (width, height).

    By Pillow with `compat`, so as the reference to the bit; else by torch, which takes a fifth of the time and differs by 1
    or 2 of 255 in some pixels, as its weights have 16 bits.
    """
    if compat:
        of_pillow = (np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes)
        return [pixels.transpose(2, 0, 1) for pixels in of_pillow]
    import torch  # tokenizing has no use for it here

    with _QUIET:  # torch warns of memory that it must not write to, and nothing here does
        pixels = torch.from_numpy(_as_it_lies(image)).permute(2, 0, 1)[None]
    resize = functools.partial(torch.nn.functional.interpolate, pixels, mode="bicubic", antialias=True)
    return [(pixels if size == image.size else resize(size=size[::-1]))[0, :3].numpy() for size in sizes]


def _as_it_lies(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(height, width, 4): where Pillow keeps an RGB picture, with a byte to spare a pixel; or (height, width, 3), copied."""
    try:
        return np.asarray(pyarrow.array(image).flatten()).reshape(image.height, image.width, 4)
    except (TypeError, ValueError):  # Pillow before 11.2; a picture that it keeps in several pieces
        return np.asarray(image)
