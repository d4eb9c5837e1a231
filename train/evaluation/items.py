"""Prompts of a task with their expected answers, and the hash of both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitoken.codec.conversations import Conversation
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER
from unitoken.train.generation.prompts import image_files, prompt_of_item, read_images, read_prompt_items

ANSWERING = ("gpt", "assistant")
"""The roles whose last turn is the expected answer."""


@dataclass(frozen=True)
class TaskItem:
    """A prompt.

    Attributes:
        name: for messages.
        fields: the item as it stands in the file.
        prompt: without the item's own answer.
        answers: the expected answers: `answers` or `answer` of the item, or else the text of its last turn.
    """

    name: str
    fields: dict[str, Any]
    prompt: Conversation
    answers: tuple[str, ...]

    @property
    def id(self) -> str | None:
        """The item's own id; None without one."""
        return None if self.fields.get("id") is None else str(self.fields["id"])


def read_task_items(path: Path, limit: int | None = None) -> list[TaskItem]:
    """Read the prompts of a task.

    Args:
        path: a file as `read_prompt_items` takes, or a folder of .txt files with a prompt each.
        limit: the most prompts; None: all.

    Raises:
        ConfigError: it can not be read, or an item is not a prompt.
    """
    named = _read_text_files(path) if path.is_dir() else read_prompt_items(path)
    folder = path if path.is_dir() else path.parent
    items = [_task_item(item, folder, name) for name, item in named[:limit]]
    image_files([item.prompt for item in items])
    return items


def _read_text_files(folder: Path) -> list[tuple[str, Any]]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ConfigError(f"{folder}: no .txt files with prompts in it")
    try:
        return [
            (str(file), {"id": file.stem, "prompt": file.read_text(encoding="utf-8").strip()})
            for file in files
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}: cannot read the prompts: {error}") from None


def _task_item(item: Any, folder: Path, name: str) -> TaskItem:
    prompt = prompt_of_item(item, folder, name)
    return TaskItem(name, item, prompt, tuple(_answers_of(item, name)))


def _answers_of(item: dict[str, Any], name: str) -> list[str]:
    texts: list[Any]
    if "answers" in item:
        given = item["answers"] if isinstance(item["answers"], list) else [item["answers"]]
        texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    elif "answer" in item:
        texts = [item["answer"]]
    else:
        turns = item.get("conversations") or [{}]
        value = turns[-1].get("value") if str(turns[-1].get("from", "")).lower() in ANSWERING else None
        texts = [value.replace(IMAGE_PLACEHOLDER, "").strip()] if isinstance(value, str) else []
        return [text for text in texts if text]
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"{name}: answers: expected texts, found {json.dumps(text)[:60]}")
    return texts


def hash_items(items: list[TaskItem]) -> str:
    """Return the SHA-256 of all prompts, their pictures' bytes included, and of what is expected of them."""
    digest = hashlib.sha256()
    for item in items:
        turns = [item.prompt.system] if item.prompt.system else []
        content = [[turn.segments for turn in [*turns, *item.prompt.turns]], item.answers, item.id]
        digest.update(json.dumps(content).encode())
        for image in read_images(item.prompt):
            digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()
