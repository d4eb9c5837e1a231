"""The input file: what is read, how it is cut, what is said of a file that is none."""

import json
from pathlib import Path

import pytest

from unitoken.streaming_data.config import ConfigError
from unitoken.tokenize.conversations import ItemError
from unitoken.tokenize.sources import chunk_count, chunk_name, cut, load_items


@pytest.mark.parametrize(("items", "size"), [(1, 1), (10, 3), (9, 3), (2, 5)])
def test_chunks_hold_every_item_once_in_order(items: int, size: int) -> None:
    values: list[object] = list(range(items))
    chunks = [cut(values, size, number) for number in range(chunk_count(items, size))]
    assert [item for chunk in chunks for item in chunk.items] == values
    assert all(chunk.items[0] == chunk.start for chunk in chunks)


def test_folders_sort_as_their_numbers() -> None:
    assert sorted(map(chunk_name, [10, 2, 999_999])) == ["chunk-000002", "chunk-000010", "chunk-999999"]


def test_json_and_jsonl_hold_the_same(tmp_path: Path) -> None:
    items = [{"a": "\u2028 stays in its line"}, {"b": 1}]
    (tmp_path / "i.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "i.jsonl").write_text("\n\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n", encoding="utf-8")
    assert load_items(tmp_path / "i.json") == load_items(tmp_path / "i.jsonl") == items


def test_a_bad_line_is_a_bad_item_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text('{"a": 1}\n{"cut\n{"b": 2}\n')
    first, bad, last = load_items(tmp_path / "i.jsonl")
    assert (first, last) == ({"a": 1}, {"b": 2})
    assert isinstance(bad, ItemError)


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        (b'{"conversations": []}', r"expected a JSON list of items, found an object with the keys \['conversations'\]"),
        (b'"text"', "found 'text'"),
        (b'[{"a": 1}, {"b"', "not readable as JSON"),
        (b'{"a": 1}\n{"b": 2}\n', "files named .jsonl"),
        (b"\xff\xfe\x00", "not UTF-8: byte 0 is 0xff"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[]", "holds no items"),
        (b"", "not readable as JSON"),
    ],
)
def test_a_file_that_is_no_list_is_named(tmp_path: Path, content: bytes, needed: str) -> None:
    (tmp_path / "in.json").write_bytes(content)
    with pytest.raises(ConfigError, match=needed) as error:
        load_items(tmp_path / "in.json")
    assert str(tmp_path / "in.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json: cannot read the input: No such file"):
        load_items(tmp_path / "none.json")
