"""The documents of a pack as text, with what is trained on marked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import yaml
from rich.text import Text

from unitoken.codec.passages import Passage, describe
from unitoken.codec.text import load_tokenizer
from unitoken.common.cli import printable
from unitoken.common.errors import ConfigError
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import StoreError
from unitoken.streaming_data.sources import StreamSource
from unitoken.train.config import StageConfig

SETTINGS = "settings.yaml"  # of a dataset: with what it was tokenized
MOST_DOCUMENTS = 4
MOST_CHARACTERS = 160  # of a passage; of a longer one the middle is left out
TRAINED = ("{{", "}}")  # around what is trained on, where there are no colours


def find_tokenizer(config: StageConfig, sources: Sequence[StreamSource], vocabulary: Vocabulary) -> Any | str:
    """Return the data's text tokenizer: the stage's or the dataset's own; or why there is none."""
    name = config.codec.tokenizer if config.codec is not None else _tokenizer_of(sources[0])
    if name is None:
        return "codec.tokenizer is not set"
    try:
        tokenizer = load_tokenizer(name)
        loaded = vocabulary.from_tokenizer(tokenizer.get_vocab(), len(vocabulary.image_ids))
    except ConfigError as error:
        return str(error)
    if loaded.fingerprint != vocabulary.fingerprint:
        return f"{name} is not the tokenizer of the data: another vocabulary"
    return tokenizer


def _tokenizer_of(source: StreamSource) -> str | None:
    """Return the tokenizer that a dataset was made with; None if it does not say."""
    store = source.store or open_store(str(source.folder))
    try:
        name = yaml.safe_load(store.read(SETTINGS))["tokenizer"]
    except (StoreError, yaml.YAMLError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def show_documents(
    records: Sequence[Record], streams: Sequence[str], vocabulary: Vocabulary, tokenizer: Any, coloured: bool
) -> list[Text]:
    """Return two lines or more for each of the first documents: its name and sizes, and its text."""
    lines = []
    for record in records[:MOST_DOCUMENTS]:
        trained = int((record.labels() >= 0).sum())
        images = len(record.image_spans)
        head = f"{streams[record.stream]}: {record.id}, {len(record.tokens):,} tokens, {trained:,} trained on"
        head += f", {images} image{'s' if images > 1 else ''}" if images else ""
        lines.append(Text(printable(head), style="bold"))
        lines.append(_text(describe(record, vocabulary, tokenizer), coloured))
    if len(records) > MOST_DOCUMENTS:
        lines.append(Text(f"and {len(records) - MOST_DOCUMENTS:,} more documents", style="dim"))
    return lines


def _text(passages: Sequence[Passage], coloured: bool) -> Text:
    """Return the text of a document, with what is trained on in green or between marks."""
    text = Text("  ")
    for trained, group in itertools.groupby(passages, key=lambda passage: passage.trained):
        marks = TRAINED if trained and not coloured else ("", "")
        text.append(marks[0])
        for passage in group:
            weight = {"image": "bold", "special": "dim"}.get(passage.kind, "")
            text.append(_shortened(passage.text), f"{weight} green" if trained and coloured else weight)
        text.append(marks[1])
    return text


def _shortened(text: str) -> str:
    shown = printable(text.replace("\n", "\\n"))
    half = MOST_CHARACTERS // 2
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:half]} ... {shown[-half:]}"
