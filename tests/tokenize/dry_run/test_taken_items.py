"""A few items of an input, spread over it, and how many it has."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from support.arrow_files import write_arrow, write_parquet
from support.tars import tar_of
from unitoken.tokenize.dry_run import taken_items
from unitoken.tokenize.dry_run.taken_items import TakenItems, take_items
from unitoken.tokenize.sources.reader import find_files

COUNT = 1000
ITEMS: list[dict[str, Any]] = [
    {"id": f"i{n}", "conversations": [{"from": "human", "value": f"{n:04d}" * 25}]} for n in range(COUNT)
]


def write(folder: Path, kind: str) -> Path:
    """Write the items in one of the formats."""
    path = folder / f"items.{kind}"
    lines = "".join(f"{json.dumps(item)}\n" for item in ITEMS)
    if kind == "json":
        path.write_text(json.dumps(ITEMS))
    elif kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "csv":
        path.write_text("id,text\n" + "".join(f"i{n},{n:04d}\n" for n in range(COUNT)))
    elif kind == "parquet":
        write_parquet(path, ITEMS, 100)
    elif kind == "arrow":
        write_arrow(path, ITEMS, 50)
    else:
        tar_of(path, [(f"i{n:04d}.json", json.dumps(item).encode()) for n, item in enumerate(ITEMS)])
    return path


def take(path: Path | str, count: int = 20) -> TakenItems:
    return take_items(find_files([str(path)]), count)


def ids(found: TakenItems) -> list[str]:
    return [item.place.id for item in found.items]


KINDS = pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "csv", "parquet", "arrow", "tar"])


@KINDS
def test_a_small_file_is_counted_and_spread_over(tmp_path: Path, kind: str) -> None:
    found = take(write(tmp_path, kind))
    assert (found.total, found.how) == (COUNT, "counted")
    numbers = [int(name.removeprefix("i")) for name in ids(found)]
    assert len(numbers) == 20
    assert numbers == sorted(numbers)
    assert numbers[0] < 100
    assert numbers[-1] > 850


@KINDS
def test_a_large_file_is_estimated_from_parts(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, kind)
    monkeypatch.setattr(taken_items, "SMALL_BYTES", 0)
    monkeypatch.setattr(taken_items, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(taken_items, "COUNTED_BYTES", 60_000)
    found = take(path)
    assert len(found.items) == 20
    assert found.total == pytest.approx(COUNT, rel=0.25)
    if kind in ("jsonl", "parquet"):
        assert max(int(name.removeprefix("i")) for name in ids(found)) >= 750, "from the last quarter, too"
    if kind in ("json", "jsonl", "tar"):
        assert found.how.startswith("estimated from parts of the files, ")


def test_of_many_files_some_are_looked_at(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"part-{number:02d}.jsonl").write_text(
            "".join(f"{json.dumps({'id': f'{number}-{n}'})}\n" for n in range(10))
        )
    found = take(f"{tmp_path}/part-*.jsonl", 10)
    assert len({item.place.file for item in found.items}) == taken_items.MOST_FILES
    assert found.total == pytest.approx(120, rel=0.05)
    assert found.how.startswith("estimated from 5 of 12 files, ")


def test_fewer_items_than_asked_for_are_all_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    assert ids(take(tmp_path / "a.jsonl")) == ["a", "b"]
