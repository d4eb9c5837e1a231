"""How a conversation and its images are laid out as tokens.

    opening  human's turn  opening  assistant's turn  closing  trailing  opening  human's turn  ...
    ---- not trained on ----------  ---- trained on ---------  ---- not trained on ------------

    image:  header (start, sizes)  row 0 of codes  row_end  ...  last row  row_end  end

A *pattern* names tokens and text; a *layout* has the ids of one tokenizer in place of the names. Patterns
are built in (`chameleon`, `emu3`), read from the tokenizer's own chat template, or written by users in a
YAML file. A layout is a part of the vocabulary (vocabulary.py), so it travels with every dataset and model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic

from unitoken.common.config import Config, Name

MAX_GRID = 99
"""The most units in which the side of an image is counted: `<reserved08801>` .. `<reserved08899>`."""

Piece = int | str
"""The id of a special token, or text that is encoded together with the text beside it."""
Pieces = tuple[Piece, ...]
HeaderPart = tuple[int, ...] | Literal["height", "width"]

_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_CODE = re.compile(r"\{(letters)\}|\{code(?::(0[1-9]))?\}")
_SIZE = re.compile(r"\{size(?::(0[1-9]))?\}")


# --- patterns: names and text -------------------------------------------------------------------------------


class TurnPattern(Config):
    """What stands around the text of a turn; names of special tokens and text."""

    opening: str = ""
    """Before the turn; what ends the turn of a human belongs to the opening of the assistant's."""
    lead: str = ""
    """Before text, not before an image, and trained on; for assistants only."""
    closing: str = ""
    """After the turn, trained on; for assistants only. The model ends its turn by its first special token."""
    trailing: str = ""
    """After `closing`, not trained on; for assistants only."""
    strip: tuple[str, str] = ("", "")
    """The characters that are cut off the text at its left and at its right."""


class ConversationPattern(Config):
    """The turns of a conversation."""

    human: TurnPattern
    """The first turn of a conversation without a system turn."""
    later_human: TurnPattern | None = None
    """A later turn; default: as the first."""
    assistant: TurnPattern
    last_assistant: TurnPattern | None = None
    """The last turn of a conversation; default: as the others."""
    system: TurnPattern | None = None
    """A system turn at the beginning; null: there are none."""
    human_after_system: TurnPattern | None = None
    """The first human turn after a system turn; default: as a later one."""


class ImagePattern(Config):
    """The tokens of an image; the default is Chameleon's."""

    block: str = "<racm3:break>{height}{width}{rows}<eoss>"
    """Names and text with one {height}, {width} and {rows} each."""
    row_end: str = "<reserved08799>"
    """After each row of codes; may be empty."""
    code_name: str = "IMGIMG{letters}Z"
    """Name of the token of an image code: {code}, {code:06} with leading zeros, or {letters} A-J for 0-9."""
    size_name: str | None = "<reserved088{size:02}>"
    """Name of the token of a height or width; null: the number is written as text."""
    latents_per_size: int = pydantic.Field(default=2, ge=1, le=2)
    """Latents in which a height or width is counted."""

    @pydantic.field_validator("block")
    @classmethod
    def _placeholders(cls, value: str) -> str:
        for name in ("{height}", "{width}", "{rows}"):
            if value.count(name) != 1:
                raise ValueError(f"expected {name} once in it, found {value.count(name)}")
        if max(value.index("{height}"), value.index("{width}")) > value.index("{rows}"):
            raise ValueError("expected {rows} after {height} and {width}")
        return value

    @pydantic.field_validator("code_name")
    @classmethod
    def _code_name(cls, value: str) -> str:
        if len(_CODE.findall(value)) != 1:
            raise ValueError("expected {code}, {code:06} or {letters} once in it")
        return value

    @pydantic.field_validator("size_name")
    @classmethod
    def _size_name(cls, value: str | None) -> str | None:
        if value is not None and len(_SIZE.findall(value)) != 1:
            raise ValueError("expected {size} or {size:02} once in it")
        return value

    def name_of_code(self, code: int) -> str:
        """Return the name of an image code's token."""
        return name_of_code(self.code_name, code)

    def name_of_size(self, units: int) -> str:
        """Return the name of the token of a side of `units`."""
        assert self.size_name is not None
        return _SIZE.sub(lambda match: format(units, match[1] or ""), self.size_name)


class LayoutPattern(Config):
    """A user's own layout: the content of its YAML file."""

    tokens: list[Name] = pydantic.Field(default=[])
    """Names of the special tokens in `conversation`; those that the tokenizer lacks are added to it."""
    conversation: ConversationPattern
    image: ImagePattern = ImagePattern()


def name_of_code(pattern: str, code: int) -> str:
    """Return the name of an image code's token: of 12 by Chameleon's pattern, `IMGIMGBCZ`."""

    def digits(match: re.Match[str]) -> str:
        return str(code).translate(_LETTERS) if match[1] else format(code, match[2] or "")

    return _CODE.sub(digits, pattern)


# --- layouts: ids -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TurnLayout:
    """What stands around the text of a turn, as in `TurnPattern`."""

    opening: Pieces = ()
    lead: Pieces = ()
    closing: Pieces = ()
    trailing: Pieces = ()
    strip: tuple[str, str] = ("", "")

    def stripped(self, segments: tuple[str, ...]) -> tuple[str, ...]:
        """Cut `strip` off the texts around a turn's images."""
        left, right = self.strip
        if not left and not right:
            return segments
        texts = list(segments)
        texts[0] = texts[0].lstrip(left) if left else texts[0]
        texts[-1] = texts[-1].rstrip(right) if right else texts[-1]
        return tuple(texts)


@dataclass(frozen=True)
class ConversationLayout:
    """The turns of a conversation, as in `ConversationPattern`.

    `text_starts_anew`: whether text after a special token is encoded as at the beginning of a text, so that a
    tokenizer that puts a space before a text does so there, too.
    """

    human: TurnLayout
    later_human: TurnLayout
    assistant: TurnLayout
    last_assistant: TurnLayout
    system: TurnLayout | None = None
    human_after_system: TurnLayout | None = None
    text_starts_anew: bool = True

    @property
    def end_of_turn(self) -> int | None:
        """The special token by which the model ends its turn."""
        after = self.last_assistant.closing + self.last_assistant.trailing
        return next((piece for piece in after if isinstance(piece, int)), None)

    def special_ids(self) -> set[int]:
        """Return all special tokens of the turns."""
        turns = (self.human, self.later_human, self.assistant, self.last_assistant)
        optional = [turn for turn in (self.system, self.human_after_system) if turn is not None]
        return {
            piece
            for turn in (*turns, *optional)
            for pieces in (turn.opening, turn.lead, turn.closing, turn.trailing)
            for piece in pieces
            if isinstance(piece, int)
        }

    def first_ids(self) -> set[int] | None:
        """Return the tokens with which a conversation may begin; None if it may begin with text."""
        first: set[int] = set()
        for turn in (self.human, self.system or self.human):
            if not turn.opening or isinstance(turn.opening[0], str):
                return None
            first.add(turn.opening[0])
        return first


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of an image.

    Attributes:
        header: from the start of the image to its first row: ids, and the places of the sizes.
        heights: the ids of a height of 1, 2, ... units.
        widths: the ids of a width.
        row_end: after each row of codes.
        end: after the last row.
        latents_per_size: latents in a unit.
    """

    header: tuple[HeaderPart, ...]
    heights: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    row_end: tuple[int, ...]
    end: tuple[int, ...]
    latents_per_size: int

    @property
    def start(self) -> int:
        """The first token of an image."""
        assert isinstance(self.header[0], tuple)
        return self.header[0][0]

    def count(self, height: int, width: int) -> int:
        """Return the number of tokens of an image of height x width latents."""
        return len(self.header_ids(height, width)) + height * (width + len(self.row_end)) + len(self.end)

    def header_ids(self, height: int, width: int) -> tuple[int, ...]:
        """Return the tokens before the first row. Raises ValueError for a size that has no tokens."""
        ids: list[int] = []
        for part in self.header:
            if isinstance(part, tuple):
                ids += part
            else:
                ids += self._size_ids(part, height if part == "height" else width)
        return tuple(ids)

    def _size_ids(self, part: Literal["height", "width"], latents: int) -> tuple[int, ...]:
        table = self.heights if part == "height" else self.widths
        units, rest = divmod(latents, self.latents_per_size)
        if rest or not 1 <= units <= len(table):
            expected = "an even number" if self.latents_per_size == 2 else "a number"
            raise ValueError(
                f"an image side of {latents} latents: "
                f"expected {expected} from {self.latents_per_size} to {self.latents_per_size * len(table)}"
            )
        return table[units - 1]

    @cached_property
    def _units(self) -> dict[str, dict[tuple[int, ...], int]]:
        tables = {"height": self.heights, "width": self.widths}
        return {name: {ids: n for n, ids in enumerate(table, 1)} for name, table in tables.items()}

    def read_header(self, block: npt.NDArray[np.int64]) -> tuple[int, int, int]:
        """Return the height and width in latents at the begin of a block, and the length of its header.

        Raises:
            ValueError: the block does not begin with a header.
        """
        # More than one reading is possible where sizes are text: 3 and 2 ids may both begin a number.
        readings: list[tuple[int, dict[str, int]]] = [(0, {})]
        for part in self.header:
            readings = [
                (end, sizes | found)
                for start, sizes in readings
                for end, found in self._read_part(part, block, start)
            ]
        for end, sizes in readings:
            height, width = sizes["height"], sizes["width"]
            if len(block) == end + height * (width + len(self.row_end)) + len(self.end):
                return height, width, end
        found = [(sizes["height"], sizes["width"]) for _, sizes in readings] or [(0, 0)]
        raise ValueError(f"{len(block)} ids are no image block of {found[0][0]} x {found[0][1]} latents")

    def _read_part(
        self, part: HeaderPart, block: npt.NDArray[np.int64], start: int
    ) -> Iterator[tuple[int, dict[str, int]]]:
        if isinstance(part, tuple):
            if tuple(block[start : start + len(part)].tolist()) == part:
                yield start + len(part), {}
            return
        units = self._units[part]
        for length in {len(ids) for ids in units}:
            size = units.get(tuple(block[start : start + length].tolist()))
            if size is not None:
                yield start + length, {part: size * self.latents_per_size}


@dataclass(frozen=True)
class Layout:
    """A layout that is not Chameleon's, in the ids of a tokenizer.

    Attributes:
        name: `chat_template`, `emu3`, or the name of a user's file and its fingerprint.
        conversation: the turns.
        image: the tokens of an image.
        code_name: the pattern of the names of image codes.
        names: the special tokens of images and those that a user's file lists, without image codes, each with
            its id.
    """

    name: str
    conversation: ConversationLayout
    image: ImageLayout
    code_name: str
    names: tuple[tuple[str, int], ...] = ()


def layout_from_json(fields: Mapping[str, Any]) -> Layout:
    """Return the layout that `dataclasses.asdict` made `fields` of.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or has another type.
    """
    conversation: dict[str, Any] = {
        name: _turn_from_json(value) if isinstance(value, dict) else value
        for name, value in fields["conversation"].items()
    }
    image = dict(fields["image"])
    image["header"] = tuple(part if isinstance(part, str) else tuple(part) for part in image["header"])
    for table in ("heights", "widths"):
        image[table] = tuple(tuple(ids) for ids in image[table])
    image["row_end"], image["end"] = tuple(image["row_end"]), tuple(image["end"])
    return Layout(
        name=fields["name"],
        conversation=ConversationLayout(**conversation),
        image=ImageLayout(**image),
        code_name=fields["code_name"],
        names=tuple((str(name), int(token)) for name, token in fields["names"]),
    )


def _turn_from_json(fields: Mapping[str, Any]) -> TurnLayout:
    return TurnLayout(**{name: tuple(value) for name, value in fields.items()})
