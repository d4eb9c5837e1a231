"""Write the files of a chunk: shards with their index, its part of the samples sidecar, and its rejects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from streaming import MDSWriter

from unitoken.dataset.manifest import INDEX, REJECTS, SIDECAR
from unitoken.dataset.mds_index import dump_index
from unitoken.dataset.record import columns
from unitoken.dataset.sidecar import samples_schema, sidecar_row
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.tokenize.pipeline.item import Rejects, Sample

SHARD_BYTES = 1 << 26  # 64 MiB


def write_chunk_files(
    samples: Iterable[Sample],
    rejects: Rejects,
    folder: Path,
    vocabulary: Vocabulary,
    report: Callable[[int, int], None],
) -> None:
    """Write all files of a chunk into an empty folder.

    Args:
        samples: the chunk's samples, in order.
        rejects: the chunk's rejects, complete once all samples are read.
        folder: where to write.
        vocabulary: the id space of the tokens, whose size decides their type.
        report: called with (1, 0) for each sample.
    """
    rows: list[dict[str, Any]] = []
    turns_left_out = 0
    with MDSWriter(
        out=str(folder), columns=columns(vocabulary.size), hashes=["sha1"], size_limit=SHARD_BYTES
    ) as writer:
        for sample in samples:
            writer.write(sample.record.to_mds())
            rows.append(sidecar_row(sample.record, sample.image_sizes))
            turns_left_out += sample.turns_left_out
            report(1, 0)
    write_sidecar(pa.Table.from_pylist(rows, samples_schema()), folder / SIDECAR)
    (folder / REJECTS).write_bytes(rejects.dump())
    if turns_left_out:
        shards = json.loads((folder / INDEX).read_bytes())["shards"]
        (folder / INDEX).write_bytes(dump_index(shards, turns_left_out))


def write_sidecar(table: pa.Table, path: Path) -> None:
    """Write rows of the samples sidecar."""
    pq.write_table(table, path, compression="zstd")
