"""Records in words: what a person looks at before training on a dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import VOCABULARY, Manifest, read_manifest
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import SPECIAL_NAMES, Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import Store
from unitoken.tokenize.checks.verify_chunks import read_entries


def describe(record: Record, vocabulary: Vocabulary, tokenizer: Any) -> list[tuple[str, str, bool]]:
    """Pieces (kind, text, trained) in order. Kinds: `text`, `special` (the token's name), `image` (`[image HxW]`)."""
    trained = record.labels() >= 0
    names = {getattr(vocabulary, name): token for name, token in SPECIAL_NAMES.items()}
    images = {
        int(start): (int(end), f"[image {height}x{width}]")
        for start, end, height, width in record.image_spans
    }
    pieces: list[tuple[str, str, bool]] = []
    position = 0
    while position < len(record.tokens):
        token, train = int(record.tokens[position]), bool(trained[position])
        if position in images:
            end, text = images[position]
            pieces.append(("image", text, train))
        elif token in names:
            end = position + 1
            pieces.append(("special", names[token], train))
        else:
            end = position
            while (
                end < len(record.tokens)
                and end not in images
                and int(record.tokens[end]) not in names
                and trained[end] == train
            ):
                end += 1
            pieces.append(
                ("text", tokenizer.decode(np.asarray(record.tokens[position:end], np.int64).tolist()), train)
            )
        position = end
    return pieces


class Dataset(NamedTuple):
    store: Store
    manifest: Manifest
    vocabulary: Vocabulary
    tokenizer: Any


def open_dataset(out: str, tokenizer_name: str) -> Dataset:
    """Of a folder or bucket, with the tokenizer that it was made with. Raises ConfigError where it is another."""
    store = open_store(out)
    manifest = read_manifest(store)
    vocabulary = Vocabulary.parse(store.read(VOCABULARY), f"{out}/{VOCABULARY}")

    from unitoken.codec.text import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_name)
    found = Vocabulary.from_tokens(tokenizer.get_vocab(), len(vocabulary.image_ids)).fingerprint
    if found != manifest.vocabulary:
        raise ConfigError(
            f"{out}: was made with another tokenizer: its vocabulary is {manifest.vocabulary}, {tokenizer_name}'s is {found}"
        )
    return Dataset(store, manifest, vocabulary, tokenizer)


def show_samples(out: str, tokenizer_name: str, count: int) -> None:
    """Print the first `count` samples of the dataset in a folder or bucket."""
    store, _, vocabulary, tokenizer = open_dataset(out, tokenizer_name)

    from rich.console import Console
    from rich.text import Text

    console = Console()
    for record in itertools.islice(records(store), count):
        targets = int((record.labels() >= 0).sum())
        head = f"{record.id}: {len(record.tokens)} tokens, {targets} trained on, {len(record.images)} images"
        line = Text(head + "\n  ", style="bold")
        for kind, text, trained in describe(record, vocabulary, tokenizer):
            style = ("green" if trained else "default") + (
                " dim" if kind == "special" else " bold" if kind == "image" else ""
            )
            line.append(text, style="not bold " + style if kind != "image" else style)
        console.print(line, soft_wrap=True)


def records(store: Store) -> Iterator[Record]:
    """A dataset's samples in order, each by a request of its own: a few of them cost little, wherever they are."""
    from streaming.base.format import reader_from_json

    for entry in read_entries(store):
        reader = reader_from_json(".", None, entry)
        reader.validate(allow_unsafe_types=False)  # pickled columns run code
        name = entry["raw_data"]["basename"]
        for number in range(entry["samples"]):
            start, end = np.frombuffer(
                store.read_range(name, 4 * (number + 1), 4 * (number + 3)), "<u4"
            ).tolist()
            yield Record.from_mds(reader.decode_sample(store.read_range(name, start, end)))
