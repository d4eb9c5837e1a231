"""How the adapters read a raw item: its fields under their many names, its turns, its pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from unitoken.codec.conversations import (
    OTHER_SUFFIXES,
    PICTURE_KEYS,
    PICTURE_SUFFIXES,
    ItemError,
    brief,
    refuse_video_and_audio,
)
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER

Raw = dict[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatbot", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""The standard role for each role in use, in lower case."""
# The names in use for each field, in the order in which they are tried.
PAIR_PICTURE_KEYS = (*PICTURE_SUFFIXES, *PICTURE_KEYS, "file_name", "filename", "filepath", "url")
CAPTION_KEYS = ("txt", "caption", "text", "captions", "vlm_caption", "prompt", "description")
SOURCE_KEYS = (
    *("input_image", "original_image", "source_image", "source_img"),
    *("input", "original", "source", "before"),
)
EDITED_KEYS = (
    *("edited_image", "output_image", "target_image", "target_img"),
    *("edited", "output", "target", "after"),
)
INSTRUCTION_KEYS = (
    *("edit_prompt", "edit_instruction", "instruction", "edit"),
    *("prompt", "txt", "text", "caption"),
)


# --- any item -----------------------------------------------------------------------------------------------


def find_id(raw: Raw) -> Any:
    """Return the item's id. img2dataset's tables have the key that their tars use in `key`."""
    return raw.get("id", raw.get("key"))


def fields_of(raw: Raw) -> Raw:
    """Return the fields by lower-case name, without those that are null.

    Fields in the .json of a tar's sample are among them, unless a file of the sample has the same name.
    """
    nested = raw.get("json")
    merged = {**(nested if isinstance(nested, dict) else {}), **raw}
    return {key.lower(): value for key, value in merged.items() if isinstance(key, str) and value is not None}


def choose_by_id(choices: Sequence[Any], raw: Raw, text: str) -> Any:
    """Choose by a hash of the item's id, or of its text if it has none: each run chooses the same."""
    name = find_id(raw) if find_id(raw) is not None else raw.get("__key__")
    digest = hashlib.sha256(f"{text if name is None else name}".encode(errors="backslashreplace")).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]


def refuse_unreadable_media(raw: Raw) -> None:
    """Raise ItemError for video, audio and unreadable pictures: else their text alone would be trained on."""
    if "__key__" not in raw:
        refuse_video_and_audio(raw)
        return
    others = [suffix for suffix in files_of(raw) if suffix.rpartition(".")[2] in OTHER_SUFFIXES]
    if others:
        raise ItemError(
            f"not a format that is read: {raw['__key__']}.{others[0]}; "
            f"pictures may be {', '.join(PICTURE_SUFFIXES)}"
        )
    if isinstance(nested := raw.get("json"), dict):
        refuse_unreadable_media({key: value for key, value in nested.items() if key != "__key__"})


# --- a tar's sample -----------------------------------------------------------------------------------------


def files_of(raw: Raw) -> list[str]:
    """Return the suffixes of the files of a tar's sample."""
    return [key for key in raw if key != "__key__"]


def picture_files_of(raw: Raw) -> list[str]:
    """Return the suffixes of the pictures of a tar's sample; none for any other item."""
    if "__key__" not in raw:
        return []
    return [suffix for suffix in files_of(raw) if suffix.rpartition(".")[2] in PICTURE_SUFFIXES]


def file_named(raw: Raw, image: Any) -> Any:
    """Return the file of a tar's sample that `image` names: `jpg`, `0.png`, or the file's whole name.

    Any other text is a path or a URL and is returned as it is, and so is an image that is not text.
    """
    if not isinstance(image, str):
        return image
    key = raw["__key__"]
    suffix = image.removeprefix(f"{key}.").removeprefix(f"{key.rpartition('/')[2]}.")
    return raw.get(suffix.lower(), image) if suffix != "__key__" else image


# --- turns --------------------------------------------------------------------------------------------------


def turns_under(item: Raw, key: str) -> list[Raw]:
    """Return the turns under `key` with the standard names for keys and roles.

    `conversations.parse` refuses the turns that are still wrong.
    """
    raw_turns = item.get(key)
    if not isinstance(raw_turns, list) or not raw_turns:
        raise ItemError(
            f"no conversations: expected a list of turns under '{key}', "
            f"the item's keys are {brief(list(item))}"
        )
    return [_standard_turn(turn) for turn in raw_turns]


def _standard_turn(turn: Any) -> Raw:
    if not isinstance(turn, dict):
        raise ItemError(f"bad turn: expected an object, found {brief(turn)}")
    role = turn.get("from") or turn.get("role")
    value = turn.get("value") if turn.get("value") is not None else turn.get("content")
    return {"from": ROLES.get(role.lower(), role) if isinstance(role, str) else role, "value": value}


def question_and_answer(question: Any, answer: Any) -> list[Raw]:
    """Return a human's turn and the assistant's."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def without_greeting(turns: list[Raw]) -> tuple[list[Raw], int]:
    """Leave out an assistant's turn before the first question; return also how many turns that were.

    LLaVA's loader does the same (llava/train/train.py, `preprocess`).
    """
    first = _system_turns(turns)
    roles = [turn["from"] for turn in turns[first : first + 3]]
    if roles != ["gpt", "human", "gpt"]:
        return turns, 0
    return turns[:first] + turns[first + 1 :], 1


def join_system(turns: list[Raw]) -> list[Raw]:
    """Join the system turns before the first human turn to one, where they all are text; drop empty ones."""
    count = _system_turns(turns)
    texts = [turn["value"] for turn in turns[:count]]
    if not 0 < count < len(turns) or turns[count]["from"] != "human":
        return turns
    if not all(isinstance(text, str) or text is None for text in texts):
        return turns
    text = "\n\n".join(filter(None, texts))
    return [*([{"from": "system", "value": text}] if text else []), *turns[count:]]


def _system_turns(turns: list[Raw]) -> int:
    """Return with how many system turns the conversation begins."""
    return next((number for number, turn in enumerate(turns) if turn["from"] != "system"), len(turns))


def text_and_images(parts: list[Any], separate: Iterator[Any]) -> tuple[str, list[Any]]:
    """Join the parts of a message to one text with placeholders, and return it with its images.

    `separate` are the images in a list of their own; a part of type `image` that holds no image takes the
    next of them.
    """
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
            images.append(next(separate, None) if image is None else image)
        else:
            raise ItemError(
                f"bad turn: expected parts of type 'text', 'image_url' or 'image', found {brief(part)}"
            )
    return "".join(texts), images


# --- pictures with a text -----------------------------------------------------------------------------------


def picture_and_caption(raw: Raw) -> tuple[Any, str]:
    """Return the picture and the text of a pair."""
    fields = fields_of(raw)
    status = fields.get("status")
    if status not in (None, "success") and raw.get("jpg") is None and "error_message" in fields:
        raise ItemError(
            f"not downloaded: {brief(fields['error_message'])} (img2dataset's status is {brief(status)})"
        )
    text = _caption(raw, fields)
    files = picture_files_of(raw)
    if len(files) > 1:
        raise ItemError(f"several pictures: expected one, found {brief(files)}")
    return one_picture(raw, fields, PAIR_PICTURE_KEYS), text


def one_picture(raw: Raw, fields: Raw, keys: Sequence[str]) -> Any:
    """Return the picture under the first of `keys` in use, or else the first picture of a tar's sample."""
    key = next((key for key in keys if fields.get(key) not in (None, "", [])), None)
    if key is None:
        files = picture_files_of(raw)
        if files:
            return raw[files[0]]
        raise ItemError(
            f"no picture: expected one under {', '.join(keys)}, found the keys {brief(list(raw))}"
        )
    picture = fields[key]
    if isinstance(picture, list):
        if len(picture) != 1:
            raise ItemError(f"several pictures: expected one, found {len(picture)} under '{key}'")
        picture = picture[0]
    return file_named(raw, picture) if "__key__" in raw else picture


def _caption(raw: Raw, fields: Raw) -> str:
    key = next((key for key in CAPTION_KEYS if key in fields), None)
    if key is None:
        null = [key for key in raw if isinstance(key, str) and key.lower() in CAPTION_KEYS]
        found = f"'{null[0]}' is null" if null else f"found the keys {brief(list(raw))}"
        raise ItemError(f"no caption: expected text under {', '.join(CAPTION_KEYS)}, {found}")
    text = fields[key]
    if isinstance(text, list) and text:  # several captions of one picture
        text = text[0]
    if not isinstance(text, str):
        raise ItemError(f"no caption: expected text under '{key}', found {brief(fields[key])}")
    if not text.strip():
        raise ItemError("empty text: the caption is empty")
    return text.strip()


def instruction(raw: Raw, fields: Raw) -> str:
    """Return the text that says how to edit a picture."""
    text = next((fields[key] for key in INSTRUCTION_KEYS if key in fields), None)
    if isinstance(text, list) and text:
        text = text[0]
    if not isinstance(text, str) or not text.strip():
        raise ItemError(
            f"no instruction: expected text under {', '.join(INSTRUCTION_KEYS)}, "
            f"found the keys {brief(list(raw))}"
        )
    return text.strip()
