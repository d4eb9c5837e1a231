"""The input format and its rules: a raw item -> `Conversation`, or `ItemError` with the reason.

    {"id": "a1",                                                         # optional; else the position in the input
     "conversations": [{"from": "human", "value": "What is it? <|image|>"}, {"from": "gpt", "value": "A cat."}],
     "image": ["cat.jpg"]}                                               # one path or a list; may be omitted

Turns alternate, human first. Every `<|image|>` stands for one image, in order; if none is written, the images stand
before the first human turn. The last assistant turn may be null: it is what a model would be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unitoken.streaming_data.vocabulary import IMAGE_PLACEHOLDER

ROLES = (("human",), ("gpt", "assistant"))  # by the turn's place, in any case


class ItemError(ValueError):
    """Why an item is not in the dataset, as `kind: what was found`. Kinds are counted, so they hold no figures."""


@dataclass(frozen=True)
class Turn:
    """`segments` are the texts around the images: there is one image between each two of them."""

    segments: tuple[str, ...]
    trained: bool


@dataclass(frozen=True)
class Conversation:
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]  # paths in the order in which the images stand in the text


def brief(value: object, limit: int = 60) -> str:
    """A user's value for a message: quoted, cut, and safe to print."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def checked_text(value: str, what: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ItemError(f"text that is not Unicode: {what} holds half of a surrogate pair: {brief(value)}") from None
    return value


def item_id(item: object, position: int) -> str:
    name = item.get("id") if isinstance(item, dict) else None
    if name is None:
        return str(position)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ItemError(f"bad id: expected text or a whole number, found {brief(name)}")
    return checked_text(str(name), "the id")


def parse(item: object, position: int) -> Conversation:
    """Check one item of the input against the rules above."""
    if isinstance(item, ItemError):  # a line of a JSONL file that could not be read
        raise item
    if not isinstance(item, dict):
        raise ItemError(f"not an item: expected a JSON object, found {brief(item)}")
    name = item_id(item, position)
    if not isinstance(raw_turns := item.get("conversations"), list) or not raw_turns:
        found = f"found {brief(raw_turns)}" if "conversations" in item else f"the item's keys are {brief(list(item))}"
        raise ItemError(f"no conversations: expected a list of turns under 'conversations', {found}")
    texts = [_text(turn, number, last=number == len(raw_turns) - 1) for number, turn in enumerate(raw_turns)]
    images = _images(item)
    written = sum(text.count(IMAGE_PLACEHOLDER) for text in texts if text is not None)
    if written == 0:
        texts[0] = f"{IMAGE_PLACEHOLDER} " * len(images) + (texts[0] or "")
    elif written != len(images):
        given = f"{len(images)} image{'s' if len(images) != 1 else ''}"
        raise ItemError(f"image counts differ: {written} {IMAGE_PLACEHOLDER} in the text but {given}")
    turns = tuple(
        Turn(tuple(text.split(IMAGE_PLACEHOLDER)), trained=number % 2 == 1) for number, text in enumerate(texts) if text is not None
    )
    return Conversation(name, turns, images)


def _text(turn: Any, number: int, last: bool) -> str | None:
    """The text of turn `number`; None only for a last assistant turn that is left open."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ItemError(f"bad turn: turn {number}: expected an object with 'from' and 'value', found {brief(turn)}")
    role, text = turn["from"], turn["value"]
    if not isinstance(role, str) or role.lower() not in ROLES[number % 2]:
        raise ItemError(f"wrong turn order: turn {number} is from {brief(role)}, expected '{ROLES[number % 2][0]}'")
    if text is None and last and number % 2 == 1:
        return None
    if not isinstance(text, str):
        raise ItemError(f"turn without text: turn {number}: expected text, found {brief(text)}; only a last gpt turn may be null")
    return checked_text(text, f"turn {number}")


def _images(item: dict[str, Any]) -> tuple[str, ...]:
    paths = item.get(IMAGE_PLACEHOLDER, item.get("image"))  # the symbol itself is a key the reference knows, too
    paths = [] if paths is None else paths if isinstance(paths, list) else [paths]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ItemError(f"bad image path: expected text, found {brief(path)}")
    return tuple(checked_text(path, "an image path") for path in paths)
