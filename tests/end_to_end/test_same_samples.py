"""The golden records give the same samples, byte for byte, in every format that a source may have."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import StreamingDataset

from support.tokenizing import GOLDEN, run_here, settings
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER
from unitoken.tokenize.merge import merge

Items = list[dict[str, Any]]


@pytest.fixture(scope="module")
def items() -> Items:
    """The golden records with ids, and images as bytes."""
    rows = [json.loads(line) for line in (GOLDEN / "dev" / "A_tokenization.jsonl").read_text().splitlines()]
    items: Items = []
    for row in rows:
        images = row["record"].get(IMAGE_PLACEHOLDER) or row["record"].get("image") or []
        names = [images] if isinstance(images, str) else images
        if "error" not in row:
            data = [(GOLDEN / "assets" / name).read_bytes() for name in names]
            items.append({"id": row["id"], "conversations": row["record"]["conversations"], "image": data})
    assert len(items) > 15
    assert sum(len(item["image"]) for item in items) > 10
    return items


def with_paths(folder: Path, items: Items) -> Items:
    result: Items = []
    for number, item in enumerate(items):
        names = [f"{number}-{n}.picture" for n in range(len(item["image"]))]
        for name, data in zip(names, item["image"], strict=True):
            (folder / name).write_bytes(data)
        result.append({**item, "image": names})
    return result


def json_list(folder: Path, items: Items) -> Path:
    (folder / "items.json").write_text(json.dumps(with_paths(folder, items), indent=1))
    return folder / "items.json"


def json_lines(folder: Path, items: Items) -> Path:
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in with_paths(folder, items))
    (folder / "items.jsonl").write_text(lines, encoding="utf-8")
    return folder / "items.jsonl"


def webdataset(folder: Path, items: Items) -> Path:
    with tarfile.open(folder / "items.tar", "w") as tar:
        for number, item in enumerate(items):
            members = {f"{n}.png": data for n, data in enumerate(item["image"])}
            members["json"] = json.dumps({**item, "image": list(members)}).encode()
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "items.tar"


def table(items: Items) -> pa.Table:
    return pa.Table.from_pylist(
        [{**item, "image": [{"bytes": data, "path": None} for data in item["image"]]} for item in items]
    )


def parquet(folder: Path, items: Items) -> Path:
    pq.write_table(table(items), folder / "items.parquet", row_group_size=5)
    return folder / "items.parquet"


def arrow(folder: Path, items: Items) -> Path:
    content = table(items)
    with pa.ipc.new_stream(folder / "items.arrow", content.schema) as writer:
        writer.write_table(content, max_chunksize=3)
    return folder / "items.arrow"


def samples(source: Path, out: Path, vqgan: Path) -> list[dict[str, Any]]:
    run_here(settings(vqgan, chunk_size=4, compat="unitoken"), source, out)
    merge(str(out))
    dataset = StreamingDataset(local=str(out), batch_size=1, shuffle=False)
    return [
        {key: value if isinstance(value, str | bytes) else value.tolist() for key, value in row.items()}
        for row in dataset
    ]


@pytest.mark.parametrize("write", [json_lines, webdataset, parquet, arrow])
def test_every_format_gives_the_samples_of_the_json_list(
    write: Callable[[Path, Items], Path], items: Items, vqgan: Path, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    expected = samples(json_list(tmp_path / "one", items), tmp_path / "one" / "out", vqgan)
    assert samples(write(tmp_path / "other", items), tmp_path / "other" / "out", vqgan) == expected
    assert [row["id"] for row in expected] == [item["id"] for item in items]
