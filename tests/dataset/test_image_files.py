"""Which pictures are read, also with odd metadata, and that every other file is one reject."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from support.bad_inputs import damaged
from support.encoded_pictures import PEAK, RAMP, chunk, encoded, gradient, pixels, reason, seeds
from support.paths import DATA
from unitoken.dataset import images
from unitoken.dataset.image_files import FORMATS, ImageError, open_image, read_header
from unitoken.dataset.images import decode, decoded, displayed_size, tokenizer_pixels

CASES = DATA / "cases" / "pictures"


# --- formats ---


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "MPO"])
def test_every_format_of_the_list_is_read(format: str) -> None:
    found = np.asarray(decode(encoded(gradient(), format))).astype(int)
    assert abs(found - np.asarray(gradient())).mean() < (40 if format == "GIF" else 12)


def test_a_cameras_second_picture_does_not_matter() -> None:
    data = encoded(gradient(), "MPO", save_all=True, append_images=[gradient()])
    assert read_header(data).format == "MPO"
    assert decode(data).size == (40, 24)
    assert decode(data.replace(b"MPF\0", b"MPF\0\xff\xff\xff\xff"[:4] + b"", 1)).size == (40, 24)


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_of_rows(
    depth: int, colours: int, interlaced: bool, missing: int, value: int, size: tuple[int, int] = (19, 11)
) -> bytes:
    """A PNG of rows of one value without the last `missing` ones, in two complete chunks."""
    width, height = size
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    rows = []
    for x, y, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        row = b"\0" + bytes([value]) * (((width - x + across - 1) // across * bits + 7) // 8)
        rows += [row] * ((height - y + down - 1) // down) if len(row) > 1 else []
    packed = zlib.compress(b"".join(rows[: len(rows) - missing]))
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colours == 3 else b""
    data = chunk(b"IDAT", packed[:5]) + chunk(b"IDAT", packed[5:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("depth", "colours"), [(1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (4, 3), (8, 3), (8, 4), (8, 6), (16, 6)]
)
def test_a_png_whose_rows_end_early_is_a_reject(depth: int, colours: int, interlaced: bool) -> None:
    for value in (0, 1):
        for size in ((19, 11), (1, 1), (3, 2)):
            complete = png_of_rows(depth, colours, interlaced, 0, value, size)
            assert decode(complete).size == size, "black is a colour, too"
        for missing in (1, 5):
            assert "rows end after" in reason(png_of_rows(depth, colours, interlaced, missing, value))


@pytest.mark.parametrize("format", ["EPS", "DDS", "ICO", "TGA", "PCX", "IM", "SGI", "PDF", "ICNS"])
def test_other_formats_are_not_opened(format: str) -> None:
    """EPS starts Ghostscript; some bytes of DDS take minutes."""
    data = encoded(gradient(64, 64), format)
    assert reason(data).startswith("not an image: ")
    assert "JPEG, PNG, WEBP" in reason(data)


def test_the_decoders_own_reason_is_given() -> None:
    assert reason(b"\x89PNG\r\n\x1a\n" + b"\0" * 40).startswith("cannot be decoded: PNG: ")
    assert "truncated" in reason(encoded(gradient(400, 400), "JPEG")[:900])
    assert "secret" not in reason(b"P6 secret")


# --- cases ---


@pytest.mark.parametrize("name", ["noitem.avif", "broken2.avif", "ftex.jpg"])
def test_a_case_that_is_not_a_picture_is_one_reject(name: str) -> None:
    assert reason((CASES / name).read_bytes())


def test_an_odd_rational_beside_the_orientation() -> None:
    data = (CASES / "neg_zero_rational.jpg").read_bytes()
    assert decode(data).size == decode(data, compat=True).size[::-1] == displayed_size(data)


def test_an_odd_colour_profile() -> None:
    assert decode((CASES / "icc_bad_method.png").read_bytes()).size


# --- metadata ---


def with_chunk(data: bytes, new: bytes) -> bytes:
    """Insert a chunk behind the header of a PNG."""
    return data[:33] + new + data[33:]


ANCILLARY = {
    "iCCP bad method": chunk(b"iCCP", b"name\0\x07garbage"),
    "iCCP without a name": chunk(b"iCCP", b"x" * 100),
    "iCCP cut": chunk(b"iCCP", b"name\0\0" + zlib.compress(b"x" * 1000)[:20]),
    "zTXt of 3 MB": chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(3 << 20))),
    "zTXt bad method": chunk(b"zTXt", b"key\0\x09abc"),
    "iTXt of 3 MB": chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
    "iTXt cut": chunk(b"iTXt", b"key\0\1"),
    "tEXt bad checksum": chunk(b"tEXt", b"key\0value", broken=True),
    "gAMA bad checksum": chunk(b"gAMA", struct.pack(">I", 45455), broken=True),
    "short pHYs": chunk(b"pHYs", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0\0\0"),
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short sRGB": chunk(b"sRGB", b""),
    "short tIME": chunk(b"tIME", b"\0"),
    "eXIf garbage": chunk(b"eXIf", b"garbage" * 9),
    "eXIf cut": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x09"),
    "acTL short": chunk(b"acTL", b"\0"),
    "acTL of no frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
    "unknown": chunk(b"teSt", b"x" * 1000, broken=True),
}


@pytest.mark.parametrize("name", ANCILLARY)
def test_an_ancillary_chunk_does_not_change_the_pixels_of_a_png(name: str) -> None:
    plain = encoded(gradient())
    assert pixels(with_chunk(plain, ANCILLARY[name])) == pixels(plain)


def test_a_png_with_odd_chunks_keeps_colours_and_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (8, 4), (10, 20, 30)), transparency=(10, 20, 30), exif=exif)
    image = decode(with_chunk(data, ANCILLARY["iCCP bad method"]))
    assert image.size == (4, 8)
    assert np.asarray(image).min() == 255


def test_a_broken_critical_chunk_is_a_reject() -> None:
    data = bytearray(encoded(gradient()))
    data[29] ^= 1  # the header's checksum
    assert reason(bytes(data)).startswith("cannot be decoded: ")
    assert reason(encoded(gradient(400, 400))[:-900])


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


SEGMENTS = {
    "garbage EXIF": segment(0xE1, b"Exif\0\0" + b"garbage" * 9),
    "EXIF cut": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x09"),
    "ICC without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "MPF garbage": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x02" + b"\xff" * 40),
    "MPF cut": segment(0xE2, b"MPF\0II"),
    "Photoshop garbage": segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + b"\xff" * 20),
    "Adobe cut": segment(0xEE, b"Adobe"),
    "JFIF cut": segment(0xE0, b"JFIF\0\1"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_segment_of_metadata_does_not_reject_a_jpeg(name: str) -> None:
    plain = encoded(gradient(), "JPEG")
    assert decode(plain[:2] + SEGMENTS[name] + plain[2:]).size == (40, 24)


def tiff_with(entry: bytes) -> bytes:
    """A little-endian TIFF with an additional entry behind its last one."""
    data = encoded(gradient(), "TIFF")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = data[start + 2 : start + 2 + 12 * count]
    moved = struct.pack("<H", count + 1) + entries + entry + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + moved


@pytest.mark.parametrize(
    "entry",
    [
        struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFF),  # EXIF beyond the file
        struct.pack("<HHII", 0x8825, 2, 9, 3),  # GPS as text
        struct.pack("<HHII", 0xC4A5, 7, 0x7FFFFFFF, 8),  # PrintIM of 2 GB
        struct.pack("<HHII", 0x9999, 77, 1, 1),  # an unknown type
    ],
)
def test_an_entry_of_metadata_does_not_change_pixels_of_a_tiff(entry: bytes) -> None:
    assert pixels(tiff_with(entry)) == pixels(encoded(gradient(), "TIFF"))


@pytest.mark.parametrize("format", ["WEBP", "AVIF", "PNG", "JPEG"])
@pytest.mark.parametrize("exif", [b"garbage" * 9, b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"II*\0\xff\xff\xff\xff"])
def test_a_broken_exif_does_not_reject_a_picture(format: str, exif: bytes) -> None:
    base = encoded(gradient(), format)
    try:
        data = encoded(gradient(), format, exif=exif)
    except Exception:  # Pillow itself refuses to write it
        return
    assert decode(data).size == decode(base).size == (40, 24)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_pillow_turns_it(format: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x011A] = 72.0
    data = encoded(gradient(), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (np.asarray(decode(data)) == np.asarray(expected.convert("RGB"))).all()
    assert displayed_size(data) == decode(data).size


# --- greys of 16 and 32 bits ---


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP, np.rint(RAMP * 255)),
        (RAMP * 255, np.rint(RAMP * 255)),
        (RAMP * 65535, (RAMP * 65535).astype(int) >> 8),
        ((RAMP * 65535).astype(np.int32), (RAMP * 65535).astype(int) >> 8),
        ((RAMP * 255).astype(np.int32), (RAMP * 255).astype(int)),
        ((RAMP * 65535).astype(np.uint16), (RAMP * 65535).astype(int) >> 8),
        # The file says 16 bits, so it is nearly black.
        ((RAMP * 255).astype(np.uint16), (RAMP * 255).astype(int) >> 8),
    ],
)
def test_greys_are_scaled_by_their_range(values: np.ndarray, expected: np.ndarray) -> None:
    assert (np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))[:, :, 0] == expected).all()


@pytest.mark.parametrize(
    "values",
    [RAMP - 0.5, RAMP * 70000, np.full((8, 8), np.inf, np.float32), np.full((8, 8), np.nan, np.float32)],
)
def test_greys_of_another_range_are_rejected(values: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        assert "greys of mode F from " in reason(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_floats_of_a_pfm_and_16_bits_of_a_pgm_keep_their_greys() -> None:
    pfm = b"Pf\n8 8\n-1.0\n" + np.flipud(RAMP).astype("<f4").tobytes()
    assert (np.asarray(decode(pfm))[:, :, 0] == np.rint(RAMP * 255)).all()
    pgm = b"P5\n8 8\n65535\n" + (RAMP * 65535).astype(">u2").tobytes()
    assert (np.asarray(decode(pgm))[:, :, 0] == (RAMP * 65535).astype(int) >> 8).all()


def test_the_case_of_a_float_from_0_to_1_is_not_black() -> None:
    assert np.asarray(decode((CASES / "float01.tif").read_bytes())).max() > 100


# --- memory ---


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_a_picture_takes_at_most_16_bytes_a_pixel_beyond_itself(mode: str) -> None:
    """24 million pixels of RGBA used to take 1.65 GB."""
    data = encoded(Image.new(mode, (4000, 3000)))
    found = subprocess.run([sys.executable, "-c", PEAK], input=data, capture_output=True, check=True)
    assert float(found.stdout) < 12 * (4 + 16)


def test_all_threads_share_one_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit admits two pictures at a time; a picture that exceeds the limit is decoded alone."""
    data = encoded(Image.new("RGB", (100, 100)))  # counts 8 bytes a pixel
    monkeypatch.setattr(images, "_memory", images._Memory(170_000))
    inside, most, lock = 0, 0, threading.Lock()
    two = threading.Barrier(2, timeout=20)

    def work(number: int) -> tuple[int, int]:
        nonlocal inside, most
        with decoded(data) as image:
            with lock:
                inside += 1
                most = max(most, inside)
            two.wait()
            with lock:
                inside -= 1
            return image.size

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(work, range(6))) == {(100, 100)}
    assert most == 2
    with decoded(encoded(Image.new("RGB", (400, 400)))) as image:
        assert image.size == (400, 400)


def test_a_jpeg_of_very_many_scans_is_rejected() -> None:
    data = encoded(gradient(), "JPEG", progressive=True)
    assert decode(data).size == (40, 24)
    begin = data.index(b"\xff\xda")
    assert "scans" in reason(data[:begin] + data[begin:-2] * 40 + data[-2:])


def test_any_error_while_a_picture_is_used_is_an_image_error() -> None:
    for error in (MemoryError(), RuntimeError("no\n  way"), AssertionError()):
        with (
            pytest.raises(ImageError, match=r"out of memory|no way|AssertionError"),
            decoded(encoded(gradient())),
        ):
            raise error


def test_a_thread_that_fails_releases_its_memory() -> None:
    held = images._memory._held
    for _ in range(3):
        with pytest.raises(ImageError):
            decode(encoded(gradient(400, 400))[:-900])
    assert images._memory._held == held
    assert (
        open_image(encoded(gradient())).size
        == tokenizer_pixels(gradient(), (40, 24)).shape[1::-1]
        == (40, 24)
    )


# --- mutated pictures ---


def test_a_mutated_picture_is_a_sample_or_a_reject() -> None:
    """In threads, as the tokenizer decodes: no other error, no warning, and none takes long."""
    count, found = 20_000, seeds()
    each = count // len(found) + 1
    cases = [
        (f"{name}: {how}", data)
        for n, (name, seed) in enumerate(found.items())
        for how, data in damaged(seed, n, each)
    ]

    def use(case: tuple[str, bytes]) -> str:
        name, data = case
        begun = time.monotonic()
        try:
            with decoded(data) as image:
                assert tokenizer_pixels(image, (16, 16)).shape == (16, 16, 3), name
            outcome = "sample"
        except ImageError as error:
            outcome = (
                "reject" if str(error).isprintable() and str(error) else f"not one line: {name}: {error}"
            )
        assert time.monotonic() - begun < 60, name
        return outcome

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(use, cases))
    assert len(outcomes) >= count
    assert min(outcomes.count("sample"), outcomes.count("reject")) > count // 10
    assert set(outcomes) == {"sample", "reject"}
    print({kind: outcomes.count(kind) for kind in ("sample", "reject")})
