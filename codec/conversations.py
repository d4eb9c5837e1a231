"""The input format and its rules: a raw item -> `Conversation`, or `ItemError` with the reason.

    {"id": "a1",                                                         # optional; else the place in the input
     "conversations": [{"from": "human", "value": "What is it? <|image|>"}, {"from": "gpt", "value": "A cat."}],
     "image": ["cat.jpg"]}                                               # one image or a list; may be omitted

An image is a path, a URL (`data:` too), its bytes, {"base64": text}, or {"bytes": ..., "path": ...} as Hugging Face's
`datasets` stores it.

Turns alternate, human first. Every `<|image|>` stands for one image, in order; if none is written, the images stand
before the first human turn. `<image>` is read as `<|image|>` where there are as many as images. The
last assistant turn may be null: it is what a model would be asked for.
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

ROLES = (("human",), ("gpt", "assistant"))  # by the turn's place, in any case
PICTURE_KEYS = (  # the symbol itself is a key the reference knows, too
    *(
        IMAGE_PLACEHOLDER,
        "image",
        "images",
        "image_path",
        "image_paths",
        "image_file",
        "image_files",
        "image_url",
        "image_urls",
    ),
    *("img", "imgs", "img_path", "img_paths", "img_url", "picture", "pictures", "photo", "photos"),
)
PICTURE_SUFFIXES = (  # of files in the formats that image_files.py reads
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpx", "jpf", "pbm", "pgm", "ppm", "pnm"),
)
OTHER_SUFFIXES = (  # of tars: what is seen or heard, and not read
    *("heic", "heif", "jxl", "svg", "psd", "eps", "pdf", "ico", "dds", "tga", "exr", "hdr", "raw", "dng"),
    *("dib", "j2c", "jpm", "jpg_large"),
    *("mp4", "webm", "avi", "mov", "mkv", "mpeg", "mpg", "mp3", "wav", "flac", "ogg", "opus", "m4a"),
)
OTHER_MEDIA = ("video", "videos", "video_path", "video_url", "audio", "audios", "audio_path", "audio_url")
LLAVA_PLACEHOLDER = "<image>"
TAGS_OF_HTML = ("<img>", "[img]")  # may be meant as such in a text without pictures
FOREIGN_PLACEHOLDER = re.compile(
    r"<image>|<video>|<audio>|<img>|\[IMG\]|<\|?(?:image|video|audio|vision)_(?:pad|start|placeholder|token)\|?>"
    r"|<\|?(?:image|img|picture|video)_?\d+\|?>|<ImageHere>|<im_patch>|<IMG_CONTEXT>|<\|video\|>|<\|audio\|>|<Image>",
)


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
    images: tuple[
        str | bytes, ...
    ]  # paths, URLs or the bytes, in the order in which the images stand in the text
    turns_left_out: int = 0  # by an adapter


def brief(value: object, limit: int = 60) -> str:
    """A user's value for a message: quoted, cut, and safe to print."""
    text = repr(_trimmed(value, limit))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@dataclass(frozen=True)
class _Bytes:
    """In place of a file's bytes, which no message quotes."""

    count: int

    def __repr__(self) -> str:
        return f"{self.count} bytes"


def _trimmed(value: object, limit: int, depth: int = 4) -> object:
    """As much of `value` as can show: an item may hold a picture's bytes, or be nested deeper than repr() can follow."""
    if isinstance(value, str):
        return value[: limit + 1]
    if isinstance(value, bytes):
        return _Bytes(len(value))
    if isinstance(value, list):
        return [_trimmed(part, limit, depth - 1) for part in value[:limit]] if depth else "..."
    if isinstance(value, dict):
        pairs = itertools.islice(value.items(), limit)
        return (
            {_trimmed(key, limit): _trimmed(part, limit, depth - 1) for key, part in pairs}
            if depth
            else "..."
        )
    return value


def shown(source: str | bytes) -> str:
    """An image's name for messages: never its bytes."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes in the item"
    text = (
        f"{source[:40]}..." if is_inline(source) else source if len(source) <= 300 else f"{source[:300]}..."
    )
    return text if "\0" not in text else repr(text)


def is_inline(source: str) -> bool:
    return source[:5].lower() == "data:"


# What the base64 of a JPEG, PNG, GIF, WebP, TIFF, AVIF, JPEG 2000 or BMP begins with.
_PICTURE_IN_BASE64 = re.compile(r"/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|AAAA.GZ0eXB|AAAADGpQ|Qk.{6}AAAA")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def _is_bare_base64(source: str) -> bool:
    """A picture's bytes without `data:image/...;base64,` before them. No path: so long, without a dot."""
    return _PICTURE_IN_BASE64.match(source) is not None and _BASE64.fullmatch(source) is not None


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
        raise ItemError(
            f"text that is not Unicode: {what} holds half of a surrogate pair: {brief(value)}"
        ) from None
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
        found = (
            f"found {brief(raw_turns)}"
            if "conversations" in item
            else f"the item's keys are {brief(list(item))}"
        )
        raise ItemError(f"no conversations: expected a list of turns under 'conversations', {found}")
    texts = [_text(turn, number, last=number == len(raw_turns) - 1) for number, turn in enumerate(raw_turns)]
    images = tuple(_image(image) for image in pictures_of(item))
    texts = _with_our_placeholders(texts, len(images))
    written = sum(text.count(IMAGE_PLACEHOLDER) for text in texts if text is not None)
    if written == 0:
        texts[0] = f"{IMAGE_PLACEHOLDER} " * len(images) + (texts[0] or "")
    elif written != len(images):
        given = f"{len(images)} image{'s' if len(images) != 1 else ''}"
        raise ItemError(f"image counts differ: {written} {IMAGE_PLACEHOLDER} in the text but {given}")
    turns = tuple(
        Turn(tuple(text.split(IMAGE_PLACEHOLDER)), trained=number % 2 == 1)
        for number, text in enumerate(texts)
        if text is not None
    )
    left_out = item.get(LEFT_OUT)
    return Conversation(name, turns, images, left_out if isinstance(left_out, int) else 0)


def refuse_empty(conversation: Conversation) -> None:
    """The reference takes turns without any text; a model learns nothing good from them."""
    for number, turn in enumerate(conversation.turns):
        if len(turn.segments) == 1 and not turn.segments[0].strip():
            raise ItemError(f"empty text: turn {number} holds neither text nor an image")


def _text(turn: Any, number: int, last: bool) -> str | None:
    """The text of turn `number`; None only for a last assistant turn that is left open."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ItemError(
            f"bad turn: turn {number}: expected an object with 'from' and 'value', found {brief(turn)}"
        )
    role, text = turn["from"], turn["value"]
    if not isinstance(role, str) or role.lower() not in ROLES[number % 2]:
        raise ItemError(
            f"wrong turn order: turn {number} is from {brief(role)}, expected '{ROLES[number % 2][0]}'"
        )
    if text is None and last and number % 2 == 1:
        return None
    if not isinstance(text, str):
        raise ItemError(
            f"turn without text: turn {number}: expected text, found {brief(text)}; only a last gpt turn may be null"
        )
    return checked_text(text, f"turn {number}")


def pictures_of(item: dict[str, Any]) -> list[Any]:
    """What an item names as its pictures, under any of the names in use. Raises ItemError where it is not plain which."""
    refuse_video_and_audio(item)
    named = {key: found for key in PICTURE_KEYS if (found := _listed(item.get(key)))}
    if not named:
        return []
    first, *others = named
    for other in others:  # such as the path beside the bytes; what differs would be dropped
        if not _same_pictures(named[first], named[other]):
            raise ItemError(f"which pictures: the item names some under '{first}' and others under '{other}'")
    return named[first]


def refuse_video_and_audio(item: dict[str, Any]) -> None:
    for key, value in item.items():
        if isinstance(key, str) and key.lower() in OTHER_MEDIA and _listed(value):
            raise ItemError(f"video and audio are not read: the item names some under '{key}'")


def _listed(value: Any) -> list[Any]:
    """None, "" and [] name nothing."""
    return (
        value
        if isinstance(value, list)
        else []
        if value is None or (isinstance(value, str) and not value)
        else [value]
    )


def _same_pictures(some: list[Any], others: list[Any]) -> bool:
    """As far as their names tell: a path and a URL may be of the same picture, two paths with other file names are not."""

    def name(picture: Any) -> str | None:
        if isinstance(picture, dict):
            picture = next(
                (picture[key] for key in ("path", "url") if isinstance(picture.get(key), str)), None
            )
        if not isinstance(picture, str) or is_inline(picture) or _is_bare_base64(picture):
            return None
        return picture.partition("?")[0].rpartition("/")[2]

    if len(some) != len(others):
        return False
    return all(None in (name(a), name(b)) or name(a) == name(b) for a, b in zip(some, others, strict=True))


def _with_our_placeholders(texts: list[str | None], images: int) -> list[str | None]:
    """`<image>` becomes `<|image|>` where there are as many as pictures and none of ours.

    Raises ItemError for other placeholders of other formats: trained on as text they would be learnt as text.
    """
    found = [match[0] for text in texts if text is not None for match in FOREIGN_PLACEHOLDER.finditer(text)]
    found = [one for one in found if images or one.lower() not in TAGS_OF_HTML]
    if not found:
        return texts
    ours = sum(text.count(IMAGE_PLACEHOLDER) for text in texts if text is not None)
    if found.count(LLAVA_PLACEHOLDER) == len(found) == images and not ours:
        return [text and text.replace(LLAVA_PLACEHOLDER, IMAGE_PLACEHOLDER) for text in texts]
    counts = f"{len(found)} of them, {images} picture{'s' if images != 1 else ''}"
    hint = (
        ": adapter=sharegpt?"
        if found[0] == LLAVA_PLACEHOLDER
        else f"; {IMAGE_PLACEHOLDER} stands for a picture"
    )
    raise ItemError(f"placeholder of another format: the text says {found[0]} ({counts}){hint}")


def _image(image: Any) -> str | bytes:
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
