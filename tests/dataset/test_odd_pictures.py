"""Pictures that Pillow alone would read wrongly, or with unbounded memory or time."""

from __future__ import annotations

import contextlib
import io
import random
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from support.encoded_pictures import PEAK, chunk, encoded, gradient, pixels, reason, seeds
from support.mutated_pictures import mutated
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError, exif_transpose, read_header
from unitoken.dataset.images import decode, decoded, displayed_size, tokenizer_pixels
from unitoken.dataset.vision_views import Views

RAMP = np.linspace(0, 1, 64, dtype="<f4").reshape(8, 8)


def tiff(
    bits: int,
    kind: int,
    values: np.ndarray | bytes,
    photometric: int = 1,
    extra: dict[int, int] | None = None,
) -> bytes:
    """A TIFF of 8 x 8 greys in one strip; `extra` overrides tags. `kind`: 1 unsigned, 2 signed, 3 float."""
    data = bytes(values) if isinstance(values, bytes) else values.tobytes()
    tags = {
        256: 8,
        257: 8,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: 8,
        279: len(data),
        339: kind,
    } | (extra or {})
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    data += bytes(len(data) % 2)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def greys(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))[:, :, 0].astype(int)


# --- greys ---


@pytest.mark.parametrize("scale", [1, 255, 65535])
def test_a_portable_float_map_is_scaled_by_its_range(scale: int) -> None:
    """Pillow calls the format PPM, whose other greys have 16 bits: the picture became black."""
    found = greys(b"Pf\n8 8\n-1.0\n" + (RAMP * scale).astype("<f4").tobytes())[::-1]  # its rows go upwards
    assert abs(found - RAMP * 255).max() <= 1


@pytest.mark.parametrize("values", [RAMP - 1, RAMP * np.float32("nan"), RAMP * 1e6])
def test_a_portable_float_map_of_another_range_is_rejected(values: np.ndarray) -> None:
    assert reason(b"Pf\n8 8\n-1.0\n" + values.astype("<f4").tobytes()).startswith("greys of mode F from ")


@pytest.mark.parametrize(("bits", "kind", "stored"), [(8, 1, "u1"), (16, 1, "<u2"), (32, 3, "<f4")])
def test_a_tiff_whose_white_is_zero_is_not_inverted(bits: int, kind: int, stored: str) -> None:
    values = (RAMP * (1 if kind == 3 else 2**bits - 1)).astype(stored)
    black, white = greys(tiff(bits, kind, values)), greys(tiff(bits, kind, values, photometric=0))
    assert (white == 255 - black).all()
    assert black[-1, -1] == 255


def test_a_tiff_of_12_bits_is_not_nearly_black() -> None:
    assert (greys(tiff(12, 1, bytes([0xFF] * 96))) == 255).all()
    assert (greys(tiff(12, 1, bytes([0x80, 0x08, 0x00] * 32))) == 128).all()


def test_the_transparent_grey_of_16_bits_is_white() -> None:
    values = np.full((8, 8), 1000, np.uint16)
    values[0] = 30_000
    plain = encoded(Image.fromarray(values))
    at = plain.index(b"IDAT") - 4
    found = greys(plain[:at] + chunk(b"tRNS", struct.pack(">H", 1000)) + plain[at:])
    assert (found[0] == 30_000 >> 8).all()
    assert (found[1:] == 255).all()


# --- metadata ---


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + kind + content


@pytest.mark.parametrize(
    "new",
    [
        box(b"res ", box(b"resc", b"\0")),
        box(b"res ", b"\0\0\0\3abcd"),
        box(b"res ", b"\xff" * 30),
        box(b"colr", b""),
        box(b"xml ", b"<"),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_box_of_metadata_does_not_change_pixels_of_a_jpeg_2000(new: bytes, mode: str) -> None:
    plain = encoded(gradient().convert(mode), "JPEG2000")
    at = plain.index(b"jp2h") - 4
    (length,) = struct.unpack_from(">I", plain, at)
    odd = (
        plain[:at]
        + struct.pack(">I", length + len(new))
        + plain[at + 4 : at + length]
        + new
        + plain[at + length :]
    )
    assert pixels(odd) == pixels(plain)
    assert reason(odd[:-200])


def test_a_video_behind_a_jpeg_is_not_counted_as_scans() -> None:
    """Phones append videos to their pictures; each 7 MB hold the start of 100 scans by chance."""
    plain = encoded(gradient(), "JPEG")
    video = random.Random(0).randbytes(12 << 20)
    assert video.count(b"\xff\xda") > 100
    assert pixels(plain + video) == pixels(plain)
    comment = b"\xff\xfe" + struct.pack(">H", 402) + b"\xff\xda" * 200
    assert pixels(plain[:2] + comment + plain[2:]) == pixels(plain)
    progressive = encoded(gradient(), "JPEG", progressive=True)
    at = progressive.index(b"\xff\xda")
    assert "scans" in reason(progressive[:at] + progressive[at:-2] * 40 + progressive[-2:] + video)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_a_truncated_exif_gives_no_warning(format: str) -> None:
    exif = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", 3)
        + struct.pack("<HHII", 274, 3, 1, 6)
        + struct.pack("<HHII", 270, 2, 99, 9999)
    )
    data = encoded(gradient(), format, exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert decode(data).size == displayed_size(data) == (24, 40)
    assert not shown


def test_a_palette_with_transparency_gives_no_warning() -> None:
    data = encoded(gradient().quantize(16), transparency=bytes(range(0, 160, 10)))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert Views(28, 14).pixels(data, compat=True)[1] == (40, 24)
    assert not shown


def test_the_size_of_a_png_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow decodes a whole PNG to read its EXIF: 0.2 s and 140 MB for 36 million pixels."""
    header = read_header(encoded(gradient()))
    monkeypatch.setattr(header, "load", lambda: pytest.fail("decoded"))
    assert exif_transpose(header) is None


# --- reasons ---


def test_a_reason_quotes_no_bytes_of_the_file() -> None:
    assert reason(b"P1\n2 2\n 1 2 9 9") == "cannot be decoded: Invalid token for this mode"
    palette = encoded(gradient().quantize(16))
    at = palette.index(b"PLTE") - 4
    (length,) = struct.unpack_from(">I", palette, at)
    assert reason(palette[:at] + palette[at + 12 + length :]) == "mode P without a palette"


# --- costs ---


def run_length_bmp(width: int, height: int, data: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    greys = bytes(n // 4 if n % 4 < 3 else 0 for n in range(1024))
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + head + greys + data


def peak(data: bytes) -> float:
    """Return the MB that decoding needs; a reject is not an error here."""
    program = PEAK.replace("with decoded", "import contextlib\nwith contextlib.suppress(ValueError), decoded")
    found = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True)
    return float(found.stdout)


def test_a_few_bytes_of_run_lengths_do_not_take_gigabytes() -> None:
    """1 kB took 1.9 GB at 4 million pixels a row, which is 45 GB at the limit of pixels."""
    jump = b"\0\2\0\0\xff\xff\0\1"
    assert "4000000 pixels a row" in reason(run_length_bmp(4_000_000, 1, jump))
    assert peak(run_length_bmp(65_535, 1, jump)) < 100
    assert greys(run_length_bmp(4, 2, b"\4\xc8\0\0\4\x64\0\1")).tolist() == [[100] * 4, [200] * 4]


def test_a_tile_counts_with_its_real_size() -> None:
    """A TIFF of 1 MB with 10 x 10 pixels took 1 GB."""
    side = 1 << 15
    one = tiff(8, 1, zlib.compress(bytes(1000)), extra={259: 8, 322: side, 323: side, 324: 8, 325: 1000})
    assert "a tile of 1073741824 pixels" in reason(one)
    small = tiff(8, 1, bytes(256), extra={322: 16, 323: 16, 324: 8, 325: 256})
    assert decode(small).size == (8, 8)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("WEBP", {}),
        ("AVIF", {"speed": 10}),
        ("JPEG2000", {"codeblock_size": (4, 4)}),
        ("PNG", {"transparency": (1, 2, 3)}),
    ],
)
def test_a_picture_takes_no_more_memory_than_is_held_for_it(format: str, options: dict[str, object]) -> None:
    """JPEG 2000 used to take four times as much."""
    small = format == "JPEG2000"  # writing it takes ten times as much as reading it
    data = encoded(
        Image.new("L", (1250, 1000), 7) if small else Image.new("RGB", (2500, 2000), (1, 2, 3)),
        format,
        **options,
    )
    held = []

    class RecordingMemory(images._Memory):
        @contextlib.contextmanager
        def hold(self, size: int) -> Iterator[None]:
            held.append(size)
            with super().hold(size):
                yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_memory", RecordingMemory(images.MEMORY_BYTES))
        decode(data)
    assert peak(data) * 2**20 < max(held) * 1.1 + (8 << 20)


# --- mutated pictures ---


def outcomes(count: int, start: int) -> Counter[str]:
    def use(case: tuple[str, bytes]) -> str:
        name, data = case
        begun = time.monotonic()
        try:
            with decoded(data, compat=len(data) % 4 == 0) as image:
                assert tokenizer_pixels(image, (16, 16)).shape == (16, 16, 3), name
            outcome = "sample"
        except ImageError as error:
            outcome = (
                "reject"
                if re.fullmatch(r"[ -~]*[a-z][ -~]*", str(error))
                else f"not one line of text: {name}: {error}"
            )
        assert time.monotonic() - begun < 60, name
        return outcome

    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        found = Counter(pool.map(use, mutated(seeds(), count, start)))
    assert not shown
    assert set(found) == {"sample", "reject"}
    assert min(found.values()) > count // 10
    with open("/proc/self/status") as status:
        print(dict(found), re.search(r"VmHWM:.*", status.read())[0])  # type: ignore[index]
    return found


def test_a_picture_mutated_by_its_format_is_a_sample_or_a_reject() -> None:
    assert outcomes(2_000, 0).total() == 2_000


@pytest.mark.chaos
def test_20_000_mutated_pictures_are_samples_or_rejects() -> None:
    assert outcomes(20_000, 2_000).total() == 20_000


def test_the_mutations_are_the_same_in_each_run() -> None:
    first, again = (list(mutated(seeds(), 60)) for _ in range(2))
    assert first == again
    assert Image.open(io.BytesIO(seeds()["PNG"])).size == (40, 24)
