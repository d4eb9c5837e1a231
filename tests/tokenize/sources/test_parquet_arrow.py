"""Parquet and Arrow: every row once, in pieces of any size, and a reject for each damaged row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.arrow_files import some_rows, write_arrow, write_parquet
from support.read_sources import source_of, values_of
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources.reader import read_piece


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_parquet_is_cut_by_rows_wherever_its_groups_end(tmp_path: Path, chunk_size: int) -> None:
    source = source_of(write_parquet(tmp_path / "i.parquet", some_rows(150), 40), chunk_size)
    assert values_of(source) == some_rows(150)
    assert len(source.pieces) == -(-150 // chunk_size)
    assert source.items == 150


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_is_cut_by_rows_wherever_its_batches_end(tmp_path: Path, stream: bool) -> None:
    source = source_of(write_arrow(tmp_path / "i.arrow", some_rows(50), 8, stream), 7)
    assert values_of(source) == some_rows(50)
    assert [item.value for item in read_piece(source, 2, {14, 16})] == [some_rows(50)[14], some_rows(50)[16]]


@pytest.mark.parametrize("name", ["i.parquet", "i.arrow"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PAR1", b"ARROW1\0\0"])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: not readable as (Parquet|Arrow): "):
        source_of(tmp_path / name)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("chunk_size", [7, 25, 1000])
def test_each_row_after_a_damaged_page_is_a_reject(tmp_path: Path, chunk_size: int, checksum: bool) -> None:
    """All other groups are read, and the same rows are lost for any size of pieces."""
    rows = [{"text": f"{n} " * 200} for n in range(100)]
    path = tmp_path / "i.parquet"
    kind: dict[str, Any] = (
        {"write_page_checksum": True, "compression": "none", "use_dictionary": False} if checksum else {}
    )
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, **kind)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    at = (
        column.data_page_offset + column.total_compressed_size - 1000
        if checksum
        else column.dictionary_page_offset + 40
    )
    content[at : at + 10] = b"\xff" * 10
    path.write_bytes(content)
    values = values_of(source_of(path, chunk_size))
    assert values[:20] + values[40:] == rows[:20] + rows[40:]
    assert {str(value).partition(": ")[0] for value in values[20:40]} == {"unreadable rows"}
    assert len({str(value) for value in values[20:40]}) == 1


def test_text_that_is_not_unicode_rejects_its_row_only(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff", b"b"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "i.parquet")
    first, wrong, last = values_of(source_of(tmp_path / "i.parquet"))
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert str(wrong).startswith("unreadable row: ")


def test_an_arrow_stream_cut_anywhere_keeps_the_rows_before(tmp_path: Path) -> None:
    rows = some_rows(20)
    content = write_arrow(tmp_path / "whole.arrow", rows, 5).read_bytes()
    outcomes = set()
    for size in (*range(0, len(content), 61), len(content) - 4):
        (tmp_path / "i.arrow").write_bytes(content[:size])
        try:
            *before, error = values_of(source_of(tmp_path / "i.arrow", 3))
        except ConfigError:
            continue
        assert before == rows[: len(before)]
        assert str(error).startswith("input cut: behind row ")
        outcomes.add(len(before))
    assert outcomes == {5, 10, 15, 20}


def test_a_damaged_batch_is_a_reject_for_each_of_its_rows(tmp_path: Path) -> None:
    """Unchecked, Arrow would follow an offset to 4 GiB behind the file."""
    rows = [{"text": "abcd"} for _ in range(8)]
    path = write_arrow(tmp_path / "i.arrow", rows, 4)
    content = bytearray(path.read_bytes())
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12, 16))
    at = content.index(offsets)
    content[at + 8 : at + 12] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    values = values_of(source_of(path, 3))
    assert values[4:] == rows[4:]
    assert {str(value).partition(":")[0] for value in values[:4]} == {"unreadable rows"}


def test_a_column_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    """29 kB of zstd became 2.5 GB in memory."""
    path = tmp_path / "i.parquet"
    rows = pa.table({"id": ["a", "b"], "blob": [bytes(200 << 20), bytes(200 << 20)]})
    pq.write_table(rows, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    values = values_of(source_of(path))
    assert len(values) == 2
    assert all("column 'blob' unpacks from " in str(value) for value in values)


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
def test_two_columns_of_one_name_are_an_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"i.{kind}"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["image", "image"])
    if kind == "csv":
        path.write_text("image,image\na,b\n")
        (value,) = values_of(source_of(path))
        assert str(value) == "input cut: two columns are called 'image'"
        return
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(ConfigError, match="two columns are called 'image'"):
        values_of(source_of(path))


def test_rows_without_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.arrow"
    with pa.ipc.new_stream(path, pa.schema([("a", pa.null())])) as stream:
        stream.write_batch(pa.record_batch([pa.nulls(2_000_000_000)], names=["a"]))
    with pytest.raises(ConfigError, match=r"rows in .* bytes are no data"):
        values_of(source_of(path))
