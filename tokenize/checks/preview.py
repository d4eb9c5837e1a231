"""Show records as text: what a person looks at before training on a dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from unitoken.codec.passages import Passage, describe
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import VOCABULARY, Manifest, read_manifest
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.open import open_store
from unitoken.storage.store import Store
from unitoken.tokenize.checks.sample_reader import SampleReader


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
    """Yield a dataset's samples in order."""
    reader = SampleReader(store)
    yield from map(reader.read, range(len(reader)))
