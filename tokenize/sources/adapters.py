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

from unitoken.codec.conversations import (
    OTHER_SUFFIXES,
    PICTURE_KEYS,
    PICTURE_SUFFIXES,
    ItemError,
    brief,
    pictures_of,
    refuse_video_and_audio,
)
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import fingerprint
from unitoken.dataset.manifest import LEFT_OUT
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER

Raw = dict[str, Any]
Adapter = Callable[[Raw], Raw]

HUMAN, ASSISTANT, SYSTEM = (
    ("human", "user"),
    ("gpt", "assistant", "chatbot", "model"),
    ("system", "developer"),
)
NAMES_OF_PICTURES = (
    *PICTURE_SUFFIXES,
    *PICTURE_KEYS,
    "file_name",
    "filename",
    "filepath",
    "url",
)  # of a pair, in this order
TEXT_KEYS = ("txt", "caption", "text", "captions", "vlm_caption", "prompt", "description")
SOURCE_KEYS = (
    "input_image",
    "original_image",
    "source_image",
    "source_img",
    "input",
    "original",
    "source",
    "before",
)
EDITED_KEYS = (
    "edited_image",
    "output_image",
    "target_image",
    "target_img",
    "edited",
    "output",
    "target",
    "after",
)
INSTRUCTION_KEYS = (
    "edit_prompt",
    "edit_instruction",
    "instruction",
    "edit",
    "prompt",
    "txt",
    "text",
    "caption",
)

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
    """As it is; of a tar's sample its `.json`, with the pictures that it names by their suffix, or else all of them.

    `texts: [{"user": ..., "assistant": ...}]` are turns, too (The Cauldron).
    """
    item = raw
    if "__key__" in raw:
        found = raw.get("json")
        if not isinstance(found, dict):
            raise ItemError(
                f"no conversations: expected a .json file with an object, the sample's files are {brief(_files(raw))}"
            )
        named = pictures_of(found)
        others = {key: value for key, value in found.items() if key not in PICTURE_KEYS}
        says_none = any(isinstance(found.get(key), list) for key in PICTURE_KEYS)
        item = {
            **others,
            "image": [_member(raw, image) for image in named] if named or says_none else _pictures(raw),
        }
    if "conversations" not in item and isinstance(item.get("texts"), list):
        pairs = [pair if isinstance(pair, dict) else {} for pair in item["texts"]]
        turns = [turn for pair in pairs for turn in _turns(pair.get("user"), pair.get("assistant"))]
        item = {**{key: value for key, value in item.items() if key != "texts"}, "conversations": turns}
    return item


def sharegpt(raw: Raw) -> Raw:
    """LLaVA's and ShareGPT's: `<image>` in the text, other names of the roles, a system turn, a greeting by the assistant."""
    item = standard(raw)
    turns = [_turn(turn) for turn in _list(item, "conversations")]
    turns = [{**turn, "value": _with_symbols(turn["value"])} for turn in turns]
    system = [{"from": "system", "value": item["system"]}] if item.get("system") else []
    turns, left_out = _from_the_first_question(system + turns)
    return {
        "id": item.get("id"),
        "conversations": _join_system(turns),
        "image": pictures_of(item),
        LEFT_OUT: left_out,
    }


def messages(raw: Raw) -> Raw:
    """OpenAI's: `messages` with a `role` and a `content` that is text or a list of parts."""
    item = standard(raw)
    apart = iter(pictures_of(item))
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
    return {
        "id": _id(raw),
        "conversations": _turns(f"{IMAGE_PLACEHOLDER} {request}", text),
        "image": [picture],
    }


def drawing(raw: Raw) -> Raw:
    """A picture and its text -> the model is asked to draw it."""
    picture, text = _pair(raw)
    request = _choose(DRAW, raw, text).format(text)
    return {"id": _id(raw), "conversations": _turns(request, IMAGE_PLACEHOLDER), "image": [picture]}


def caption_or_drawing(raw: Raw) -> Raw:
    """Every pair one way: about half are captions, the other half drawings."""
    _, text = _pair(raw)
    way: Adapter = _choose((caption, drawing), raw, text)
    return way(raw)


def editing(raw: Raw) -> Raw:
    """A picture and an instruction -> the model is asked to draw the edited picture (InstructPix2Pix, MagicBrush)."""
    fields = _fields(raw)
    for key in _files(raw) if "__key__" in raw else []:  # of a tar: x.input.jpg, x.edited.jpg
        if key.rpartition(".")[2] in PICTURE_SUFFIXES:
            fields[key.rpartition(".")[0]] = raw[key]
    source, edited = _one_picture(raw, fields, SOURCE_KEYS), _one_picture(raw, fields, EDITED_KEYS)
    name = next((key for key in INSTRUCTION_KEYS if key in fields), None)
    text = fields[name] if name is not None else None
    text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str) or not text.strip():
        raise ItemError(
            f"no instruction: expected text under {', '.join(INSTRUCTION_KEYS)}, found the keys {brief(list(raw))}"
        )
    turns = _turns(f"{IMAGE_PLACEHOLDER} {text.strip()}", IMAGE_PLACEHOLDER)
    return {"id": _id(raw), "conversations": turns, "image": [source, edited]}


ADAPTERS: dict[str, Adapter] = {
    "standard": standard,
    "sharegpt": sharegpt,
    "messages": messages,
    "caption": caption,
    "drawing": drawing,
    "caption_or_drawing": caption_or_drawing,
    "editing": editing,
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
        if name in ADAPTERS:
            _refuse_what_is_not_read(raw)
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
    return f"{function} {fingerprint(_source(path))}"


# --- a user's own ----------------------------------------------------------------------------------------------------


def _parts(name: str) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise ConfigError(
            f"adapter: expected one of {', '.join(ADAPTERS)}, or path/to/file.py:function, found '{name}'"
        )
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
        raise ConfigError(
            f"adapter: {path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    adapter = getattr(module, function, None)
    if not callable(adapter):
        raise ConfigError(f"adapter: {path}: has no function '{function}'")
    return adapter  # type: ignore[no-any-return]


# --- parts of items --------------------------------------------------------------------------------------------------


def _refuse_what_is_not_read(raw: Raw) -> None:
    """Videos, sounds and pictures of other formats are named, not left out: their texts would be trained on alone."""
    if "__key__" not in raw:
        refuse_video_and_audio(raw)
        return
    if others := [key for key in _files(raw) if key.rpartition(".")[2] in OTHER_SUFFIXES]:
        raise ItemError(
            f"not a format that is read: {raw['__key__']}.{others[0]}; pictures may be {', '.join(PICTURE_SUFFIXES)}"
        )
    if isinstance(nested := raw.get("json"), dict):
        _refuse_what_is_not_read({key: value for key, value in nested.items() if key != "__key__"})


def _pictures(raw: Raw) -> list[Any]:
    return [raw[suffix] for suffix in _files(raw) if suffix.rpartition(".")[2] in PICTURE_SUFFIXES]


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
        raise ItemError(
            f"no conversations: expected a list of turns under '{key}', the item's keys are {brief(list(item))}"
        )
    return found


def _turn(turn: Any) -> Raw:
    """A turn of any of the formats, its role in our words. One that is none is left to `conversations.parse`."""
    if not isinstance(turn, dict):
        raise ItemError(f"bad turn: expected an object, found {brief(turn)}")
    role = turn.get("from") or turn.get("role")
    value = turn.get("value") if turn.get("value") is not None else turn.get("content")
    lower = role.lower() if isinstance(role, str) else None
    role = (
        "human" if lower in HUMAN else "gpt" if lower in ASSISTANT else "system" if lower in SYSTEM else role
    )
    return {"from": role, "value": value}


def _from_the_first_question(turns: list[Raw]) -> tuple[list[Raw], int]:
    """Without a `gpt` turn that stands before it, as LLaVA's loader does (train.py, `preprocess`); and how many these are."""
    first = next((number for number, turn in enumerate(turns) if turn["from"] != "system"), len(turns))
    roles = [turn["from"] for turn in turns[first : first + 3]]
    if roles != ["gpt", "human", "gpt"]:
        return turns, 0
    return turns[:first] + turns[first + 1 :], 1


def _join_system(turns: list[Raw]) -> list[Raw]:
    """What the system says at the beginning becomes the beginning of the first human turn."""
    count = next((number for number, turn in enumerate(turns) if turn["from"] != "system"), len(turns))
    texts = [turn["value"] for turn in turns[: count + 1]]
    if (
        not 0 < count < len(turns)
        or turns[count]["from"] != "human"
        or not all(isinstance(text, str) for text in texts)
    ):
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
            raise ItemError(
                f"bad turn: expected parts of type 'text', 'image_url' or 'image', found {brief(part)}"
            )
    return "".join(texts), images


def _turns(question: Any, answer: Any) -> list[Raw]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _fields(raw: Raw) -> Raw:
    """By lower-case name, with those of a tar's .json where no file has the name; what is null is left out."""
    nested = raw.get("json")
    merged = {**(nested if isinstance(nested, dict) else {}), **raw}
    return {key.lower(): value for key, value in merged.items() if isinstance(key, str) and value is not None}


def _pair(raw: Raw) -> tuple[Any, str]:
    """The picture and the text, under one of the names in use (in any case)."""
    fields = _fields(raw)
    if (
        (status := fields.get("status")) not in (None, "success")
        and raw.get("jpg") is None
        and "error_message" in fields
    ):
        raise ItemError(
            f"not downloaded: {brief(fields['error_message'])} (img2dataset's status is {brief(status)})"
        )
    text = _caption(raw, fields)
    return _one_picture(raw, fields, NAMES_OF_PICTURES), text


def _one_picture(raw: Raw, fields: Raw, names: Sequence[str]) -> Any:
    files = (
        [key for key in _files(raw) if key.rpartition(".")[2] in PICTURE_SUFFIXES] if "__key__" in raw else []
    )
    if len(files) > 1 and names is NAMES_OF_PICTURES:
        raise ItemError(f"several pictures: expected one, found {brief(files)}")
    name = next((key for key in names if fields.get(key) not in (None, "", [])), None)
    if name is None and files:
        return raw[files[0]]
    if name is None:
        raise ItemError(
            f"no picture: expected one under {', '.join(names)}, found the keys {brief(list(raw))}"
        )
    picture = fields[name]
    if isinstance(picture, list):
        if len(picture) != 1:
            raise ItemError(f"several pictures: expected one, found {len(picture)} under '{name}'")
        picture = picture[0]
    return _member(raw, picture) if "__key__" in raw else picture


def _caption(raw: Raw, fields: Raw) -> str:
    name = next((key for key in TEXT_KEYS if key in fields), None)
    if name is None:
        null = [key for key in raw if isinstance(key, str) and key.lower() in TEXT_KEYS]
        found = f"'{null[0]}' is null" if null else f"found the keys {brief(list(raw))}"
        raise ItemError(f"no caption: expected text under {', '.join(TEXT_KEYS)}, {found}")
    text = fields[name]
    if isinstance(text, list) and text:  # several captions of one picture
        text = text[0]
    if not isinstance(text, str):
        raise ItemError(f"no caption: expected text under '{name}', found {brief(fields[name])}")
    if not text.strip():
        raise ItemError("empty text: the caption is empty")
    return text.strip()


def _id(raw: Raw) -> Any:
    """img2dataset's tables have their tars' names in `key`."""
    return raw.get("id", raw.get("key"))


def _choose(choices: Sequence[Any], raw: Raw, text: str) -> Any:
    """By a hash of the item's id, or of its text where it has none: the same in each run, and not by its place."""
    name = _id(raw) if _id(raw) is not None else raw.get("__key__")
    digest = hashlib.sha256(f"{text if name is None else name}".encode(errors="backslashreplace")).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]
