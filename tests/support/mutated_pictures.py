"""Pictures that are damaged with knowledge of their format; `bad_inputs.damaged` knows only bytes.

Header fields get wrong values; parts are dropped, repeated, moved or taken from another picture. The
checksums of a PNG are corrected, so that its decoder goes on.
"""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from collections.abc import Iterator

NUMBERS = (
    *(0, 1, 2, 7, 8, 16, 32, 127, 128, 255, 256, 4096, 32767, 65535),
    *(1 << 20, (1 << 24) - 1, (1 << 31) - 1, (1 << 32) - 1),
)


def mutated(seeds: dict[str, bytes], count: int, start: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield `count` pictures with a description of the damage, the same in each run."""
    names = list(seeds)
    for number in range(start, start + count):
        choice = random.Random(number)
        name = names[number % len(names)]
        pieces = _pieces(seeds[name])
        done = []
        for _ in range(choice.choice((1, 1, 1, 2, 3))):
            kind = choice.choice(
                ("field", "field", "field", "byte", "drop", "repeat", "move", "splice", "append", "cut")
            )
            done.append(kind)
            other = seeds[choice.choice(names)]
            pieces = _mutate(pieces, kind, choice, other)
        data = b"".join(pieces)
        if choice.random() < 0.9:
            data = _correct_checksums(data)
        yield f"{name}: {', '.join(done)} {number}", data


def _mutate(pieces: list[bytes], kind: str, choice: random.Random, other: bytes) -> list[bytes]:
    pieces = list(pieces)
    at = choice.randrange(len(pieces))
    if kind in ("field", "byte"):
        piece = bytearray(pieces[at])
        # The smaller of two numbers: headers are at the beginning.
        place = min(choice.randrange(len(piece) + 1), choice.randrange(len(piece) + 1))
        width = 1 if kind == "byte" else choice.choice((1, 2, 4))
        order = choice.choice(("big", "little"))
        piece[place : place + width] = (choice.choice(NUMBERS) & (256**width - 1)).to_bytes(width, order)  # type: ignore[arg-type]
        pieces[at] = bytes(piece)
    elif kind == "drop":
        del pieces[at]
    elif kind == "repeat":
        pieces[at:at] = [pieces[at]] * choice.choice((1, 2, 50))
    elif kind == "move":
        pieces.insert(choice.randrange(len(pieces)), pieces.pop(at))
    elif kind == "splice":
        pieces.insert(at, choice.choice(_pieces(other)))
    elif kind == "append":
        pieces.append(other)
    else:
        pieces[at] = pieces[at][: choice.randrange(len(pieces[at]) + 1)]
    return pieces or [b""]


def _pieces(data: bytes) -> list[bytes]:
    """Split a picture into the chunks, boxes or segments of its format, or else into runs of a few bytes."""
    ends = [0]
    try:
        if data.startswith(b"\x89PNG"):
            ends.append(8)
            while ends[-1] < len(data):
                ends.append(ends[-1] + 12 + struct.unpack_from(">I", data, ends[-1])[0])
        elif data[4:8] in (b"ftyp", b"jP  "):
            while ends[-1] < len(data):
                length = struct.unpack_from(">I", data, ends[-1])[0] or len(data)
                ends.append(ends[-1] + max(length, 8))
        elif data.startswith(b"RIFF"):
            ends.append(12)
            while ends[-1] < len(data):
                length = struct.unpack_from("<I", data, ends[-1] + 4)[0]
                ends.append(ends[-1] + 8 + length + length % 2)
        elif data.startswith(b"\xff\xd8"):
            ends.append(2)
            while data[ends[-1] + 1] != 0xDA:
                ends.append(ends[-1] + 2 + struct.unpack_from(">H", data, ends[-1] + 2)[0])
    except (struct.error, IndexError):
        pass
    if len(ends) == 1:
        ends += range(12, len(data), 12)
    ends = [end for end in ends if end < len(data)] + [len(data)]
    return [data[low:high] for low, high in itertools.pairwise(ends)] or [b""]


def _correct_checksums(data: bytes) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            break
        parts += [data[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(parts) + data[at:]
