"""CSV and TSV: rows by the names of their columns, and no row lost without a reject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.read_sources import opened, source_of, values_of
from unitoken.tokenize.sources.csv_files import csv_values


def test_a_row_of_csv_is_text_by_name_and_a_ragged_one_a_reject(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_bytes(b'\xef\xbb\xbfid,caption\n007,"a, b\nc"\n1\n2,d,e\n3,\n')
    *good, one, two = values_of(source_of(tmp_path / "i.csv"))
    assert good == [{"id": "007", "caption": "a, b\nc"}, {"id": "3", "caption": ""}]
    assert [str(error) for error in (one, two)] == [
        f"bad row: expected 2 columns, found {count}" for count in (1, 3)
    ]


LONG = b"z" * 100_000


@pytest.mark.parametrize(
    ("end", "closed"),
    [
        (b'3,"never closed\n4,d\n5,e\n', False),
        (b'3,"never closed\n4,d\n5,e', False),
        (b'3,"never ""closed""\r\n4,d\r\n', False),
        (b'3,"' + LONG + b"\n4,d\n", False),
        (b'3,"closed"\n', True),
        (b'3,"clo\nsed"\n', True),
        (b'3,"closed"', True),
        (b'3,""""\n', True),
        (b'3,"a"""', True),
        (b'3,""', True),
        (b"3,open", True),
        (b'3,o"pen\n', True),
        (b"3," + LONG, True),
        (b'3,"' + LONG + b'\n"\n', True),
        (b"3,\n", True),
    ],
)
def test_an_unclosed_quote_is_a_cut_that_is_reported(end: bytes, closed: bool, tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_bytes(b"id,caption\n1,a\n2,b\n" + end)
    *good, last = values_of(source_of(tmp_path / "i.csv"))
    assert [one["id"] for one in good] == ["1", "2"]
    assert (str(last) != "input cut: a quote that is opened in this row is never closed") is closed


def test_a_byte_of_another_encoding_loses_no_row_before_it(tmp_path: Path) -> None:
    rows = b"".join(b"%d,text\n" % n for n in range(1000))
    (tmp_path / "i.csv").write_bytes(b"id,caption\n" + rows + b"1000,caf\xe9\n")
    *good, last = values_of(source_of(tmp_path / "i.csv"))
    assert len(good) == 1000
    assert str(last) == f"input cut: byte {len(rows) + 11 + 8} is not UTF-8"


@pytest.mark.parametrize("rows", [5, 20, 40, 100])
def test_rows_before_a_field_that_is_too_long_are_kept(tmp_path: Path, rows: int) -> None:
    """Only the rows in the same block are lost with it, and the cut is a reject."""
    lines = [b"%03d,%s\n" % (n, b"x" * 60) for n in range(rows)]
    (tmp_path / "i.csv").write_bytes(b"id,text\n" + b"".join(lines) + b'long,"' + b"y" * 5000 + b'"\n')
    file = opened(tmp_path / "i.csv", block_bytes=1000)
    values: list[Any] = [value for _, value in csv_values(file, ",", None)]
    *good, last = values
    assert [row["id"] for row in good] == [f"{n:03}" for n in range(len(good))]
    assert rows - 16 < len(good)
    assert str(last).startswith("input cut: not readable as CSV: ")
