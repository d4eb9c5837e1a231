"""Encoded bytes -> a Pillow image, for the formats that are read. Whatever a decoder raises is an ImageError.

Metadata never decides over pixels: where a file can not be opened with its metadata (an odd colour profile, a text chunk of
some megabytes, a damaged index of further pictures), it is opened without, and only then rejected. EXIF is read for the
orientation alone and never written.
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

# Of the 43 that Pillow knows. Others start a program (EPS), or take minutes or gigabytes for some bytes (DDS, FITS, ICNS).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 178_956_970  # PIL's own limit for a decompression bomb: 4 bytes a pixel are 0.7 GB
MAX_SCANS = 100  # of a progressive JPEG, each of which runs over all pixels; encoders write about ten
MAX_RLE_WIDTH = 65_535  # of a run-length encoded BMP: Pillow writes out up to 255 rows for 6 bytes, however large the picture

ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, and steps
BLOCK_BYTES = 1 << 20  # of a PNG's rows that are unpacked at once
ORIENTATION = 0x0112  # the EXIF and TIFF tag
TILE_WIDTH, TILE_LENGTH = 0x0142, 0x0143  # TIFF tags
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that can not be used; the message says why."""


def read_header(data: bytes | memoryview) -> Image.Image:
    """Format, size and mode; the pixels are not decoded. Raises ImageError."""
    return _open(data, pixels=False)


def open_image(data: bytes | memoryview) -> Image.Image:
    """Decode fully, in the image's own mode. Raises ImageError for anything that is not a whole image."""
    return _open(data, pixels=True)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How the picture is to be turned to be seen as its EXIF says; None where it is as it is, or says nothing that can be read."""
    try:
        with QUIET:  # Pillow warns of what is cut or odd in it
            orientation = Image.Image.getexif(image).get(
                ORIENTATION
            )  # PngImageFile's own decodes the picture first
    except Exception:  # Pillow raises all kinds for what is no EXIF
        return None
    return TURNS.get(orientation) if isinstance(orientation, int) else None


def reason_of(error: BaseException) -> str:
    """A decoder's own words, in one line that is the same in each run and quotes no bytes of the file."""
    if isinstance(error, MemoryError):
        return "out of memory"
    said = error.args[0] if error.args else ""
    if isinstance(said, bytes):  # so Pillow says what is wrong in a PPM: the reason, then a piece of the file
        return said.partition(b":")[0].decode(errors="replace")[:200]
    words = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "a file", one_line(error))
    words = re.sub(r"""b'(?:[^'\\]|\\.)*'|b"(?:[^"\\]|\\.)*"|(?<=header): .*""", "...", words)
    return (
        words[:200] if re.search("[A-Za-z]", words) else f"{type(error).__name__} {words}".strip()
    )  # KeyError says a key alone


class _Quiet:
    """No warnings while any thread is inside. `warnings.catch_warnings` in two threads at once may leave its filters
    behind for good, or take them away from the other.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter(
                    "ignore"
                )  # Pillow warns from half the limit on; the limit itself is checked here

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


QUIET = _Quiet()


def _open(data: bytes | memoryview, pixels: bool) -> Image.Image:
    failure: Exception | None = None
    for attempt in _attempts(data):
        try:
            with QUIET:
                image = Image.open(io.BytesIO(attempt), formats=_formats())
                _refuse_costly(image)
                if pixels:
                    image.load()
                    _refuse_unfinished(image, attempt)
            return image
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(str(error)) from None
        except (
            Exception
        ) as error:  # the decoders raise all kinds: RuntimeError, AssertionError, struct.error, ...
            if failure is None or not isinstance(error, UnidentifiedImageError):
                failure = error
    if isinstance(failure, UnidentifiedImageError):
        raise ImageError(_unidentified(data)) from None
    assert failure is not None
    raise ImageError(f"cannot be decoded: {reason_of(failure)}") from None


def _refuse_costly(image: Image.Image) -> None:
    """Raises ImageError for what a few bytes may blow up beyond all bounds, and for what has no pixels."""
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


def _refuse_unfinished(image: Image.Image, data: bytes | memoryview) -> None:
    """Raises ImageError for a PNG whose compressed rows end early: Pillow leaves the others black, and says nothing.

    To count the rows means to unpack them once more, so it is done only where that may be: the last row is black, or the
    rows do not come in order.
    """
    if image.format != "PNG" or not isinstance(image, ImageFile.ImageFile):
        return
    width, height, depth, colours, *_, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if not interlaced and any(image.crop((0, height - 1, width, height)).tobytes()):
        return
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    passes = [
        (-(-(width - x) // dx), -(-(height - y) // dy))
        for x, y, dx, dy in (ADAM7 if interlaced else ((0, 0, 1, 1),))
    ]
    expected = sum((1 + -(-columns * bits // 8)) * rows for columns, rows in passes if columns > 0)
    found, rows = 0, zlib.decompressobj()
    for kind, chunk, _ in _png_chunks(bytes(data)):
        block = rows.decompress(chunk, BLOCK_BYTES) if kind == b"IDAT" else b""
        while block:
            found += len(block)
            block = rows.decompress(rows.unconsumed_tail, BLOCK_BYTES)
    if found < expected:
        raise ImageError(f"cannot be decoded: its rows end after {found} of {expected} bytes")


def decoded_pixels(image: Image.Image) -> int:
    """Those that its decoder makes at once, by its header: a TIFF may put 10 x 10 pixels into a tile of a gigabyte."""
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        with contextlib.suppress(Exception):  # a damaged entry: libtiff refuses such a tile
            return max(pixels, int(image.tag_v2[TILE_WIDTH]) * int(image.tag_v2[TILE_LENGTH]))
    return pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a Pillow without libavif knows no AVIF


def _unidentified(data: bytes | memoryview) -> str:
    """Why Pillow knows no picture in it: it says nothing of what the format that it begins with objected to."""
    prefix = bytes(data[:16])
    for name in _formats():
        factory, accepts = Image.OPEN[name]
        with contextlib.suppress(Exception):
            if accepts is None or accepts(prefix) is not True:
                continue
            try:
                with QUIET:
                    factory(io.BytesIO(data), "")
            except Exception as error:
                return f"cannot be decoded: {name}: {reason_of(error)}"
    return f"not an image: {len(data)} bytes in none of the formats {', '.join(_formats())}"


# --- without metadata ------------------------------------------------------------------------------------------------


def _attempts(data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """The file as it is, and where that fails without the metadata that a picture does not need, at last without its EXIF."""
    if (
        bytes(data[:2]) == b"\xff\xd8"
        and bytes(data).count(b"\xff\xda") > MAX_SCANS
        and _scans(bytes(data)) > MAX_SCANS
    ):
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")
    yield data
    whole = bytes(data)
    for keep_exif in (True, False):
        with contextlib.suppress(struct.error, IndexError):
            if whole.startswith(b"\x89PNG\r\n\x1a\n"):
                yield _bare_png(whole, keep_exif)
            elif whole.startswith(b"\xff\xd8"):
                yield _bare_jpeg(whole, keep_exif)
            elif whole[:4] in (b"II*\0", b"MM\0*"):
                yield _bare_tiff(whole, keep_exif)
            elif whole[4:8] == b"jP  ":
                yield _bare_jp2(whole)
                return
            elif whole[4:8] == b"ftyp":
                # An EXIF that is not there can not be read wrongly; AVIF has its orientation in a box of its own.
                yield re.sub(rb"II\*\0|MM\0\*", b"\0\0\0\0", whole)
                return
            else:
                return


def _bare_png(data: bytes, keep_exif: bool) -> bytes:
    """The critical chunks and transparency; the check sums of these stay, so what is damaged in them is still found."""
    parts = [data[:8]]
    for kind, content, checksum in _png_chunks(data):
        length = struct.pack(">I", len(content))
        if kind == b"tRNS" or (kind == b"eXIf" and keep_exif):
            parts.append(length + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
        elif not kind[0] & 0x20:  # the first letter is a capital: critical
            parts.append(length + kind + content + checksum)
    return b"".join(parts)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, content and check sum of each, to the end of the picture."""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        at += 12 + length
        if kind == b"IEND":
            return


def _bare_jpeg(data: bytes, keep_exif: bool) -> bytes:
    """Without comments and the APP segments but JFIF's, EXIF and Adobe's, which says how colours are stored."""
    parts, at = [data[:2]], 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:
        marker = data[at + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        segment = data[at : at + 2 + length]
        of_pixels = marker < 0xE0 or 0xF0 <= marker <= 0xFD
        of_colours = (marker == 0xE0 and length >= 16) or (marker == 0xEE and length >= 14)  # whole ones
        exif = marker == 0xE1 and segment[4:10] == b"Exif\0\0" and keep_exif
        if of_pixels or of_colours or exif:
            parts.append(segment)
        at += 2 + length
    return b"".join([*parts, data[at:]])


_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # none that stands inside a scan: FF 00, FF D0 to FF D7


def _scans(data: bytes) -> int:
    """Of a JPEG's own picture: what lies behind its end, as a phone's video, or in its metadata is not decoded."""
    count, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[1] != b"\xd9":
        at = found.end()
        if found[1] not in (b"\x01", b"\xd8"):  # these have no length
            at += int.from_bytes(data[at : at + 2], "big")
        count += found[1] == b"\xda"
    return count


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(kind, head, content) of each box of a JPEG 2000 file (ISO 15444-1, I.4)."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        end = len(data) if length == 0 else at + max(length, head)
        yield kind, data[at : at + head], data[at + head : end]
        at = end


def _bare_jp2(data: bytes) -> bytes:
    """Without the resolution and other boxes that do not say how the pixels are stored; of the colours the first that is whole."""
    parts = []
    for kind, head, content in _boxes(data):
        if kind == b"jp2h":
            inside = list(_boxes(content))
            colours = [box for box in inside if box[0] == b"colr" and len(box[2]) >= 7][:1]
            kept = [
                box
                for box in inside
                if box in colours or box[0] in (b"ihdr", b"bpcc", b"pclr", b"cmap", b"cdef")
            ]
            content = b"".join(box[1] + box[2] for box in kept)
            head = struct.pack(">I4s", 8 + len(content), kind)
        if kind in (b"jP  ", b"ftyp", b"jp2h", b"jp2c"):
            parts.append(head + content)
    return b"".join(parts)


# Sizes, bits, compression, colours, strips, tiles and what their decoders need (TIFF 6.0, section 8 and 15 to 22).
_TIFF_TAGS = {
    254,
    255,
    256,
    257,
    258,
    259,
    262,
    263,
    266,
    273,
    277,
    278,
    279,
    284,
    292,
    293,
    317,
    320,
    322,
    323,
    324,
    325,
}
_TIFF_TAGS |= {332, 336, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 532}


def _bare_tiff(data: bytes, keep_exif: bool) -> bytes:
    """The first picture's entries that say how its pixels are stored, and its orientation."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[start + 2 + 12 * n : start + 14 + 12 * n] for n in range(count)]
    kept = {*_TIFF_TAGS, ORIENTATION} if keep_exif else _TIFF_TAGS
    entries = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in kept]
    head = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)  # and no further picture
    return data[:start] + head + data[start + len(head) :]
