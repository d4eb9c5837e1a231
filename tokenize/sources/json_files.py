"""JSON lists and JSON lines, read by blocks: neither is ever in memory as a whole.

A list's elements are found by Python's own scanner, on bytes that are decoded as Latin-1: then a place in the text is
a byte offset, and nothing is missed, because JSON's structure is ASCII and UTF-8 uses no ASCII byte for anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator

from unitoken.codec.conversations import ItemError, brief
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources.base import SourceFile, Span
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES

BOM = b"\xef\xbb\xbf"
# Figures stay text: only their ends are wanted, and Python converts no more than 4300 digits.
SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
BLANKS = re.compile(r"[ \t\n\r]*")


class BrokenError(ValueError):
    """Where, in bytes, and how a list breaks off."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__(how)
        self.at = at


def list_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """The elements of a JSON list, `chunk_size` together.

    Raises:
        ConfigError: not one element could be read.
    """
    start, end, items = 0, 0, 0
    try:
        for at, element in _List(file.blocks(0, file.size)).elements():
            if items == chunk_size:
                yield Span(start, end, items)
                items = 0
            start = start if items else at
            end = at + len(element)
            items += 1
    except BrokenError as error:
        if not end:
            raise _no_list(file, error) from None
        if items == chunk_size:
            yield Span(start, end, items)
            start, items = end, 0
        yield Span(start, end, items + 1, f"at byte {error.at} of {file.size}: {error}")
    else:
        if items:
            yield Span(start, end, items)


def list_values(
    file: SourceFile, start: int, end: int, wanted: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """The elements between two byte borders, numbered from 0."""
    try:
        for number, (_, element) in enumerate(_List(file.blocks(start, end), start).elements(inside=True)):
            if wanted is None or number in wanted:
                yield number, _value(element)
    except BrokenError as error:
        raise ConfigError(
            f"{file.shown}: has changed since it was cut: at byte {error.at}: {error}"
        ) from None


def line_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """The lines that are not blank, `chunk_size` together.

    Raises:
        ConfigError: the file is one line that can not be read.
    """
    start = at = len(BOM) if file.read(0, len(BOM)) == BOM else 0
    items, earlier, length, line = 0, 0, 0, b""
    for length, line in _lines(file.blocks(at, file.size)):
        if items == chunk_size:
            yield Span(start, at, items)
            start, items, earlier = at, 0, earlier + items
        items += bool(line.strip())
        at += length
    cut = None
    if (
        line.strip()
        and file.read(file.size - 1, file.size) != b"\n"
        and isinstance(value := _value(line), ItemError)
    ):
        if earlier + items == 1:
            raise ConfigError(f"{file.shown}: {value}")
        at -= length
        cut = f"at byte {at} of {file.size}: the last line has no end: {value}"
    if items:
        yield Span(start, at, items, cut)


def line_values(
    file: SourceFile, start: int, end: int, wanted: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """The lines between two byte borders, numbered from 0 without the blank ones."""
    lines = (line for _, line in _lines(file.blocks(start, end)) if line.strip())
    for number, line in enumerate(lines):
        if wanted is None or number in wanted:
            yield number, _value(line)


def _lines(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line (but no more of it than an item may have) with its length in the file. Only a line feed ends one: U+2028
    may stand inside a JSON text.
    """
    rest, length = bytearray(), 0
    for block in blocks:
        *whole, last = block.split(b"\n")
        for line in whole:
            if length:
                rest += line
                yield length + len(line) + 1, bytes(rest)
                rest.clear()
                length = 0
            else:
                yield len(line) + 1, line
        if len(rest) <= MAX_ITEM_BYTES:
            rest += last
        length += len(last)
    if length:
        yield length, bytes(rest)


def _value(text: bytes) -> object:
    if len(text) > MAX_ITEM_BYTES:
        return ItemError(f"item too large: more than {MAX_ITEM_BYTES} bytes")
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return ItemError(f"not UTF-8: byte {error.start} is {text[error.start]:#04x}: {brief(text)}")
    except (ValueError, RecursionError) as error:
        return ItemError(f"not readable as JSON: {error}: {brief(text.decode())}")


class _List:
    """A JSON list as it comes in by blocks: a window of text, the offset of its first byte, the place in it."""

    def __init__(self, blocks: Iterator[bytes], at: int = 0) -> None:
        self._blocks = blocks
        self._text, self._at, self._place = "", at, 0

    def elements(self, inside: bool = False) -> Iterator[tuple[int, bytes]]:
        """Each element with its offset. `inside` a list there is neither its opening nor its closing bracket."""
        if not inside:
            while len(self._text) < len(BOM) and self._more():
                pass
            if self._text.startswith(BOM.decode("latin-1")):
                self._place = len(BOM)
            self._expect("[")
            if self._next() == "]":
                self._place += 1
                return self._nothing_more()
        while not inside or self._next():
            yield self._element()
            if inside and not self._next():
                break
            if self._expect(",]") == "]":
                return self._nothing_more()
        return None

    def _nothing_more(self) -> None:
        if self._next():
            raise self._broken("expected nothing after the list")

    def _expect(self, characters: str) -> str:
        found = self._next()
        if not found or found not in characters:
            raise self._broken(f"expected {' or '.join(map(repr, characters))}")
        self._place += 1
        return found

    def _broken(self, how: str) -> BrokenError:
        found = "the end of the file"
        if self._next():
            found = brief(
                self._text[self._place : self._place + 20].encode("latin-1").decode(errors="replace")
            )
        return BrokenError(self._at + self._place, f"{how}, found {found}")

    def _next(self) -> str:
        """The next character that is not blank; nothing at the end."""
        while True:
            self._place = BLANKS.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _element(self) -> tuple[int, bytes]:
        while True:
            if not self._next():
                raise self._broken("expected an item")
            try:
                _, end = SCANNER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if len(self._text) - self._place > MAX_ITEM_BYTES:
                    raise BrokenError(
                        self._at + self._place, f"an item of more than {MAX_ITEM_BYTES} bytes"
                    ) from None
                if unfinished and self._more():
                    continue
                if error.msg.startswith("Unterminated string") or error.pos >= len(self._text):
                    raise BrokenError(self._at + self._place, "the file ends inside an item") from None
                self._place = error.pos
                raise self._broken(error.msg) from None
            except RecursionError:
                raise BrokenError(self._at + self._place, "an item is nested too deeply") from None
            if end + 3 >= len(self._text) and self._more():
                continue  # 12 may be the beginning of 12.5e+3
            at, element = self._at + self._place, self._text[self._place : end].encode("latin-1")
            self._place = end
            return at, element

    def _more(self) -> bool:
        """Drop what is done and read on, at least as much as there is, so that a long item is not begun too often."""
        parts = []
        missing = max(1, len(self._text) - self._place)
        while missing > 0 and (block := next(self._blocks, b"")):
            parts.append(block.decode("latin-1"))
            missing -= len(block)
        if not parts:
            return False
        self._text, self._at, self._place = (
            self._text[self._place :] + "".join(parts),
            self._at + self._place,
            0,
        )
        return True


def _no_list(file: SourceFile, error: BrokenError) -> ConfigError:
    """What the file is instead."""
    head = file.read(0, 1 << 20)
    try:
        text = head.decode("utf-8-sig").lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except UnicodeDecodeError as wrong:
        if wrong.start < len(head) - 4 or len(head) == file.size:
            return ConfigError(f"{file.shown}: not UTF-8: byte {wrong.start} is {head[wrong.start]:#04x}")
    except (ValueError, RecursionError):
        pass
    else:
        if not isinstance(value, list) and not text[end:].strip():
            kind = (
                f"an object with the keys {brief(list(value))}" if isinstance(value, dict) else brief(value)
            )
            return ConfigError(f"{file.shown}: expected a JSON list of items, found {kind}")
        if not isinstance(value, list):
            hint = "more than one value; one item a line is read from files named .jsonl"
            return ConfigError(f"{file.shown}: not readable as JSON: {hint}")
    return ConfigError(f"{file.shown}: not readable as JSON: at byte {error.at} of {file.size}: {error}")
