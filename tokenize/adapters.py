"""Other formats -> the standard item that `conversations.py` describes.

An adapter is a function from a raw item to a standard one: `{"conversations": [...], "image": [...]}`. The settings name
it: one of `ADAPTERS`, or `path/to/file.py:function` for a user's own. What it raises rejects the item, with its message.

What a raw item is: an object of a JSON list or of a line; a row of a Parquet or Arrow file; of a tar the files of a
sample by their suffix, `{"__key__": "000012", "jpg": bytes, "txt": str, "json": object}`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unitoken.codec.conversations import ItemError, brief
from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.image_files import SUFFIXES
from unitoken.streaming_data.vocabulary import IMAGE_PLACEHOLDER

Raw = dict[str, Any]
Adapter = Callable[[Raw], Raw]

HUMAN, ASSISTANT, SYSTEM = ("human", "user"), ("gpt", "assistant", "chatbot", "model"), ("system", "developer")
PICTURE_KEYS = (*SUFFIXES, "image", "img", "picture", "image_path", "file_name", "image_url", "url")
TEXT_KEYS = ("txt", "caption", "text")

DESCRIBE = (
    "Describe this image.",
    "What does this image show?",
    "Write a caption for this image.",
    "What can be seen in this picture?",
    "Give a description of this picture.",
)
DRAW = (
    "Draw this: {}",
    "Generate an image of this description: {}",
    "Create a picture that shows the following: {}",
    "Paint what this text describes: {}",
    "Make an image for this caption: {}",
)


def standard(raw: Raw) -> Raw:
    """As it is; of a tar's sample its `.json`, with the pictures that it names by their suffix, or else all of them."""
    if "__key__" not in raw:
        return raw
    item = raw.get("json")
    if not isinstance(item, dict):
        raise ItemError(f"no conversations: expected a .json file with an object, the sample's files are {brief(_files(raw))}")
    named = next((key for key in (IMAGE_PLACEHOLDER, "image", "images") if item.get(key) is not None), None)
    if named is None:
        return {**item, "image": [raw[suffix] for suffix in _files(raw) if suffix.rpartition(".")[2] in SUFFIXES]}
    images = item[named] if isinstance(item[named], list) else [item[named]]
    return {**item, named: [_member(raw, image) for image in images]}


def sharegpt(raw: Raw) -> Raw:
    """LLaVA's and ShareGPT's: `<image>` in the text, other names of the roles, and a system turn."""
    item = standard(raw)
    turns = [_turn(turn) for turn in _list(item, "conversations")]
    turns = [{**turn, "value": _with_symbols(turn["value"])} for turn in turns]
    system = [{"from": "system", "value": item["system"]}] if item.get("system") else []
    return {"id": item.get("id"), "conversations": _join_system(system + turns), "image": _images(item)}


def messages(raw: Raw) -> Raw:
    """OpenAI's: `messages` with a `role` and a `content` that is text or a list of parts."""
    item = standard(raw)
    apart = iter(_images(item))
    images: list[Any] = []
    turns = [_turn(message) for message in _list(item, "messages")]
    for turn in turns:
        if isinstance(turn["value"], list):
            turn["value"], inside = _content(turn["value"], apart)
            images += inside
    return {"id": item.get("id"), "conversations": _join_system(turns), "image": [*images, *apart]}


def caption(raw: Raw) -> Raw:
    """A picture and its text -> the model is asked to describe the picture."""
    picture, text = _pair(raw)
    request = _choose(DESCRIBE, raw, text)
    return {"id": raw.get("id"), "conversations": _turns(f"{IMAGE_PLACEHOLDER} {request}", text), "image": [picture]}


def drawing(raw: Raw) -> Raw:
    """A picture and its text -> the model is asked to draw it."""
    picture, text = _pair(raw)
    request = _choose(DRAW, raw, text).format(text)
    return {"id": raw.get("id"), "conversations": _turns(request, IMAGE_PLACEHOLDER), "image": [picture]}


def caption_or_drawing(raw: Raw) -> Raw:
    """Every pair one way: about half are captions, the other half drawings."""
    _, text = _pair(raw)
    way: Adapter = _choose((caption, drawing), raw, text)
    return way(raw)


ADAPTERS: dict[str, Adapter] = {
    "standard": standard,
    "sharegpt": sharegpt,
    "messages": messages,
    "caption": caption,
    "drawing": drawing,
    "caption_or_drawing": caption_or_drawing,
}


def find_adapter(name: str) -> Adapter:
    """The function, made to raise nothing but ItemErrors.

    Raises:
        ConfigError: no such adapter, file or function.
    """
    function = ADAPTERS.get(name) or _load(name)

    def adapter(raw: Raw) -> Raw:
        if not isinstance(raw, dict):
            raise ItemError(f"not an item: expected a JSON object, found {brief(raw)}")
        try:
            return function(raw)
        except ItemError:
            raise
        except Exception as error:  # a user's function may fail in any way
            if type(error) is ValueError:
                raise ItemError(str(error)) from None
            reason = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # rejects are the same in each run
            raise ItemError(f"adapter failed: {type(error).__name__}: {reason[:200]}") from None

    return adapter


def adapter_fingerprint(name: str) -> str:
    """What a dataset keeps of its adapter: a user's function by its name and the content of its file."""
    if name in ADAPTERS:
        return name
    path, function = _parts(name)
    return f"{function} {hashlib.sha256(_source(path)).hexdigest()[:16]}"


# --- a user's own ----------------------------------------------------------------------------------------------------


def _parts(name: str) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"adapter: expected one of {', '.join(ADAPTERS)}, or path/to/file.py:function, found '{name}'")
    return Path(path), function


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"adapter: {path}: cannot be read: {error.strerror}") from None


def _load(name: str) -> Adapter:
    path, function = _parts(name)
    _source(path)
    spec = importlib.util.spec_from_file_location(f"adapter_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file's own
        raise ConfigError(f"adapter: {path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    adapter = getattr(module, function, None)
    if not callable(adapter):
        raise ConfigError(f"adapter: {path}: has no function '{function}'")
    return adapter  # type: ignore[no-any-return]


# --- parts of items --------------------------------------------------------------------------------------------------


def _files(raw: Raw) -> list[str]:
    return [key for key in raw if key != "__key__"]


def _member(raw: Raw, image: Any) -> Any:
    """`jpg`, `0.png`, or the file's whole name; anything else is a path or a URL."""
    if not isinstance(image, str):
        return image
    suffix = image.removeprefix(f"{raw['__key__']}.").removeprefix(f"{raw['__key__'].rpartition('/')[2]}.")
    return raw.get(suffix.lower(), image) if suffix != "__key__" else image


def _list(item: Raw, key: str) -> list[Any]:
    found = item.get(key)
    if not isinstance(found, list) or not found:
        raise ItemError(f"no conversations: expected a list of turns under '{key}', the item's keys are {brief(list(item))}")
    return found


def _images(item: Raw) -> list[Any]:
    found: Any = next((item[key] for key in ("image", "images") if item.get(key) is not None), [])
    return found if isinstance(found, list) else [found]


def _turn(turn: Any) -> Raw:
    """A turn of any of the formats, its role in our words. One that is none is left to `conversations.parse`."""
    if not isinstance(turn, dict):
        raise ItemError(f"bad turn: expected an object, found {brief(turn)}")
    role = turn.get("from") or turn.get("role")
    value = turn.get("value") if turn.get("value") is not None else turn.get("content")
    lower = role.lower() if isinstance(role, str) else None
    role = "human" if lower in HUMAN else "gpt" if lower in ASSISTANT else "system" if lower in SYSTEM else role
    return {"from": role, "value": value}


def _join_system(turns: list[Raw]) -> list[Raw]:
    """What the system says at the beginning becomes the beginning of the first human turn."""
    count = next((number for number, turn in enumerate(turns) if turn["from"] != "system"), len(turns))
    texts = [turn["value"] for turn in turns[: count + 1]]
    if not 0 < count < len(turns) or turns[count]["from"] != "human" or not all(isinstance(text, str) for text in texts):
        return turns
    return [{"from": "human", "value": "\n\n".join(text for text in texts if text)}, *turns[count + 1 :]]


def _with_symbols(value: Any) -> Any:
    return value.replace("<image>", IMAGE_PLACEHOLDER) if isinstance(value, str) else value


def _content(parts: list[Any], apart: Iterator[Any]) -> tuple[str, list[Any]]:
    """The parts of a message as one text, and its images; `apart` are those that stand in a list of their own."""
    texts: list[str] = []
    images: list[Any] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            image = next((part[key] for key in (kind, "url", "path") if part.get(key) is not None), None)
            image = image.get("url", image) if isinstance(image, dict) else image
            texts.append(IMAGE_PLACEHOLDER)
            images.append(next(apart, None) if image is None else image)
        else:
            raise ItemError(f"bad turn: expected parts of type 'text', 'image_url' or 'image', found {brief(part)}")
    return "".join(texts), images


def _turns(question: str, answer: str) -> list[Raw]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _pair(raw: Raw) -> tuple[Any, str]:
    """The picture and the text, under one of the names in use (in any case)."""
    fields = {key.lower(): value for key, value in raw.items() if value is not None}
    nested = fields.get("json")
    if isinstance(nested, dict):
        fields = {key.lower(): value for key, value in nested.items() if value is not None} | fields
    picture = next((fields[key] for key in PICTURE_KEYS if key in fields), None)
    text = next((fields[key] for key in TEXT_KEYS if key in fields), None)
    if picture is None:
        raise ItemError(f"no picture: expected one under {', '.join(PICTURE_KEYS)}, found the keys {brief(list(raw))}")
    if not isinstance(text, str):
        raise ItemError(f"no caption: expected text under {', '.join(TEXT_KEYS)}, found the keys {brief(list(raw))}")
    if not text.strip():
        raise ItemError("empty text: the caption is empty")
    return picture, text.strip()


def _choose(choices: Sequence[Any], raw: Raw, text: str) -> Any:
    """By a hash of the item's id, or of its text where it has none: the same in each run, and not by its place."""
    name = raw.get("id", raw.get("__key__"))
    digest = hashlib.sha256(f"{text if name is None else name}".encode(errors="backslashreplace")).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]
