"""The input format and its rules: a raw item -> `Conversation`, or `ItemError` with the reason.

    {"id": "a1",                                                         # optional; else the place in the input
     "conversations": [{"from": "human", "value": "What is it? <|image|>"}, {"from": "gpt", "value": "A cat."}],
     "image": ["cat.jpg"]}                                               # one image or a list; may be omitted

An image is a path, a URL (`data:` too), its bytes, {"base64": text}, or {"bytes": ..., "path": ...} as Hugging Face's
`datasets` stores it.

Turns alternate, human first. Every `<|image|>` stands for one image, in order; if none is written, the images stand
before the first human turn. The last assistant turn may be null: it is what a model would be asked for.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from dataclasses import dataclass
from typing import Any

from unitoken.streaming_data.urls import without_secrets
from unitoken.streaming_data.vocabulary import IMAGE_PLACEHOLDER

ROLES = (("human",), ("gpt", "assistant"))  # by the turn's place, in any case


class ItemError(ValueError):
    """Why an item is not in the dataset, as `kind: what was found`. Kinds are counted, so they hold no figures.

    Rejects are stored: a URL in the message loses its user, password and query.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


@dataclass(frozen=True)
class Turn:
    """`segments` are the texts around the images: there is one image between each two of them."""

    segments: tuple[str, ...]
    trained: bool


@dataclass(frozen=True)
class Conversation:
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...]  # paths, URLs or the bytes, in the order in which the images stand in the text


def brief(value: object, limit: int = 60) -> str:
    """A user's value for a message: quoted, cut, and safe to print."""
    text = repr(_trimmed(value, limit))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _trimmed(value: object, limit: int, depth: int = 4) -> object:
    """As much of `value` as can show: an item may hold a picture's bytes, or be nested deeper than repr() can follow."""
    if isinstance(value, str | bytes):
        return value[: limit + 1]
    if isinstance(value, list):
        return [_trimmed(part, limit, depth - 1) for part in value[:limit]] if depth else "..."
    if isinstance(value, dict):
        pairs = itertools.islice(value.items(), limit)
        return {_trimmed(key, limit): _trimmed(part, limit, depth - 1) for key, part in pairs} if depth else "..."
    return value


def shown(source: str | bytes) -> str:
    """An image's name for messages: never its bytes."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes in the item"
    text = f"{source[:40]}..." if is_inline(source) else source if len(source) <= 300 else f"{source[:300]}..."
    return text if "\0" not in text else repr(text)


def is_inline(source: str) -> bool:
    return source[:5].lower() == "data:"


def inline(source: str) -> bytes:
    """The bytes that a `data:` URL holds."""
    head, comma, text = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ItemError(f"bad base64: {shown(source)}: expected data:image/...;base64,...")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ItemError(f"bad base64: {shown(source)}: {error}") from None


def checked_text(value: str, what: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ItemError(f"text that is not Unicode: {what} holds half of a surrogate pair: {brief(value)}") from None
    return value


def item_id(item: object, name: str) -> str:
    """The item's id; `name` where it has none."""
    given = item.get("id") if isinstance(item, dict) else None
    if given is None:
        return name
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise ItemError(f"bad id: expected text or a whole number, found {brief(given)}")
    return checked_text(str(given), "the id")


def parse(item: object, name: str) -> Conversation:
    """Check one item of the input against the rules above. `name` is its id if it brings none."""
    if isinstance(item, ItemError):  # what the source could not read
        raise item
    if not isinstance(item, dict):
        raise ItemError(f"not an item: expected a JSON object, found {brief(item)}")
    name = item_id(item, name)
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


def refuse_empty(conversation: Conversation) -> None:
    """The reference takes turns without any text; a model learns nothing good from them."""
    for number, turn in enumerate(conversation.turns):
        if len(turn.segments) == 1 and not turn.segments[0].strip():
            raise ItemError(f"empty text: turn {number} holds neither text nor an image")


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


def _images(item: dict[str, Any]) -> tuple[str | bytes, ...]:
    images = item.get(IMAGE_PLACEHOLDER, item.get("image"))  # the symbol itself is a key the reference knows, too
    images = [] if images is None else images if isinstance(images, list) else [images]
    return tuple(_image(image) for image in images)


def _image(image: Any) -> str | bytes:
    if isinstance(image, dict):
        if isinstance(text := image.get("base64"), str):
            return f"data:image;base64,{text}"
        image = image["path"] if image.get("bytes") is None and image.get("path") else image.get("bytes", image)
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise ItemError(f"bad image path: expected a path, a URL or an image's bytes, found {brief(image)}")
    return checked_text(image, "an image path")
