"""Prompts from the command line, from files and from a stage's `samples`; read and checked without torch."""

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


def build_prompt(text: str, images: Sequence[str | bytes] = (), name: str = "prompt") -> Conversation:
    """Build a prompt of one human turn.

    Args:
        text: the turn; images take the places of its `<|image|>`, or come before a text that has none.
        images: paths, data as `data:` URLs, or encoded images.
        name: how messages name the prompt.

    Raises:
        ConfigError: the number of images is not that of the placeholders, or the text is not valid.
    """
    return parse_prompt({"conversations": [{"from": "human", "value": text}], "image": list(images)}, name)


def parse_prompt(item: Any, name: str) -> Conversation:
    """Parse an item of the input format as a prompt: without its last answer. Raises ConfigError."""
    try:
        return parse(_without_answer(item), name)
    except ItemError as error:
        raise ConfigError(f"{name}: {error}") from None


def _without_answer(item: Any) -> Any:
    """Remove the last turn of an item that ends with an answer, and the images in it."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns:
        return item
    has_system = isinstance(turns[0], dict) and turns[0].get("from") == "system"
    if (len(turns) - has_system) % 2:
        return item
    item = {**item, "conversations": turns[:-1]}
    answer = turns[-1].get("value") if isinstance(turns[-1], dict) else None
    answer_images = answer.count(IMAGE_PLACEHOLDER) if isinstance(answer, str) else 0
    for key in ("image", IMAGE_PLACEHOLDER):
        if answer_images and item.get(key) is not None:
            images = item[key] if isinstance(item[key], list) else [item[key]]
            item[key] = images[: max(0, len(images) - answer_images)]
    return item


def read_prompts(path: Path) -> list[Conversation]:
    """Read the prompts of a file.

    Args:
        path: a .txt with one prompt per line; or a .json list or a .jsonl of `{"prompt": ..., "image":
            [...]}` or of items of the input format. Paths of images are relative to the file's folder.

    Raises:
        ConfigError: the file can not be read, has no prompt, or a prompt is not valid.
    """
    return [prompt_of_item(item, path.parent, name) for name, item in read_prompt_items(path)]


def read_prompt_items(path: Path) -> list[tuple[str, Any]]:
    """Read the items of a file of prompts, each with its name for messages. Raises ConfigError.

    Args:
        path: a file as in `read_prompts`; its .json may also be an object of items by their ids.
    """
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json", ".jsonl"):
        raise ConfigError(f"{path}: prompts come from a .txt, a .json or a .jsonl, found '{path.suffix}'")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the byte order mark of Windows
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot read the prompts: {getattr(error, 'strerror', None) or error}"
        ) from None
    if suffix == ".txt":
        items: list[tuple[str, Any]] = [(name, {"prompt": line}) for name, line in _named_lines(path, text)]
    elif suffix == ".jsonl":
        items = [(name, _parse_json(line, name)) for name, line in _named_lines(path, text)]
    else:
        items = [
            (f"{path}: item {number}", item)
            for number, item in enumerate(_listed(_parse_json(text, str(path)), path))
        ]
    if not items:
        raise ConfigError(f"{path}: it holds no prompt")
    return items


def _listed(content: Any, path: Path) -> list[Any]:
    """Return a list of items as it is, and of an object of items by their ids the items with these ids."""
    if isinstance(content, dict) and content and all(isinstance(item, dict) for item in content.values()):
        return [{"id": name, **item} for name, item in content.items()]
    if not isinstance(content, list):
        raise ConfigError(f"{path}: expected a list of items, found {brief(content)}")
    return content


def _named_lines(path: Path, text: str) -> list[tuple[str, str]]:
    r"""Split at \n only, as JSON may hold U+2028; return non-empty lines with names for messages."""
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{path}:{number}", line.removesuffix("\r")) for number, line in lines if line.strip()]


def _parse_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not JSON: {error}") from None


def prompt_of_item(item: Any, folder: Path, name: str) -> Conversation:
    """Parse an item of a file in `folder` as a prompt. Raises ConfigError."""
    is_prompt = isinstance(item, dict) and "conversations" not in item
    if is_prompt and isinstance(prompt := item.get("prompt"), str):
        item = {"conversations": [{"from": "human", "value": prompt}], "image": item.get("image")}
    return parse_prompt(resolve_image_paths(item, folder), name)


def resolve_image_paths(item: Any, folder: Path) -> Any:
    """Return an item with the paths of its images taken relative to `folder`."""
    if not isinstance(item, dict):
        return item
    resolved = {}
    for key in {"image", IMAGE_PLACEHOLDER} & set(item):
        images = item[key] if isinstance(item[key], list) else [item[key]]
        resolved[key] = [_resolve_path(image, folder) for image in images if image is not None]
    return {**item, **resolved}


def _resolve_path(image: Any, folder: Path) -> Any:
    if isinstance(image, dict) and isinstance(image.get("path"), str):
        return {**image, "path": _resolve_path(image["path"], folder)}
    is_path = isinstance(image, str) and image and not is_data_url(image) and not _is_url(image)
    return str(folder / image) if is_path else image


def _is_url(name: str) -> bool:
    return "://" in name


def prompt_text(conversation: Conversation) -> str:
    """Return the text of the last human turn."""
    return IMAGE_PLACEHOLDER.join(conversation.turns[-1].segments)


def read_images(conversation: Conversation) -> list[bytes]:
    """Return the encoded images of a prompt. Raises ConfigError."""
    return [read_image(image) for image in conversation.images]


def read_image(image: str | bytes) -> bytes:
    """Return an encoded image, from its path, its inline data, or as it is. Raises ConfigError."""
    if isinstance(image, bytes):
        return image
    try:
        return decode_data_url(image) if is_data_url(image) else Path(image).read_bytes()
    except ItemError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{short_name(image)}: cannot read the image: {error.strerror or error}") from None


def image_files(conversations: Sequence[Conversation]) -> list[Path]:
    """Return the image files of prompts. Raises ConfigError for a missing file, a URL, or bad inline data."""
    names = [
        image for conversation in conversations for image in conversation.images if isinstance(image, str)
    ]
    files = []
    for image in dict.fromkeys(names):
        if is_data_url(image):
            read_image(image)
        elif _is_url(image):
            raise ConfigError(
                f"{short_name(image)}: pictures of prompts are not fetched from anywhere: "
                "name a file of this machine"
            )
        elif not Path(image).is_file():
            raise ConfigError(f"{short_name(image)}: no such image")
        else:
            files.append(Path(image))
    return files
