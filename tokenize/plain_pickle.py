"""Read pickles that hold only lists, dicts, texts and numbers, and run nothing in them.

There are two walls: before the pickle is read, each of its operations is held against the ones that such
values are written with; and the unpickler that reads it finds no names, without which it can neither build
nor call anything.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import NoReturn

from unitoken.codec.conversations import ItemError, short_name

MAX_BYTES = 1 << 26  # an item of 4,096 tokens has 25 KB

# The operations of lists, dicts, numbers, bools, None and the memo, with bounds on lengths and memo numbers.
# A memo number is a size that Python reserves: nine bytes that name 2**31 would take 32 GB.
_FIXED_LENGTH = re.compile(
    rb"(?:[]}(Naseu\x88\x89\x94]|[Kqh\x80].|M..|J.{4}|[rj]..\0\0|[G\x95].{8})*+", re.DOTALL
)
# Texts and large numbers: operation -> width of the number behind it, which counts the bytes that follow.
_COUNTED = {b"\x8c": 1, b"X": 4, b"\x8a": 1}
_STOP = b"."


def load_plain(data: bytes, name: str) -> object:
    """Return the value of a pickle.

    Args:
        data: the pickle.
        name: of its file, for the error.

    Raises:
        ItemError: it holds anything else than lists, dicts, texts, numbers, bools and None, or is broken.
    """
    position = _skip_fixed_length(data, 0)
    while (code := data[position : position + 1]) != _STOP:
        if code not in _COUNTED:
            known = [op.name for op in pickletools.opcodes if op.code.encode("latin-1") == code]
            operation = known[0] if known else "no pickle"
            raise ItemError(f"not a plain pickle: {short_name(name)}: {operation} at byte {position}")
        start = position + 1 + _COUNTED[code]
        count = int.from_bytes(data[position + 1 : start], "little")
        position = _skip_fixed_length(data, start + count)
    try:
        return PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # operations that are each allowed, in an order that makes no sense
        raise ItemError(f"not a plain pickle: {short_name(name)}: {error}") from None


def _skip_fixed_length(data: bytes, start: int) -> int:
    """Return where the operations of fixed length that begin at `start` end."""
    match = _FIXED_LENGTH.match(data, start)
    assert match is not None, "the pattern matches the empty text"
    return match.end()


class PlainUnpickler(pickle.Unpickler):
    """Finds no names. A pickle can build and call only what it has found by name, so it can run nothing."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Raise UnpicklingError."""
        raise pickle.UnpicklingError(f"{module}.{name} is not a list, dict, text or number")


def read_pickle(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file. Raises ItemError if it is missing, no regular file, too large or not readable."""
    name = short_name(str(path))
    try:
        if not path.is_file():  # before it is opened: a pipe would never end
            raise ItemError(f"no such pickle: {name}")
        size = path.stat().st_size
        if size > max_bytes:
            raise ItemError(f"pickle too large: {name}: {size} bytes, at most {max_bytes} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ItemError):
            raise
        raise ItemError(f"pickle not readable: {name}: {error}") from None
