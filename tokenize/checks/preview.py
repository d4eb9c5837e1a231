"""Show records as text: what a person looks at before training on a dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import VOCABULARY, Manifest, read_manifest
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import SPECIAL_NAMES, Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import Store
from unitoken.tokenize.checks.verify_chunks import read_root_index


class Passage(NamedTuple):
    """Successive tokens of a record, as text."""

    kind: Literal["text", "special", "image"]
    text: str  # a special token's name; `[image HxW]` in latents
    trained: bool  # whether the tokens are trained on


def describe(record: Record, vocabulary: Vocabulary, tokenizer: Any) -> list[Passage]:
    """Cut a record into passages, in order."""
    trained = record.labels() >= 0
    special_names = names_of_turns(vocabulary, tokenizer)
    images = {
        int(start): (int(end), f"[image {height}x{width}]")
        for start, end, height, width in record.image_spans
    }

    def is_text(position: int) -> bool:
        return position not in images and int(record.tokens[position]) not in special_names

    passages: list[Passage] = []
    position = 0
    while position < len(record.tokens):
        token, is_trained = int(record.tokens[position]), bool(trained[position])
        if position in images:
            end, text = images[position]
            passages.append(Passage("image", text, is_trained))
        elif token in special_names:
            end = position + 1
            passages.append(Passage("special", special_names[token], is_trained))
        else:
            end = position
            while end < len(record.tokens) and is_text(end) and trained[end] == is_trained:
                end += 1
            ids = np.asarray(record.tokens[position:end], np.int64).tolist()
            passages.append(Passage("text", tokenizer.decode(ids), is_trained))
        position = end
    return passages


def names_of_turns(vocabulary: Vocabulary, tokenizer: Any) -> dict[int, str]:
    """Return the names of the special tokens that stand between turns, by their ids."""
    if vocabulary.layout is None:
        return {getattr(vocabulary, name): token for name, token in SPECIAL_NAMES.items()}
    names = {token: name for name, token in vocabulary.layout.names}
    ids = vocabulary.conversation.special_ids()
    return {token: names.get(token) or tokenizer.convert_ids_to_tokens(token) for token in ids}


class Dataset(NamedTuple):
    """An opened dataset with the text tokenizer that made it."""

    store: Store
    manifest: Manifest
    vocabulary: Vocabulary
    tokenizer: Any


def open_dataset(out: str, tokenizer_name: str) -> Dataset:
    """Open a dataset.

    Args:
        out: its path or URL.
        tokenizer_name: folder or hub id of the text tokenizer that it was made with.

    Raises:
        ConfigError: no dataset, or it was made with another tokenizer.
    """
    store = open_store(out)
    manifest = read_manifest(store)
    vocabulary = Vocabulary.parse(store.read(VOCABULARY), f"{out}/{VOCABULARY}")

    from unitoken.codec.text import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_name)
    found = vocabulary.from_tokenizer(tokenizer.get_vocab(), len(vocabulary.image_ids)).fingerprint
    if found != manifest.vocabulary:
        raise ConfigError(
            f"{out}: was made with another tokenizer: its vocabulary is {manifest.vocabulary}, "
            f"{tokenizer_name}'s is {found}"
        )
    return Dataset(store, manifest, vocabulary, tokenizer)


def show_samples(out: str, tokenizer_name: str, count: int) -> None:
    """Print the first samples of a dataset.

    Args:
        out: path or URL of the dataset.
        tokenizer_name: folder or hub id of its text tokenizer.
        count: how many samples.
    """
    dataset = open_dataset(out, tokenizer_name)

    from rich.console import Console
    from rich.text import Text

    console = Console()
    for record in itertools.islice(read_records(dataset.store), count):
        targets = int((record.labels() >= 0).sum())
        head = f"{record.id}: {len(record.tokens)} tokens, {targets} trained on, {len(record.images)} images"
        line = Text(f"{head}\n  ", style="bold")
        for passage in describe(record, dataset.vocabulary, dataset.tokenizer):
            line.append(passage.text, style=_style(passage))
        console.print(line, soft_wrap=True)


def _style(passage: Passage) -> str:
    colour = "green" if passage.trained else "default"
    if passage.kind == "image":
        return f"{colour} bold"
    return f"not bold {colour} dim" if passage.kind == "special" else f"not bold {colour}"


def read_records(store: Store) -> Iterator[Record]:
    """Yield a dataset's samples in order.

    Each is a request of its own: reading a few of them costs little, wherever the dataset is.
    """
    from streaming.base.format import reader_from_json

    for entry in read_root_index(store):
        reader = reader_from_json(".", None, entry)
        reader.validate(allow_unsafe_types=False)  # pickled columns run code
        name = entry["raw_data"]["basename"]
        for number in range(entry["samples"]):
            offsets = store.read_range(name, 4 * (number + 1), 4 * (number + 3))
            start, end = np.frombuffer(offsets, "<u4").tolist()
            yield Record.from_mds(reader.decode_sample(store.read_range(name, start, end)))
