"""Pictures encoded in every format, and functions to read them back."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decode


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def pixels(data: bytes) -> list[int]:
    """The decoded picture's numbers, in one row."""
    return list(np.asarray(decode(data)).reshape(-1).tolist())


def reason(data: bytes) -> str:
    """The message of the error that a picture is rejected with."""
    with pytest.raises(ImageError) as error:
        decode(data)
    return str(error.value)


def chunk(kind: bytes, data: bytes, broken: bool = False) -> bytes:
    """A chunk of a PNG; `broken`: with a wrong checksum."""
    checksum = zlib.crc32(kind + data) ^ (0xFF if broken else 0)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)

# A program that prints by how many MB its peak memory grows when it decodes the picture on its stdin.
PEAK = """
import io, re, sys
from PIL import Image
from unitoken.dataset.images import decoded, tokenizer_pixels
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
data, before = sys.stdin.buffer.read(), peak()
with decoded(data) as image:
    tokenizer_pixels(image, (64, 64))
print(peak() - before)
"""


def seeds() -> dict[str, bytes]:
    """Small pictures in every format, some in several variants."""
    image, grey = gradient(), Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    clear = image.convert("RGBA")
    clear.putalpha(grey.resize(clear.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "JPEG": encoded(image, "JPEG", exif=exif),
        "JPEG progressive": encoded(image, "JPEG", progressive=True),
        "JPEG of CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "MPO": encoded(image, "MPO", save_all=True, append_images=[image]),
        "PNG": encoded(image, exif=exif),
        "PNG with alpha": encoded(clear),
        "PNG palette": encoded(image.quantize(16), transparency=3),
        "PNG 16 bits": encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)),
        "WEBP": encoded(clear, "WEBP"),
        "WEBP lossless": encoded(clear, "WEBP", lossless=True, exif=exif),
        "GIF": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "BMP": encoded(image, "BMP"),
        "TIFF": encoded(image, "TIFF", exif=exif),
        "TIFF LZW": encoded(clear, "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encoded(image, "TIFF", compression="jpeg"),
        "TIFF float": encoded(Image.fromarray(RAMP), "TIFF"),
        "AVIF": encoded(image, "AVIF"),
        "JPEG2000": encoded(image, "JPEG2000"),
        "PPM": encoded(image, "PPM"),
    }
