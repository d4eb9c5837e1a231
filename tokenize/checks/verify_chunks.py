"""Does the root of a dataset say what its chunks say? For `verify`, and what it needs to know of index and sidecar."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX, REJECTS, SIDECAR
from unitoken.dataset.mds_index import dump_index
from unitoken.storage.store import Store
from unitoken.tokenize import merge
from unitoken.tokenize.job import Chunk, Work

Entry = dict[str, Any]  # of a shard, in an index
KEYS = {"chunk", "file", "position", "id", "stage", "reason"}  # of a line of the rejects


SHARD = re.compile(r"(chunk|retry)-[\d-]+/shard\.\d{5,}\.mds")


def read_entries(store: Store) -> list[Entry]:
    """The root's index. Raises ConfigError for names that could lead out of the folder."""
    try:
        entries: list[Entry] = json.loads(store.read(INDEX))["shards"]
        wrong = [name for entry in entries if not SHARD.fullmatch(name := entry["raw_data"]["basename"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.url}/{INDEX}: no MDS index: {error!r}") from None
    if wrong:
        raise ConfigError(
            f"{store.url}/{INDEX}: expected shards named chunk-NNNNNN/shard.NNNNN.mds, found {wrong[0]!r}"
        )
    return entries


def chunk_of(entry: Entry) -> str:
    return str(entry["raw_data"]["basename"]).rpartition("/")[0]


class Rows:
    """The root's sidecar, of which only what is asked for is read."""

    def __init__(self, store: Store) -> None:
        import pyarrow.parquet as pq

        self._file = store.open(SIDECAR)
        self._table = pq.ParquetFile(self._file)
        groups = [self._table.metadata.row_group(n).num_rows for n in range(self._table.num_row_groups)]
        self._bounds = np.cumsum([0, *groups])

    def between(self, start: int, end: int) -> Any:
        """A pyarrow.Table of the rows from `start` to before `end`."""
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        last = int(np.searchsorted(self._bounds, end, "left"))
        if start == end:
            return self._table.schema_arrow.empty_table()
        return self._table.read_row_groups(range(first, last)).slice(
            start - int(self._bounds[first]), end - start
        )

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def wrong_chunks(
    store: Store, work: Work, entries: Sequence[Entry], wanted: Collection[str] | None
) -> Iterator[str]:
    """Compare the chunks' index, sidecar and rejects with the root's. `wanted`: the chunks to look at, None for all."""
    spans = _spans(entries)
    everywhere = work.chunks()
    yield from (
        f"{INDEX}: {name!r} is no chunk of this dataset"
        for name in sorted(set(spans) - {c.name for c in everywhere})
    )
    chunks = [chunk for chunk in everywhere if wanted is None or chunk.name in wanted]
    sizes = store.sizes()
    last_round = work.last_rounds()
    in_step = wanted is None  # with the root's rejects, which come chunk after chunk
    with Rows(store) as rows, store.open(REJECTS) as rejects:
        parts = merge.in_order(lambda chunk: _part(store, work, chunk, sizes), chunks)
        for chunk, (part, found) in zip(chunks, parts, strict=True):
            yield from found
            if part is None:
                in_step = False
                continue
            first, last, start, end = spans.get(chunk.name, (0, 0, 0, 0))
            if part.shards != entries[first:last]:
                yield f"{chunk.name}/{INDEX}: names other shards than the root's"
            if part.samples != rows.between(start, end):
                yield f"{chunk.name}/{SIDECAR}: holds other rows than the root's"
            kept = [line for line in part.rejects if merge.is_last(line, chunk, last_round)]
            if in_step and kept != [rejects.readline() for _ in kept]:
                yield f"{chunk.name}/{REJECTS}: holds other lines than the root's"


def _spans(entries: Sequence[Entry]) -> dict[str, tuple[int, int, int, int]]:
    """Of each chunk: first entry, end; first sample, end."""
    spans: dict[str, tuple[int, int, int, int]] = {}
    number = sample = 0
    for name, group in groupby(entries, chunk_of):
        shards = list(group)
        samples = sum(entry["samples"] for entry in shards)
        spans[name] = number, number + len(shards), sample, sample + samples
        number, sample = number + len(shards), sample + samples
    return spans


def _part(
    store: Store, work: Work, chunk: Chunk, sizes: dict[str, int]
) -> tuple[merge.Part | None, list[str]]:
    """What the merge reads of a chunk, where nothing is wrong with it alone."""
    import pyarrow as pa

    try:
        part = merge.read_chunk(store, work, chunk, sizes)
        index, sidecar = (store.read(f"{chunk.name}/{name}") for name in (INDEX, SIDECAR))
        as_written = _written_so(part.samples, sidecar)
    except ConfigError as error:
        return None, [str(error)]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        pa.ArrowException,
    ) as error:  # of all kinds, for a broken Parquet file
        return None, [f"{chunk.name}: not readable: {' '.join(repr(error).split())}"]
    found = [f"{chunk.name}/{REJECTS}: {problem}" for problem in _wrong_rejects(part, work)]
    if index != dump_index(json.loads(index)["shards"], part.turns_left_out):
        found.append(f"{chunk.name}/{INDEX}: was changed by hand")
    if not as_written:
        found.append(f"{chunk.name}/{SIDECAR}: was changed by hand")
    return (None if found else part), found


def _wrong_rejects(part: merge.Part, work: Work) -> Iterator[str]:
    """Each line has its keys and is of another item, one of the chunk's."""
    places = dict(part.chunk.parts)
    seen = set()
    for number, line in enumerate(part.rejects, 1):
        try:
            reject = json.loads(line)
            piece, position = reject["chunk"], reject["position"]
            known = set(reject) == KEYS and _is_in(position, places[piece], work, piece)
        except (ValueError, KeyError, TypeError) as error:
            yield f"line {number}: is no reject: {error!r}"
            continue
        if not known or (piece, position) in seen:
            yield f"line {number}: the item at {position} of piece {piece} is none of the chunk's, or has a line already"
        seen.add((piece, position))


def _is_in(position: int, positions: tuple[int, ...] | None, work: Work, number: int) -> bool:
    if positions is not None:
        return position in positions
    piece = work.input.pieces[number]
    return piece.position <= position and (piece.items is None or position < piece.position + piece.items)


def _written_so(samples: Any, data: bytes) -> bool:
    """Whether the writer makes these bytes of the table: much of a Parquet file is read by nobody.

    Another version of pyarrow makes others; then only what is read can be compared.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from unitoken.tokenize.pipeline.writer import write_samples

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SIDECAR)
        write_samples(samples, path)
        ours = path.read_bytes()
    versions = [pq.read_metadata(pa.BufferReader(file)).created_by for file in (ours, data)]
    return ours == data or versions[0] != versions[1]
