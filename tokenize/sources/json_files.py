"""JSON lists and JSON lines, read in blocks: neither is ever in memory as a whole.

Python's own scanner finds the elements of a list. It works on bytes that are decoded as Latin-1, so that a
position in the text is a byte offset. Nothing is lost by that: the structure of JSON is ASCII, and UTF-8 uses
no ASCII byte for anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator

from unitoken.codec.conversations import ItemError, brief
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources.base import SourceFile, Span, item_too_large

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Numbers stay text: only their ends are needed, and Python converts no more than 4300 digits.
SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
BLANKS = " \t\n\r"
_SKIP_BLANKS = re.compile(f"[{BLANKS}]*")
# A word, a number or an escape may be cut by the end of the window. The longest that the scanner reports at
# its beginning are `-Infinity` and an escaped surrogate pair, `\ud83d\ude00`.
LONGEST_TOKEN = 16


class BrokenListError(ValueError):
    """A list breaks off: at which byte of the file, and how."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__(how)
        self.at = at


def list_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """Cut a JSON list into spans of `chunk_size` elements.

    Raises:
        ConfigError: not one element could be read.
    """
    start, end, items = 0, 0, 0
    try:
        for at, element in _ListScanner(file, 0, file.size).elements():
            if items == chunk_size:
                yield Span(start, end, items)
                items = 0
            start = start if items else at
            end = at + len(element)
            items += 1
    except BrokenListError as error:
        if not end:
            raise _not_a_list(file, error) from None
        if items == chunk_size:
            yield Span(start, end, items)
            start, items = end, 0
        yield Span(start, end, items + 1, f"at byte {error.at} of {file.size}: {error}")
    else:
        if items:
            yield Span(start, end, items)


def list_values(
    file: SourceFile, start: int, end: int, selected: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """Read the elements between two byte offsets."""
    try:
        for number, (_, element) in enumerate(_ListScanner(file, start, end).elements_without_brackets()):
            if selected is None or number in selected:
                yield number, _parse(element, file.max_item_bytes)
    except BrokenListError as error:
        raise ConfigError(
            f"{file.shown}: has changed since it was cut: at byte {error.at}: {error}"
        ) from None


def line_spans(file: SourceFile, chunk_size: int) -> Iterator[Span]:
    """Cut a file of JSON lines into spans of `chunk_size` lines, not counting blank ones.

    Raises:
        ConfigError: the file is a single line that cannot be read.
    """
    has_mark = file.read(0, len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
    start = at = len(BYTE_ORDER_MARK) if has_mark else 0
    items, items_before, length, line = 0, 0, 0, b""
    for length, line in _lines(file, at, file.size):
        if items == chunk_size:
            yield Span(start, at, items)
            start, items, items_before = at, 0, items_before + items
        items += bool(line.strip())
        at += length
    cut = None
    if line.strip() and file.read(file.size - 1, file.size) != b"\n":
        value = _parse(line, file.max_item_bytes)
        if isinstance(value, ItemError):
            if items_before + items == 1:
                raise ConfigError(f"{file.shown}: {value}")
            at -= length
            cut = f"at byte {at} of {file.size}: the last line has no end: {value}"
    if items:
        yield Span(start, at, items, cut)


def line_values(
    file: SourceFile, start: int, end: int, selected: Collection[int] | None
) -> Iterator[tuple[int, object]]:
    """Read the lines between two byte offsets, not counting blank ones."""
    lines = (line for _, line in _lines(file, start, end) if line.strip())
    for number, line in enumerate(lines):
        if selected is None or number in selected:
            yield number, _parse(line, file.max_item_bytes)


def _lines(file: SourceFile, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line with its length in the file, the line feed included.

    Of a line that is longer than an item may be, only the beginning is returned. Only a line feed ends a
    line: U+2028 may stand inside a JSON text.
    """
    unfinished, length = bytearray(), 0
    for block in file.blocks(start, end):
        *finished, last = block.split(b"\n")
        for line in finished:
            if length:
                unfinished += line
                yield length + len(line) + 1, bytes(unfinished)
                unfinished.clear()
                length = 0
            else:
                yield len(line) + 1, line
        if len(unfinished) <= file.max_item_bytes:
            unfinished += last
        length += len(last)
    if length:
        yield length, bytes(unfinished)


def _parse(text: bytes, max_item_bytes: int) -> object:
    if len(text) > max_item_bytes:
        return item_too_large("", max_item_bytes)
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return ItemError(f"not UTF-8: byte {error.start} is {text[error.start]:#04x}: {brief(text)}")
    except (ValueError, RecursionError) as error:
        return ItemError(f"not readable as JSON: {error}: {brief(text.decode())}")


class _ListScanner:
    """Finds the elements of a JSON list in a window of text that moves over the file."""

    def __init__(self, file: SourceFile, start: int, end: int) -> None:
        self._blocks = file.blocks(start, end)
        self._max_item_bytes = file.max_item_bytes
        self._text = ""
        self._offset = start  # of the window's first byte in the file
        self._position = 0  # in the window

    def elements(self) -> Iterator[tuple[int, bytes]]:
        """Yield each element of the whole list with its offset in the file."""
        self._skip_byte_order_mark()
        self._expect("[")
        if self._next_character() == "]":
            self._position += 1
        else:
            yield self._element()
            while self._expect(",]") == ",":
                yield self._element()
        self._expect_end()

    def elements_without_brackets(self) -> Iterator[tuple[int, bytes]]:
        """Yield each element of a part of a list, which begins and ends with an element."""
        while self._next_character():
            yield self._element()
            if self._next_character() and self._expect(",]") == "]":
                self._expect_end()

    def _expect_end(self) -> None:
        if self._next_character():
            raise self._broken("expected nothing after the list")

    def _skip_byte_order_mark(self) -> None:
        while len(self._text) < len(BYTE_ORDER_MARK) and self._read_more():
            pass
        if self._text.startswith(BYTE_ORDER_MARK.decode("latin-1")):
            self._position = len(BYTE_ORDER_MARK)

    def _expect(self, characters: str) -> str:
        found = self._next_character()
        if not found or found not in characters:
            raise self._broken(f"expected {' or '.join(map(repr, characters))}")
        self._position += 1
        return found

    def _broken(self, how: str) -> BrokenListError:
        found = "the end of the file"
        if self._next_character():
            some = self._text[self._position : self._position + 20]
            found = brief(some.encode("latin-1").decode(errors="replace"))
        return self._broken_here(f"{how}, found {found}")

    def _broken_here(self, how: str) -> BrokenListError:
        return BrokenListError(self._offset + self._position, how)

    def _next_character(self) -> str:
        """Move to the next character that is not blank, and return it; return "" at the end."""
        while True:
            blanks = _SKIP_BLANKS.match(self._text, self._position)
            assert blanks is not None
            self._position = blanks.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def _element(self) -> tuple[int, bytes]:
        """Return the next element and its offset, and move behind it."""
        if not self._next_character():
            raise self._broken("expected an item")
        while True:
            try:
                _, end = SCANNER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if len(self._text) - self._position > self._max_item_bytes:
                    raise self._broken_here(f"an item of more than {self._max_item_bytes} bytes") from None
                in_string = self._is_open_string(error.pos)
                near_end = error.pos >= len(self._text) - LONGEST_TOKEN
                if (in_string or near_end) and self._read_more():
                    continue
                if in_string or error.pos >= len(self._text):
                    raise self._broken_here("the file ends inside an item") from None
                self._position = error.pos
                raise self._broken(error.msg) from None
            except RecursionError:
                raise self._broken_here("an item is nested too deeply") from None
            if end + 3 >= len(self._text) and self._read_more():
                continue  # 12 may be the beginning of 12.5e+3
            offset = self._offset + self._position
            element = self._text[self._position : end].encode("latin-1")
            self._position = end
            return offset, element

    def _is_open_string(self, at: int) -> bool:
        """Return whether the scanner failed because the string at `at` does not end in the window.

        The scanner fails at a quote for two reasons only: the string has no end, or a comma, a colon or a
        bracket should be there. The character before the quote tells which. (A mistake inside a string is
        reported at its own position.) The error's message says it, too, but is no part of Python's interface.
        """
        if self._text[at : at + 1] != '"':
            return False
        before = at - 1
        while before >= self._position and self._text[before] in BLANKS:
            before -= 1
        return before < self._position or self._text[before] in "[{,:"

    def _read_more(self) -> bool:
        """Drop what was returned already and read on; return False at the end.

        This reads at least as much as is left in the window: a window that doubles begins a long element
        again only a few times.
        """
        blocks = []
        missing = max(1, len(self._text) - self._position)
        while missing > 0 and (block := next(self._blocks, b"")):
            blocks.append(block.decode("latin-1"))
            missing -= len(block)
        if not blocks:
            return False
        self._text = self._text[self._position :] + "".join(blocks)
        self._offset += self._position
        self._position = 0
        return True


def _not_a_list(file: SourceFile, error: BrokenListError) -> ConfigError:
    """Say what the file is instead of a list."""
    head = file.read(0, 1 << 20)
    try:
        text = head.decode("utf-8-sig").lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except UnicodeDecodeError as wrong:
        # A character may be cut by the end of the head.
        if wrong.start < len(head) - 4 or len(head) == file.size:
            return ConfigError(f"{file.shown}: not UTF-8: byte {wrong.start} is {head[wrong.start]:#04x}")
    except (ValueError, RecursionError):
        pass
    else:
        if not isinstance(value, list):
            if text[end:].strip():
                hint = "more than one value; one item a line is read from files named .jsonl"
                return ConfigError(f"{file.shown}: not readable as JSON: {hint}")
            is_object = isinstance(value, dict)
            found = f"an object with the keys {brief(list(value))}" if is_object else brief(value)
            return ConfigError(f"{file.shown}: expected a JSON list of items, found {found}")
    return ConfigError(f"{file.shown}: not readable as JSON: at byte {error.at} of {file.size}: {error}")
