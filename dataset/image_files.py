"""Encoded bytes -> a Pillow image, for the formats that are accepted; any failure is an ImageError.

Metadata never decides over pixels: a file that cannot be opened with its metadata is opened without
(image_containers.py), and only then rejected. EXIF is read for the orientation alone and never written.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from unitoken.common.errors import one_line
from unitoken.dataset.image_containers import ORIENTATION, count_scans, png_chunks, without_metadata

# Of the 43 that Pillow reads. Others start a program (EPS), or take minutes or gigabytes for a few bytes
# (DDS, FITS, ICNS).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 4 bytes a pixel are 0.7 GB
MAX_SCANS = 100  # of a progressive JPEG: each is decoded over all pixels, and encoders write about ten
# Pixels of a row of a run-length encoded BMP: Pillow writes up to 255 rows for 6 bytes, whatever the
# picture's size.
MAX_RLE_WIDTH = 65_535

# The passes of an interlaced PNG: x, y, and the steps along x and y.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
BLOCK_BYTES = 1 << 20  # of a PNG's rows that are decompressed at once
TILE_WIDTH, TILE_LENGTH = 0x0142, 0x0143  # TIFF tags
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; the message says why."""


def read_header(data: bytes | memoryview) -> Image.Image:
    """Read format, size and mode without decoding the pixels. Raises ImageError."""
    return _open(data, pixels=False)


def open_image(data: bytes | memoryview) -> Image.Image:
    """Decode all pixels, in the image's own mode. Raises ImageError for anything but a complete image."""
    return _open(data, pixels=True)


def exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that EXIF asks for; None if there is none or EXIF is unreadable."""
    try:
        with ignored_warnings:  # Pillow warns about EXIF that is truncated or odd
            # Not PngImageFile's own method, which decodes the picture first.
            orientation = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # Pillow raises errors of many kinds for a broken EXIF
        return None
    return TRANSPOSE_OF_ORIENTATION.get(orientation) if isinstance(orientation, int) else None


def reason_of(error: BaseException) -> str:
    """Return a decoder's message in one line, the same in every run and without bytes of the file."""
    if isinstance(error, MemoryError):
        return "out of memory"
    argument = error.args[0] if error.args else ""
    if isinstance(argument, bytes):  # Pillow's errors about a PPM: the reason, then a piece of the file
        return argument.partition(b":")[0].decode(errors="replace")[:200]
    message = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "a file", one_line(error))
    message = re.sub(r"""b'(?:[^'\\]|\\.)*'|b"(?:[^"\\]|\\.)*"|(?<=header): .*""", "...", message)
    if not re.search("[A-Za-z]", message):  # the message of a KeyError is the key alone
        return f"{type(error).__name__} {message}".strip()
    return message[:200]


class _IgnoredWarnings:
    """Ignores all warnings while at least one thread is inside.

    `warnings.catch_warnings` changes the filters of the whole process: used by two threads at once, it may
    leave its filters behind for good, or remove those of the other thread. So the threads are counted, and
    only the first and the last one change the filters.
    """

    def __init__(self) -> None:
        self._lock, self._threads_inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._threads_inside += 1
            if self._threads_inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads_inside -= 1
            if self._threads_inside == 0:
                self._filters.__exit__(None, None, None)


ignored_warnings = _IgnoredWarnings()


def _open(data: bytes | memoryview, pixels: bool) -> Image.Image:
    _check_scans(data)
    failure: Exception | None = None
    for attempt in _attempts(data):
        try:
            with (
                ignored_warnings
            ):  # Pillow warns from half the limit of pixels on; _check_cost checks the limit
                image = Image.open(io.BytesIO(attempt), formats=_formats())
                _check_cost(image)
                if pixels:
                    image.load()
                    _check_complete(image, attempt)
            return image
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(str(error)) from None
        except Exception as error:  # decoders raise RuntimeError, AssertionError, struct.error and others
            if failure is None or not isinstance(error, UnidentifiedImageError):
                failure = error
    if isinstance(failure, UnidentifiedImageError):
        raise ImageError(_why_unidentified(data)) from None
    assert failure is not None
    raise ImageError(f"cannot be decoded: {reason_of(failure)}") from None


def _attempts(data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Yield the file as it is, then without metadata, at last without EXIF."""
    yield data
    yield from without_metadata(bytes(data))


def _check_scans(data: bytes | memoryview) -> None:
    """Raise ImageError for a JPEG of very many scans."""
    if bytes(data[:2]) != b"\xff\xd8":
        return
    whole = bytes(data)
    if whole.count(b"\xff\xda") > MAX_SCANS and count_scans(whole) > MAX_SCANS:  # counting bytes is faster
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")


def _check_cost(image: Image.Image) -> None:
    """Raise ImageError for a picture without pixels, or one whose few bytes need unbounded memory."""
    pixels = decoded_pixels(image)
    if not image.width * image.height:
        raise ImageError(f"{image.width} x {image.height} pixels")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
    if pixels > MAX_PIXELS:
        raise ImageError(f"a TIFF with a tile of {pixels} pixels, at most {MAX_PIXELS} are decoded")
    run_lengths = isinstance(image, ImageFile.ImageFile) and any(tile[0] == "bmp_rle" for tile in image.tile)
    if run_lengths and image.width > MAX_RLE_WIDTH:
        raise ImageError(
            f"a run-length encoded BMP of {image.width} pixels a row, at most {MAX_RLE_WIDTH} are decoded"
        )


def _check_complete(image: Image.Image, data: bytes | memoryview) -> None:
    """Raise ImageError for a PNG whose compressed rows end early: Pillow silently leaves the others black.

    Counting the rows means decompressing them once more, so they are only counted if the last row is black or
    the picture is interlaced.
    """
    if image.format != "PNG" or not isinstance(image, ImageFile.ImageFile):
        return
    width, height, depth, colours, *_, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if not interlaced and any(image.crop((0, height - 1, width, height)).tobytes()):
        return
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    expected = 0
    for x, y, step_x, step_y in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0:
            expected += (1 + -(-columns * bits // 8)) * rows
    found, decompressor = 0, zlib.decompressobj()
    for kind, chunk, _ in png_chunks(bytes(data)):
        block = decompressor.decompress(chunk, BLOCK_BYTES) if kind == b"IDAT" else b""
        while block:
            found += len(block)
            block = decompressor.decompress(decompressor.unconsumed_tail, BLOCK_BYTES)
    if found < expected:
        raise ImageError(f"cannot be decoded: its rows end after {found} of {expected} bytes")


def decoded_pixels(image: Image.Image) -> int:
    """Return the pixels that are decoded at once: 10 x 10 pixels of a TIFF may be in a tile of 1 GB."""
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        with contextlib.suppress(Exception):  # a damaged entry: libtiff rejects such a tile
            return max(pixels, int(image.tag_v2[TILE_WIDTH]) * int(image.tag_v2[TILE_LENGTH]))
    return pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a Pillow without libavif cannot read AVIF


def _why_unidentified(data: bytes | memoryview) -> str:
    """Return why Pillow finds no picture: it does not say what the format of the first bytes objects to."""
    prefix = bytes(data[:16])
    for name in _formats():
        factory, accepts = Image.OPEN[name]
        with contextlib.suppress(Exception):
            if accepts is None or accepts(prefix) is not True:
                continue
            try:
                with ignored_warnings:
                    factory(io.BytesIO(data), "")
            except Exception as error:
                return f"cannot be decoded: {name}: {reason_of(error)}"
    return f"not an image: {len(data)} bytes in none of the formats {', '.join(_formats())}"
