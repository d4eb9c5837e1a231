"""What is known of every sample of a dataset without reading its shards: for filters and histograms."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from unitoken.common.cli import printable
from unitoken.common.errors import ConfigError, one_line
from unitoken.dataset.kinds import Kind, are_of_kinds, kind_numbers
from unitoken.dataset.manifest import SIDECAR
from unitoken.storage.store import Store, is_url
from unitoken.tokenize.checks.verify_chunks import IndexEntry, chunk_of
from unitoken.tokenize.job import load_work

MOST_SOURCES = 50  # that are told apart; more are counted by their folders
LONGEST_SIDE = 1 << 14  # pixels; larger pictures are counted as this large
PROPORTIONS = 2.0 ** np.linspace(-2.375, 2.375, 20)  # borders of width / height, of which two enclose 1
_COLUMNS = ["tokens", "target_tokens", "images", "question_images", "image_sizes"]


@dataclass(frozen=True)
class Filters:
    """Which samples to show.

    Attributes:
        kinds: of these kinds; none stands for all.
        shortest, longest: in tokens, both included; None has no limit.
        source: the number of the file that they come from; None for any.
        part_of_id: text that is in their id, in upper or lower case.
    """

    kinds: tuple[Kind, ...] = ()
    shortest: int = 0
    longest: int | None = None
    source: int | None = None
    part_of_id: str = ""


@dataclass(frozen=True, eq=False)
class PictureSizes:
    """How many original pictures have each size; pictures that were not kept are not counted."""

    longer_sides: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(LONGEST_SIDE + 1, np.int64)
    )  # by the longer side in pixels
    proportions: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(PROPORTIONS) - 1, np.int64)
    )  # by width / height, between the borders PROPORTIONS

    def add(self, sides: npt.NDArray[np.uint32]) -> None:
        """Count pictures of (n, 2) width and height."""
        known = sides[sides.min(axis=1) > 0].astype(np.int64)
        longer = np.minimum(known.max(axis=1), LONGEST_SIDE) if len(known) else np.zeros(0, np.int64)
        self.longer_sides[:] += np.bincount(longer, minlength=LONGEST_SIDE + 1)
        ratios = np.clip(known[:, 0] / known[:, 1], PROPORTIONS[0], PROPORTIONS[-1])
        self.proportions[:] += np.histogram(ratios, PROPORTIONS)[0]


class SampleTable:
    """The sidecar's numbers in memory, 12 bytes a sample, and where each sample comes from. To be closed.

    Attributes:
        tokens, target_tokens, images, kinds: (samples,) each; kinds as places in `KINDS`.
        sources: (samples,) places in `source_names`.
        source_names: files of the input, or their folders; empty if they are unknown or all the same.
        sizes: of the pictures.
    """

    def __init__(self, store: Store, entries: Sequence[IndexEntry]) -> None:
        """Read the sidecar.

        Args:
            store: the dataset.
            entries: of its index.

        Raises:
            ConfigError: the sidecar can not be read, or has another number of samples than the index.
        """
        import pyarrow
        import pyarrow.parquet as pq

        self._lock = threading.Lock()
        self.sizes = PictureSizes()
        shards = [entry["samples"] for entry in entries]
        with contextlib.ExitStack() as on_error:
            self._file = on_error.enter_context(_local_copy(store))
            try:
                self._sidecar = pq.ParquetFile(self._file)
                self._read_numbers()
            except (pyarrow.ArrowException, KeyError, ValueError) as error:
                raise ConfigError(f"{store.url}/{SIDECAR}: not readable: {one_line(error, 200)}") from None
            if len(self.tokens) != sum(shards):
                raise ConfigError(
                    f"{store.url}/{SIDECAR}: {len(self.tokens)} samples, the index has {sum(shards)}"
                )
            self.source_names, of_shards = _sources(store, entries)
            self.sources = np.repeat(np.asarray(of_shards, np.uint8), shards)
            on_error.pop_all()

    def __enter__(self) -> SampleTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sidecar; ids can not be searched from now on."""
        self._file.close()

    def _read_numbers(self) -> None:
        rows = self._sidecar.metadata.num_rows
        self.tokens, self.target_tokens = np.empty(rows, np.uint32), np.empty(rows, np.uint32)
        self.images, self.kinds = np.empty(rows, np.uint16), np.empty(rows, np.uint8)
        begin = 0
        for batch in self._sidecar.iter_batches(columns=_COLUMNS):
            place = slice(begin, begin + len(batch))
            begin += len(batch)
            numbers = {name: batch[name].to_numpy() for name in _COLUMNS[:4]}
            self.tokens[place], self.target_tokens[place] = numbers["tokens"], numbers["target_tokens"]
            self.images[place] = numbers["images"]
            self.kinds[place] = kind_numbers(numbers["images"], numbers["question_images"])
            self.sizes.add(batch["image_sizes"].flatten().to_numpy().reshape(-1, 2))

    def find(self, filters: Filters) -> npt.NDArray[np.int64]:
        """Return the numbers of the samples that pass all filters, ascending."""
        passed = are_of_kinds(self.kinds, filters.kinds or None)
        passed &= self.tokens >= filters.shortest
        if filters.longest is not None:
            passed &= self.tokens <= filters.longest
        if filters.source is not None:
            passed &= self.sources == filters.source
        if filters.part_of_id:
            passed &= self._ids_with(filters.part_of_id)
        return np.flatnonzero(passed)

    def _ids_with(self, text: str) -> npt.NDArray[np.bool_]:
        import pyarrow.compute as pc

        with self._lock:  # a Parquet file has one position
            parts = [
                pc.match_substring(batch["id"], text, ignore_case=True).to_numpy(zero_copy_only=False)
                for batch in self._sidecar.iter_batches(columns=["id"])
            ]
        return np.concatenate([np.zeros(0, bool), *parts])


def _local_copy(store: Store) -> BinaryIO:
    """Open the sidecar; one in a bucket is first copied into a temporary file, as searches read it again."""
    file = store.open(SIDECAR)
    if not is_url(store.url):
        return file
    with file:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the table is
        shutil.copyfileobj(file, copy, 1 << 24)
    copy.seek(0)
    return cast(BinaryIO, copy)


def _sources(store: Store, entries: Sequence[IndexEntry]) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the files that the samples come from, and the place of each shard's among them."""
    try:
        work = load_work(store)
    except ConfigError:  # a dataset that something else has written
        return (), [0] * len(entries)
    files = {
        chunk.name: {work.input.files[work.input.pieces[number].file].name for number, _ in chunk.parts}
        for chunk in work.chunks()
    }
    names: list[Any] = [files.get(chunk_of(entry), set()) for entry in entries]
    texts = [names_of.copy().pop() if len(names_of) == 1 else "several files" for names_of in names]
    if len(set(texts)) > MOST_SOURCES:
        texts = [text.rpartition("/")[0] for text in texts]
    distinct = sorted(set(texts))
    if not 1 < len(distinct) <= MOST_SOURCES:
        return (), [0] * len(entries)
    shown = [PurePosixPath(text).name for text in distinct]
    if len(set(shown)) < len(shown):
        shown = distinct
    return tuple(map(printable, shown)), [distinct.index(text) for text in texts]
