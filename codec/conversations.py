"""The input format and its rules: a raw item -> `Conversation`, or `ItemError` with the reason.

    {"id": "a1",                                         # optional; by default the item's place in the input
     "conversations": [{"from": "human", "value": "What is it? <|image|>"},
                       {"from": "gpt", "value": "A cat."}],
     "image": ["cat.jpg"]}                               # one image or a list; may be omitted

An image is a path, a URL (`data:` too), its bytes, {"base64": text}, or {"bytes": ..., "path": ...} as
Hugging Face's `datasets` stores it.

Turns alternate, human first; a turn from `system` may come before them. Every `<|image|>` in the text is the
place of one image, in order; without any, the images come before the first human turn. `<image>` is read as
`<|image|>` if there are as many as images. The last assistant turn may be null, which leaves it for a model
to write.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from dataclasses import dataclass
from typing import Any

from unitoken.common.urls import without_secrets
from unitoken.dataset.manifest import LEFT_OUT
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER

ROLES = (("human",), ("gpt", "assistant"))
"""The roles of even and of odd turns, in any case."""
PICTURE_KEYS = (
    IMAGE_PLACEHOLDER,  # the reference knows the placeholder as a key, too
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls"),
    *("img", "imgs", "img_path", "img_paths", "img_url", "picture", "pictures", "photo", "photos"),
)
PICTURE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpx", "jpf", "pbm", "pgm", "ppm", "pnm"),
)
"""Endings of the picture files that `dataset/image_files.py` reads."""
OTHER_SUFFIXES = (
    *("heic", "heif", "jxl", "svg", "psd", "eps", "pdf", "ico", "dds", "tga", "exr", "hdr", "raw", "dng"),
    *("dib", "j2c", "jpm", "jpg_large"),
    *("mp4", "webm", "avi", "mov", "mkv", "mpeg", "mpg", "mp3", "wav", "flac", "ogg", "opus", "m4a"),
)
"""Endings of pictures, videos and sounds that are not read."""
OTHER_MEDIA = ("video", "videos", "video_path", "video_url", "audio", "audios", "audio_path", "audio_url")
LLAVA_PLACEHOLDER = "<image>"
HTML_TAGS = ("<img>", "[img]")
"""Placeholders that may be plain text in an item without pictures."""
FOREIGN_PLACEHOLDER = re.compile(
    r"<image>|<video>|<audio>|<img>|\[IMG\]"
    r"|<\|?(?:image|video|audio|vision)_(?:pad|start|placeholder|token)\|?>"
    r"|<\|?(?:image|img|picture|video)_?\d+\|?>"
    r"|<ImageHere>|<im_patch>|<IMG_CONTEXT>|<\|video\|>|<\|audio\|>|<Image>",
)


class ItemError(ValueError):
    """The reason why an item is not in the dataset, as `kind: details`.

    Kinds are counted, so they hold no numbers. Rejects are stored, so a URL in the message loses its user,
    password and query.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


@dataclass(frozen=True)
class Turn:
    """One speaker's text and images."""

    segments: tuple[str, ...]
    """The texts around the images: there is one image between each two of them."""
    trained: bool
    """Whether the model is trained on this turn."""


@dataclass(frozen=True)
class Conversation:
    """A checked item of the input."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...]
    """Paths, URLs or bytes, in the order of the images in the text."""
    turns_left_out: int = 0
    """The turns that an adapter left out."""
    system: Turn | None = None
    """A turn before the others, which is not trained on."""


def brief(value: object, limit: int = 60) -> str:
    """Return a user's value for a message: quoted, shortened, and safe to print."""
    text = repr(_trimmed(value, limit))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@dataclass(frozen=True)
class _Bytes:
    """Stands in for the bytes of a file, which no message quotes."""

    count: int

    def __repr__(self) -> str:
        return f"{self.count} bytes"


def _trimmed(value: object, limit: int, depth: int = 4) -> object:
    """Return what `brief` can show: an item may hold megabytes, or be nested too deeply for repr()."""
    if isinstance(value, str):
        return value[: limit + 1]
    if isinstance(value, bytes):
        return _Bytes(len(value))
    if isinstance(value, list):
        return [_trimmed(part, limit, depth - 1) for part in value[:limit]] if depth else "..."
    if isinstance(value, dict):
        if not depth:
            return "..."
        pairs = itertools.islice(value.items(), limit)
        return {_trimmed(key, limit): _trimmed(part, limit, depth - 1) for key, part in pairs}
    return value


def short_name(source: str | bytes) -> str:
    """Return a name for messages: a path or URL that is not too long, and never the bytes of an image."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes in the item"
    if is_data_url(source):
        text = f"{source[:40]}..."
    else:
        text = source if len(source) <= 300 else f"{source[:300]}..."
    return text if "\0" not in text else repr(text)


def is_data_url(source: str) -> bool:
    """Return whether an image is written into the item as a `data:` URL."""
    return source[:5].lower() == "data:"


# How a JPEG, PNG, GIF, WebP, TIFF, AVIF, JPEG 2000 or BMP begins in base64.
_PICTURE_IN_BASE64 = re.compile(r"/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|AAAA.GZ0eXB|AAAADGpQ|Qk.{6}AAAA")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def _is_bare_base64(source: str) -> bool:
    """Return whether this is a picture in base64 without `data:`. No path is so long without a dot."""
    return _PICTURE_IN_BASE64.match(source) is not None and _BASE64.fullmatch(source) is not None


def decode_data_url(source: str) -> bytes:
    """Return the bytes in a `data:` URL.

    Raises:
        ItemError: it is not valid base64.
    """
    head, comma, text = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ItemError(f"bad base64: {short_name(source)}: expected data:image/...;base64,...")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ItemError(f"bad base64: {short_name(source)}: {error}") from None


def checked_text(value: str, what: str) -> str:
    """Return `value`, or raise ItemError if it cannot be encoded as UTF-8; `what` names it in the message."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ItemError(
            f"text that is not Unicode: {what} holds half of a surrogate pair: {brief(value)}"
        ) from None
    return value


def item_id(item: object, name: str) -> str:
    """Return the item's id, or `name` if it has none."""
    given = item.get("id") if isinstance(item, dict) else None
    if given is None:
        return name
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise ItemError(f"bad id: expected text or a whole number, found {brief(given)}")
    return checked_text(str(given), "the id")


def parse(item: object, name: str, prepend_system: bool = False) -> Conversation:
    """Check one item of the input against the rules in this module's docstring.

    Args:
        item: the item, or the ItemError of the source that could not read it.
        name: the id if the item has none.
        prepend_system: put the text of a system turn before that of the first human turn.

    Raises:
        ItemError: the item breaks a rule.
    """
    if isinstance(item, ItemError):
        raise item
    if not isinstance(item, dict):
        raise ItemError(f"not an item: expected a JSON object, found {brief(item)}")
    name = item_id(item, name)
    raw_turns = item.get("conversations")
    if not isinstance(raw_turns, list) or not raw_turns:
        has_key = "conversations" in item
        found = f"found {brief(raw_turns)}" if has_key else f"the item's keys are {brief(list(item))}"
        raise ItemError(f"no conversations: expected a list of turns under 'conversations', {found}")
    has_system = _is_system(raw_turns[0]) and len(raw_turns) > 1
    if has_system and prepend_system:
        raw_turns, has_system = _with_system_prepended(raw_turns), False
    first = -1 if has_system else 0
    numbered = list(enumerate(raw_turns, first))  # the first human turn is turn 0
    texts = [_text(turn, number, last=number == numbered[-1][0]) for number, turn in numbered]
    images = tuple(_image(image) for image in pictures_of(item))
    texts = _standard_placeholders(texts, len(images))
    written = sum(text.count(IMAGE_PLACEHOLDER) for text in texts if text is not None)
    if written == 0:
        texts[-first] = f"{IMAGE_PLACEHOLDER} " * len(images) + (texts[-first] or "")
    elif written != len(images):
        given = f"{len(images)} image{'s' if len(images) != 1 else ''}"
        raise ItemError(f"image counts differ: {written} {IMAGE_PLACEHOLDER} in the text but {given}")
    turns = tuple(
        Turn(tuple(text.split(IMAGE_PLACEHOLDER)), trained=number > 0 and number % 2 == 1)
        for (number, _), text in zip(numbered, texts, strict=True)
        if text is not None
    )
    left_out = item.get(LEFT_OUT)
    left_out = left_out if isinstance(left_out, int) else 0
    if has_system:
        return Conversation(name, turns[1:], images, left_out, system=turns[0])
    return Conversation(name, turns, images, left_out)


def _is_system(turn: object) -> bool:
    role = turn.get("from") if isinstance(turn, dict) else None
    return isinstance(role, str) and role.lower() == "system"


def _with_system_prepended(turns: list[Any]) -> list[Any]:
    """Put the text of the first turn, the system's, before that of the second, where both are text."""
    system, human, *others = turns
    value = human.get("value") if isinstance(human, dict) else None
    if not isinstance(system.get("value"), str) or not isinstance(value, str):
        return turns
    return [{**human, "value": "\n\n".join(filter(None, (system["value"], value)))}, *others]


def refuse_empty(conversation: Conversation) -> None:
    """Raise ItemError for a turn without text and images. The reference accepts it; it teaches nothing."""
    for number, turn in enumerate(conversation.turns):
        if len(turn.segments) == 1 and not turn.segments[0].strip():
            raise ItemError(f"empty text: turn {number} holds neither text nor an image")


def _text(turn: Any, number: int, last: bool) -> str | None:
    """Return the text of turn `number`; None only for a last assistant turn that is left open."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ItemError(
            f"bad turn: turn {number}: expected an object with 'from' and 'value', found {brief(turn)}"
        )
    role, text = turn["from"], turn["value"]
    if number == -1:  # a system turn
        if not isinstance(text, str):
            raise ItemError(f"turn without text: the system turn: expected text, found {brief(text)}")
        return checked_text(text, "the system turn")
    if not isinstance(role, str) or role.lower() not in ROLES[number % 2]:
        raise ItemError(
            f"wrong turn order: turn {number} is from {brief(role)}, expected '{ROLES[number % 2][0]}'"
        )
    if text is None and last and number % 2 == 1:
        return None
    if not isinstance(text, str):
        raise ItemError(
            f"turn without text: turn {number}: expected text, found {brief(text)}; "
            "only a last gpt turn may be null"
        )
    return checked_text(text, f"turn {number}")


def pictures_of(item: dict[str, Any]) -> list[Any]:
    """Return the images that an item names under any of `PICTURE_KEYS`.

    Raises:
        ItemError: the item names video or audio, or different images under two keys.
    """
    refuse_video_and_audio(item)
    named = {key: images for key in PICTURE_KEYS if (images := _as_list(item.get(key)))}
    if not named:
        return []
    first, *others = named
    for other in others:  # such as the path beside the bytes; different images would be dropped
        if not _same_pictures(named[first], named[other]):
            raise ItemError(f"which pictures: the item names some under '{first}' and others under '{other}'")
    return named[first]


def refuse_video_and_audio(item: dict[str, Any]) -> None:
    """Raise ItemError for an item that names video or audio: its text would be trained on without them."""
    for key, value in item.items():
        if isinstance(key, str) and key.lower() in OTHER_MEDIA and _as_list(value):
            raise ItemError(f"video and audio are not read: the item names some under '{key}'")


def _as_list(value: Any) -> list[Any]:
    """Return a list as it is, nothing for None and "", and a list of one for any other value."""
    if isinstance(value, list):
        return value
    return [] if value is None or (isinstance(value, str) and not value) else [value]


def _same_pictures(some: list[Any], others: list[Any]) -> bool:
    """Return whether two lists may hold the same pictures: file names that differ are different pictures."""
    if len(some) != len(others):
        return False
    for one, other in zip(some, others, strict=True):
        names = _file_name(one), _file_name(other)
        if None not in names and names[0] != names[1]:
            return False
    return True


def _file_name(picture: Any) -> str | None:
    """Return the file name in a picture's path or URL; None for its bytes."""
    if isinstance(picture, dict):
        picture = next((picture[key] for key in ("path", "url") if isinstance(picture.get(key), str)), None)
    if not isinstance(picture, str) or is_data_url(picture) or _is_bare_base64(picture):
        return None
    return picture.partition("?")[0].rpartition("/")[2]


def _standard_placeholders(texts: list[str | None], images: int) -> list[str | None]:
    """Replace `<image>` by `<|image|>` if there are as many as images and no `<|image|>`.

    Raises:
        ItemError: there are other placeholders; the model would learn to write them as text.
    """
    whole = "\n".join(text for text in texts if text is not None)
    found = [match[0] for match in FOREIGN_PLACEHOLDER.finditer(whole)]
    found = [placeholder for placeholder in found if images or placeholder.lower() not in HTML_TAGS]
    if not found:
        return texts
    if found.count(LLAVA_PLACEHOLDER) == len(found) == images and IMAGE_PLACEHOLDER not in whole:
        return [text and text.replace(LLAVA_PLACEHOLDER, IMAGE_PLACEHOLDER) for text in texts]
    counts = f"{len(found)} of them, {images} picture{'s' if images != 1 else ''}"
    is_llava = found[0] == LLAVA_PLACEHOLDER
    hint = ": adapter=sharegpt?" if is_llava else f"; {IMAGE_PLACEHOLDER} stands for a picture"
    raise ItemError(f"placeholder of another format: the text says {found[0]} ({counts}){hint}")


def _image(image: Any) -> str | bytes:
    """Return an image of an item as a path, a URL or its bytes."""
    if isinstance(image, dict):
        if isinstance(text := image.get("base64"), str):
            return f"data:image;base64,{text}"
        image = next((image[key] for key in ("bytes", "path", "url") if image.get(key)), image)
    if isinstance(image, str) and _is_bare_base64(image):
        return f"data:image;base64,{image}"
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise ItemError(f"bad image path: expected a path, a URL or an image's bytes, found {brief(image)}")
    return checked_text(image, "an image path")
