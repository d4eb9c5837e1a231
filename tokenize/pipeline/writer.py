"""Records -> the files of a chunk: shards with their index, and its part of the samples sidecar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from streaming import MDSWriter

from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.mds_index import dump_index
from unitoken.dataset.record import Record, columns
from unitoken.dataset.sidecar import samples_schema
from unitoken.dataset.vocabulary import Vocabulary

SHARD_BYTES = 1 << 26  # 64 MiB

PictureSizes = list[tuple[int, int]]  # width, height of an item's images


def write(
    records: Iterable[tuple[Record, PictureSizes]],
    folder: Path,
    vocabulary: Vocabulary,
    report: Callable[[int, int], None],
) -> None:
    rows: list[dict[str, Any]] = []
    with MDSWriter(
        out=str(folder), columns=columns(vocabulary.size), hashes=["sha1"], size_limit=SHARD_BYTES
    ) as writer:
        for record, sizes in records:
            writer.write(record.to_mds())
            rows.append(_row(record, sizes))
            report(1, 0)
    write_samples(pa.Table.from_pylist(rows, samples_schema()), folder / SIDECAR)


def note_left_out(path: Path, turns: int) -> None:
    """In a chunk's index, which streaming has written."""
    if turns:
        path.write_bytes(dump_index(json.loads(path.read_bytes())["shards"], turns))


def _row(record: Record, sizes: PictureSizes) -> dict[str, Any]:
    targets = record.labels() >= 0
    generated = targets[record.image_spans[:, 0]]
    return {
        "id": record.id,
        "tokens": len(record.tokens),
        "target_tokens": int(targets.sum()),
        "images": len(sizes),
        "question_images": int((~generated).sum()),
        "image_sizes": [side for size in sizes for side in size],
        "generated": generated.tolist(),
    }


def write_samples(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")
