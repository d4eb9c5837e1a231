"""What a model is asked, as the command line and a stage's `samples` say it; checked without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unitoken.codec.conversations import (
    Conversation,
    ItemError,
    brief,
    decode_data_url,
    is_data_url,
    parse,
    short_name,
)
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER


def asked(text: str, images: Sequence[str] = (), name: str = "prompt") -> Conversation:
    """One question; its images stand where it says `<|image|>`, or before it. Raises ConfigError."""
    return conversation_of({"conversations": [{"from": "human", "value": text}], "image": list(images)}, name)


def conversation_of(item: Any, name: str) -> Conversation:
    """An item of the input format, without its last answer. Raises ConfigError."""
    try:
        return parse(_unanswered(item), name)
    except ItemError as error:
        raise ConfigError(f"{name}: {error}") from None


def _unanswered(item: Any) -> Any:
    """What was answered is kept from the model, and so are the images in it."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return item
    item = {**item, "conversations": turns[:-1]}
    answer = turns[-1].get("value") if isinstance(turns[-1], dict) else None
    drawn = answer.count(IMAGE_PLACEHOLDER) if isinstance(answer, str) else 0
    for key in ("image", IMAGE_PLACEHOLDER):
        if drawn and item.get(key) is not None:
            images = item[key] if isinstance(item[key], list) else [item[key]]
            item[key] = images[: max(0, len(images) - drawn)]
    return item


def read_prompts(path: Path) -> list[Conversation]:
    """A .txt with a prompt a line; or a .json list or .jsonl of `{"prompt": ..., "image": [...]}` or items of the input format.

    Images are looked for beside the file. Raises ConfigError.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".json", ".jsonl"):
        raise ConfigError(f"{path}: prompts come from a .txt, a .json or a .jsonl, found '{path.suffix}'")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows puts first
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot read the prompts: {getattr(error, 'strerror', None) or error}"
        ) from None
    if kind == ".txt":
        found = [asked(line, (), name) for name, line in _lines(path, text)]
    elif kind == ".jsonl":
        found = [_prompt(_json(line, name), path.parent, name) for name, line in _lines(path, text)]
    else:
        items = _json(text, str(path))
        if not isinstance(items, list):
            raise ConfigError(f"{path}: expected a list of items, found {brief(items)}")
        found = [_prompt(item, path.parent, f"{path}: item {number}") for number, item in enumerate(items)]
    if not found:
        raise ConfigError(f"{path}: it holds no prompt")
    return found


def _lines(path: Path, text: str) -> list[tuple[str, str]]:
    """Those that say something, by name. JSON may hold what splitlines() takes for the end of a line, as U+2028."""
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{path}:{number}", line.removesuffix("\r")) for number, line in lines if line.strip()]


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not JSON: {error}") from None


def _prompt(item: Any, folder: Path, name: str) -> Conversation:
    if isinstance(item, dict) and isinstance(prompt := item.get("prompt"), str):
        item = {"conversations": [{"from": "human", "value": prompt}], "image": item.get("image")}
    return conversation_of(beside(item, folder), name)


def beside(item: Any, folder: Path) -> Any:
    """An item whose images are named as seen from `folder`."""
    if not isinstance(item, dict):
        return item
    found = {}
    for key in {"image", IMAGE_PLACEHOLDER} & set(item):
        images = item[key] if isinstance(item[key], list) else [item[key]]
        found[key] = [_beside(image, folder) for image in images if image is not None]
    return {**item, **found}


def _beside(image: Any, folder: Path) -> Any:
    if isinstance(image, dict) and isinstance(image.get("path"), str):
        return {**image, "path": _beside(image["path"], folder)}
    plain = isinstance(image, str) and image and not is_data_url(image) and not _is_url(image)
    return str(folder / image) if plain else image


def _is_url(name: str) -> bool:
    return "://" in name


def prompt_text(conversation: Conversation) -> str:
    """The last question."""
    return IMAGE_PLACEHOLDER.join(conversation.turns[-1].segments)


def originals_of(conversation: Conversation) -> list[bytes]:
    """The encoded images. Raises ConfigError."""
    return [_original(image) for image in conversation.images]


def _original(image: str | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return decode_data_url(image) if is_data_url(image) else Path(image).read_bytes()
    except ItemError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{short_name(image)}: cannot read the image: {error.strerror or error}") from None


def files_of(conversations: Sequence[Conversation]) -> list[Path]:
    """The images that are files, all of which are there. Raises ConfigError."""
    named = [
        image for conversation in conversations for image in conversation.images if isinstance(image, str)
    ]
    files = []
    for image in dict.fromkeys(named):
        if is_data_url(image):
            _original(image)
        elif _is_url(image):
            raise ConfigError(
                f"{short_name(image)}: pictures of prompts are not fetched from anywhere: name a file of this machine"
            )
        elif not Path(image).is_file():
            raise ConfigError(f"{short_name(image)}: no such image")
        else:
            files.append(Path(image))
    return files
