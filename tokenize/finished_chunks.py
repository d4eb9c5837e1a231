"""Read the small files of finished chunks, and check that they agree. For the merge, and for `verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX, LEFT_OUT, REJECTS, SIDECAR
from unitoken.dataset.mds_index import SHARD_NAME
from unitoken.dataset.sidecar import samples_schema
from unitoken.storage.store import Store
from unitoken.tokenize.job import Chunk, Work

READERS = 16  # chunks read at once: over a network each takes three requests
T = TypeVar("T")
K = TypeVar("K")


@dataclass
class FinishedChunk:
    """A chunk's index, sidecar and rejects."""

    chunk: Chunk
    shards: list[dict[str, Any]]  # entries of its index; the files' names start at the root of the dataset
    samples: Any  # pyarrow.Table, its part of the sidecar
    rejects: list[bytes]  # lines
    turns_left_out: int


def read_finished_chunk(store: Store, work: Work, chunk: Chunk, sizes: dict[str, int]) -> FinishedChunk:
    """Read a chunk's index, sidecar and rejects, and compare them with each other and with the input.

    Args:
        store: the dataset.
        work: the run's input and rounds, for the number of items.
        chunk: the chunk to read.
        sizes: bytes of all files in the dataset, by name.

    Raises:
        ConfigError: a file is missing or not readable, or the counts do not agree.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    hint = f"; remove {store.url}/{chunk.name} and run again"
    try:
        shards, turns_left_out = _read_index(store, chunk.name, sizes)
        sidecar = pa.BufferReader(store.read(f"{chunk.name}/{SIDECAR}"))
        samples = pq.read_table(sidecar, schema=samples_schema())
        rejects = store.read(f"{chunk.name}/{REJECTS}").splitlines(keepends=True)
    except (OSError, pa.ArrowException) as error:  # Arrow raises both
        raise ConfigError(f"{error}{hint}") from None
    stored = sum(shard["samples"] for shard in shards)
    items = work.count_items(chunk)
    if samples.num_rows != stored or (items is not None and items != stored + len(rejects)):
        raise ConfigError(
            f"{store.url}/{chunk.name}: {stored} samples in the shards, {samples.num_rows} in {SIDECAR}, "
            f"{len(rejects)} rejects, of {'an unknown number of' if items is None else items} items{hint}"
        )
    return FinishedChunk(chunk, shards, samples, rejects, turns_left_out)


def _read_index(store: Store, chunk: str, sizes: dict[str, int]) -> tuple[list[dict[str, Any]], int]:
    """Read a chunk's index. Returns its entries, with names from the root, and how many turns it left out."""
    where = f"{store.url}/{chunk}/{INDEX}"
    hint = f"; remove {store.url}/{chunk} and run again"
    try:
        index = json.loads(store.read(f"{chunk}/{INDEX}"))
        shards: list[dict[str, Any]] = index["shards"]
        turns_left_out = int(index.get(LEFT_OUT, 0))
        for shard in shards:
            file, _ = shard["raw_data"], int(shard["samples"])
            # Readers join these names to paths unchecked.
            if not SHARD_NAME.fullmatch(file["basename"]) or shard["zip_data"] is not None:
                raise ConfigError(
                    f"{where}: expected uncompressed shards named shard.NNNNN.mds, found {file['basename']!r}"
                )
            name = f"{chunk}/{file['basename']}"
            file["basename"] = name
            size = sizes.get(name)
            if size != file["bytes"]:
                found = "not there" if size is None else f"{size} bytes"
                raise ConfigError(f"{store.url}/{name}: {found}, {INDEX} says {file['bytes']} bytes{hint}")
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: no MDS index: {error!r}{hint}") from None
    return shards, turns_left_out


def counts_in_dataset(line: bytes, chunk: Chunk, last_rounds: dict[tuple[int, int], int]) -> bool:
    """Return whether a chunk's reject is one of the dataset's: its item was not tried again in a later round.

    Args:
        line: of the chunk's rejects.
        chunk: the chunk.
        last_rounds: see `Work.last_rounds`.
    """
    reject = json.loads(line)
    return last_rounds.get((reject["chunk"], reject["position"]), 0) == chunk.round


def map_in_threads(function: Callable[[T], K], values: Sequence[T]) -> Iterator[K]:
    """Yield the results in order, as `map` does; no more of them wait than there are threads."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(values), READERS):
            yield from pool.map(function, values[start : start + READERS])
