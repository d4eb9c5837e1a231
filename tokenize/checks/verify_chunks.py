"""For `verify`: compare the root of a dataset with its chunks. Also reads the root's index and sidecar."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX, REJECTS, SIDECAR
from unitoken.dataset.mds_index import SHARD_NAME, dump_index
from unitoken.storage.store import Store
from unitoken.tokenize.finished_chunks import (
    FinishedChunk,
    counts_in_dataset,
    map_in_threads,
    read_finished_chunk,
)
from unitoken.tokenize.job import Chunk, Work

IndexEntry = dict[str, Any]  # a shard, in an index
REJECT_KEYS = {"chunk", "file", "position", "id", "stage", "reason"}
ROOT_SHARD_NAME = re.compile(rf"(chunk|retry)-[\d-]+/{SHARD_NAME.pattern}")


def read_root_index(store: Store) -> list[IndexEntry]:
    """Read the shards of a dataset. Raises ConfigError for names that could lead out of the folder."""
    try:
        entries: list[IndexEntry] = json.loads(store.read(INDEX))["shards"]
        names = [entry["raw_data"]["basename"] for entry in entries]
        wrong = [name for name in names if not ROOT_SHARD_NAME.fullmatch(name)]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.url}/{INDEX}: no MDS index: {error!r}") from None
    if wrong:
        raise ConfigError(
            f"{store.url}/{INDEX}: expected shards named chunk-NNNNNN/shard.NNNNN.mds, found {wrong[0]!r}"
        )
    return entries


def chunk_of(entry: IndexEntry) -> str:
    """Return the name of the chunk that a shard belongs to."""
    return str(entry["raw_data"]["basename"]).rpartition("/")[0]


class RootSidecar:
    """The root's sidecar; only the row groups that hold the requested rows are read."""

    def __init__(self, store: Store) -> None:
        import pyarrow.parquet as pq

        self._file = store.open(SIDECAR)
        self._table = pq.ParquetFile(self._file)
        groups = [self._table.metadata.row_group(n).num_rows for n in range(self._table.num_row_groups)]
        self._bounds = np.cumsum([0, *groups])  # (row groups + 1,): first rows, and the end

    def rows(self, start: int, end: int) -> Any:
        """Return a pyarrow.Table of the rows from `start` to before `end`."""
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        last = int(np.searchsorted(self._bounds, end, "left"))
        if start == end:
            return self._table.schema_arrow.empty_table()
        groups = self._table.read_row_groups(range(first, last))
        return groups.slice(start - int(self._bounds[first]), end - start)

    def __enter__(self) -> RootSidecar:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class ChunkSpan(NamedTuple):
    """Where a chunk is in the dataset, in half-open ranges."""

    first_shard: int = 0
    end_shard: int = 0
    first_sample: int = 0
    end_sample: int = 0


def compare_chunks(
    store: Store, work: Work, entries: Sequence[IndexEntry], names: Collection[str] | None
) -> Iterator[str]:
    """Compare the chunks' index, sidecar and rejects with the root's. Yields each difference, in one line.

    Args:
        store: the dataset.
        work: the run's input and rounds.
        entries: the root's index.
        names: the chunks to compare; None for all.
    """
    spans = _chunk_spans(entries)
    all_chunks = work.chunks()
    for name in sorted(set(spans) - {chunk.name for chunk in all_chunks}):
        yield f"{INDEX}: {name!r} is no chunk of this dataset"
    chunks = [chunk for chunk in all_chunks if names is None or chunk.name in names]
    sizes = store.sizes()
    last_rounds = work.last_rounds()
    # The root's rejects come chunk after chunk: they can be compared as long as no chunk is left out.
    compare_rejects = names is None
    with RootSidecar(store) as sidecar, store.open(REJECTS) as rejects:
        results = map_in_threads(lambda chunk: _check_chunk(store, work, chunk, sizes), chunks)
        for chunk, (finished, problems) in zip(chunks, results, strict=True):
            yield from problems
            if finished is None:
                compare_rejects = False
                continue
            span = spans.get(chunk.name, ChunkSpan())
            if finished.shards != entries[span.first_shard : span.end_shard]:
                yield f"{chunk.name}/{INDEX}: names other shards than the root's"
            if finished.samples != sidecar.rows(span.first_sample, span.end_sample):
                yield f"{chunk.name}/{SIDECAR}: holds other rows than the root's"
            kept = [line for line in finished.rejects if counts_in_dataset(line, chunk, last_rounds)]
            if compare_rejects and kept != [rejects.readline() for _ in kept]:
                yield f"{chunk.name}/{REJECTS}: holds other lines than the root's"


def _chunk_spans(entries: Sequence[IndexEntry]) -> dict[str, ChunkSpan]:
    spans: dict[str, ChunkSpan] = {}
    shard = sample = 0
    for name, group in groupby(entries, chunk_of):
        counts = [entry["samples"] for entry in group]
        spans[name] = ChunkSpan(shard, shard + len(counts), sample, sample + sum(counts))
        shard, sample = shard + len(counts), sample + sum(counts)
    return spans


def _check_chunk(
    store: Store, work: Work, chunk: Chunk, sizes: dict[str, int]
) -> tuple[FinishedChunk | None, list[str]]:
    """Check a chunk by itself. Returns it if nothing is wrong, and what is wrong."""
    import pyarrow as pa

    try:
        finished = read_finished_chunk(store, work, chunk, sizes)
        index, sidecar = (store.read(f"{chunk.name}/{name}") for name in (INDEX, SIDECAR))
        sidecar_as_written = _is_as_written(finished.samples, sidecar)
    except ConfigError as error:
        return None, [str(error)]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        # A broken Parquet file raises any of them.
        return None, [f"{chunk.name}: not readable: {' '.join(repr(error).split())}"]
    problems = [f"{chunk.name}/{REJECTS}: {problem}" for problem in _wrong_rejects(finished, work)]
    if index != dump_index(json.loads(index)["shards"], finished.turns_left_out):
        problems.append(f"{chunk.name}/{INDEX}: was changed by hand")
    if not sidecar_as_written:
        problems.append(f"{chunk.name}/{SIDECAR}: was changed by hand")
    return (None if problems else finished), problems


def _wrong_rejects(finished: FinishedChunk, work: Work) -> Iterator[str]:
    """Check that each line has the right keys and names an item of the chunk, each item once."""
    positions_of = dict(finished.chunk.parts)
    seen = set()
    for number, line in enumerate(finished.rejects, 1):
        try:
            reject = json.loads(line)
            piece, position = reject["chunk"], reject["position"]
            known = set(reject) == REJECT_KEYS and _is_in(position, positions_of[piece], work, piece)
        except (ValueError, KeyError, TypeError) as error:
            yield f"line {number}: is no reject: {error!r}"
            continue
        if not known or (piece, position) in seen:
            yield (
                f"line {number}: the item at {position} of piece {piece} is none of the chunk's, "
                "or has a line already"
            )
        seen.add((piece, position))


def _is_in(position: int, positions: tuple[int, ...] | None, work: Work, number: int) -> bool:
    """Return whether a piece's part of a chunk has an item at `position`."""
    if positions is not None:
        return position in positions
    piece = work.input.pieces[number]
    return piece.position <= position and (piece.items is None or position < piece.position + piece.items)


def _is_as_written(samples: Any, data: bytes) -> bool:
    """Return whether the writer makes these bytes of the table: no reader looks at much of a Parquet file.

    Another version of pyarrow writes other bytes; then only the table can be compared.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from unitoken.tokenize.pipeline.writer import write_sidecar

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SIDECAR)
        write_sidecar(samples, path)
        ours = path.read_bytes()
    versions = [pq.read_metadata(pa.BufferReader(file)).created_by for file in (ours, data)]
    return ours == data or versions[0] != versions[1]
