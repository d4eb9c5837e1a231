"""Rows as Parquet and Arrow files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def some_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{n}",
            "conversations": [{"from": "human", "value": f"{n}?"}],
            "image": {"bytes": b"\0%d" % n, "path": None},
        }
        for n in range(count)
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_arrow(path: Path, rows: list[dict[str, Any]], batch: int, stream: bool = True) -> Path:
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, batch)
    return path
