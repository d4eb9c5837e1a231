"""The containers of image files, cut down to what decides over the pixels.

A file with odd metadata (a broken colour profile, a text chunk of some megabytes, a damaged index of
further pictures) may fail to open, although its pixels are fine. `without_metadata` gives such a file a
second chance.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

ORIENTATION = 0x0112  # the EXIF and TIFF tag

# A JPEG's marker, but not the bytes that are part of a scan: FF 00, and FF D0 to FF D7.
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")

# Sizes, bits, compression, colours, strips, tiles and what their decoders need (TIFF 6.0, sections 8 and 15
# to 22).
_TIFF_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 336, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 532),
}


class PngChunk(NamedTuple):
    """A chunk of a PNG file."""

    kind: bytes
    content: bytes
    checksum: bytes


class Box(NamedTuple):
    """A box of a JPEG 2000 file (ISO 15444-1, I.4)."""

    kind: bytes
    head: bytes
    content: bytes


def without_metadata(data: bytes) -> Iterator[bytes]:
    """Yield an image file without the metadata that its pixels do not need, first with and then without EXIF.

    Yields nothing for formats other than PNG, JPEG, TIFF, JPEG 2000 and AVIF, or where the structure is
    broken.
    """
    for keep_exif in (True, False):
        with contextlib.suppress(struct.error, IndexError):
            if data.startswith(b"\x89PNG\r\n\x1a\n"):
                yield _bare_png(data, keep_exif)
            elif data.startswith(b"\xff\xd8"):
                yield _bare_jpeg(data, keep_exif)
            elif data[:4] in (b"II*\0", b"MM\0*"):
                yield _bare_tiff(data, keep_exif)
            elif data[4:8] == b"jP  ":
                yield _bare_jp2(data)
                return
            elif data[4:8] == b"ftyp":
                # A removed EXIF cannot be misread; AVIF has its orientation in a box of its own.
                yield re.sub(rb"II\*\0|MM\0\*", b"\0\0\0\0", data)
                return
            else:
                return


def png_chunks(data: bytes) -> Iterator[PngChunk]:
    """Yield the chunks of a PNG up to the end of the picture."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        yield PngChunk(kind, data[position + 8 : end], data[end : end + 4])
        position = end + 4
        if kind == b"IEND":
            return


def _bare_png(data: bytes, keep_exif: bool) -> bytes:
    """Keep transparency and the critical chunks, with their checksums: damage in them is still found."""
    parts = [data[:8]]
    for kind, content, checksum in png_chunks(data):
        length = struct.pack(">I", len(content))
        if kind == b"tRNS" or (kind == b"eXIf" and keep_exif):
            parts.append(length + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
        elif not kind[0] & 0x20:  # the first letter is a capital: critical
            parts.append(length + kind + content + checksum)
    return b"".join(parts)


def _bare_jpeg(data: bytes, keep_exif: bool) -> bytes:
    """Drop comments and APP segments, but keep JFIF, EXIF and Adobe's (how colours are stored)."""
    parts, position = [data[:2]], 2
    while data[position] == 0xFF and data[position + 1] != 0xDA:
        marker = data[position + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes, and markers without a length
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        segment = data[position : position + 2 + length]
        is_of_pixels = marker < 0xE0 or 0xF0 <= marker <= 0xFD
        is_of_colours = (marker == 0xE0 and length >= 16) or (marker == 0xEE and length >= 14)  # complete
        is_exif = marker == 0xE1 and segment[4:10] == b"Exif\0\0"
        if is_of_pixels or is_of_colours or (is_exif and keep_exif):
            parts.append(segment)
        position += 2 + length
    return b"".join([*parts, data[position:]])


def count_scans(data: bytes) -> int:
    """Count the scans of a JPEG's own picture, not those in metadata or in a video behind its end."""
    count, position = 0, 2
    while (found := _JPEG_MARKER.search(data, position)) and found[1] != b"\xd9":
        position = found.end()
        if found[1] not in (b"\x01", b"\xd8"):  # these have no length
            position += int.from_bytes(data[position : position + 2], "big")
        count += found[1] == b"\xda"
    return count


def _boxes(data: bytes) -> Iterator[Box]:
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
            head = 16
        end = len(data) if length == 0 else position + max(length, head)
        yield Box(kind, data[position : position + head], data[position + head : end])
        position = end


def _bare_jp2(data: bytes) -> bytes:
    """Keep the boxes that say how pixels are stored; of the colour boxes, the first complete one."""
    parts = []
    for kind, head, content in _boxes(data):
        if kind == b"jp2h":
            boxes = list(_boxes(content))
            colours = [box for box in boxes if box.kind == b"colr" and len(box.content) >= 7][:1]
            needed = (b"ihdr", b"bpcc", b"pclr", b"cmap", b"cdef")
            kept = [box for box in boxes if box in colours or box.kind in needed]
            content = b"".join(box.head + box.content for box in kept)
            head = struct.pack(">I4s", 8 + len(content), kind)
        if kind in (b"jP  ", b"ftyp", b"jp2h", b"jp2c"):
            parts.append(head + content)
    return b"".join(parts)


def _bare_tiff(data: bytes, keep_exif: bool) -> bytes:
    """Keep the first picture's entries that say how its pixels are stored, and its orientation."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[start + 2 + 12 * n : start + 14 + 12 * n] for n in range(count)]
    kept = {*_TIFF_TAGS, ORIENTATION} if keep_exif else _TIFF_TAGS
    entries = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in kept]
    # Four zero bytes: no further picture.
    head = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return data[:start] + head + data[start + len(head) :]
