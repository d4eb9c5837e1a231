"""An input file -> numbered chunks of items. The borders depend on the input and `chunk_size` alone.

A `.jsonl` file holds an item a line, anything else one JSON list. The whole file is read into memory (about 1.7 times
its size, in each process).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from unitoken.streaming_data.config import ConfigError
from unitoken.tokenize.conversations import ItemError, brief


@dataclass(frozen=True)
class Chunk:
    number: int
    start: int  # position in the input of the first item
    items: list[object]

    @property
    def name(self) -> str:
        return chunk_name(self.number)


def chunk_name(number: int) -> str:
    return f"chunk-{number:06d}"


def chunk_count(items: int, chunk_size: int) -> int:
    return -(-items // chunk_size)


def cut(items: list[object], chunk_size: int, number: int) -> Chunk:
    start = number * chunk_size
    return Chunk(number, start, items[start : start + chunk_size])


def load_items(path: Path) -> list[object]:
    """Every item of the input. A line of a JSONL file that can not be read becomes a `ItemError` in its place.

    Raises:
        ConfigError: the file is missing, is no JSON, or holds no items.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        items = _lines(text) if path.suffix == ".jsonl" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the input: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    except (ValueError, RecursionError) as error:
        hint = "; one item a line is read from files named .jsonl" if "Extra data" in str(error) else ""
        raise ConfigError(f"{path}: not readable as JSON: {error}{hint}") from None
    if not isinstance(items, list):
        raise ConfigError(f"{path}: expected a JSON list of items, found {_kind(items)}")
    if not items:
        raise ConfigError(f"{path}: holds no items")
    return items


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {brief(list(value))}"
    return brief(value)


def _lines(text: str) -> list[object]:
    items: list[object] = []
    for line in text.split("\n"):  # not splitlines(): U+2028 may stand inside a JSON text
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                items.append(ItemError(f"not readable as JSON: {error}: {brief(line)}"))
    return items
