"""The input: how files are cut into pieces, how a piece is read, and which damage is an error or a reject."""

import json
import os
from pathlib import Path

import pytest

from support.read_sources import opened, values_of
from support.served import Server, served  # noqa: F401 - a fixture
from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError
from unitoken.storage.folder import Folder
from unitoken.tokenize.sources import json_files, reader
from unitoken.tokenize.sources.reader import Input, RawItem, cut, find_files, folder_of, item_name, read_piece


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# --- files --------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json: cannot read the input: No such file"):
        find_files([f"{tmp_path}/none.json"])


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # reading it would never end
    with pytest.raises(ConfigError, match=r"pipe.json: cannot read the input: not a file"):
        find_files([f"{tmp_path}/pipe.json"])
    with pytest.raises(
        ConfigError,
        match="expected a file, a folder that Hugging Face's `datasets` saved, or one of pictures",
    ):
        find_files([str(tmp_path)])


def test_relative_images_start_where_the_file_is() -> None:
    files = [
        reader.InputFile(name=name, format="json", size=1, version="")
        for name in (
            "data/a.json",
            "a.json",
            "/a.json",
            "s3://bucket/x/a.json",
            "https://host/x/a.json?key=a/b",
        )
    ]
    found = [folder_of(Input(files=files, pieces=[]), number) for number in range(len(files))]
    assert found == ["data", ".", "/", "s3://bucket/x", "https://host/x"]


@pytest.mark.parametrize("whole_bytes", [reader.HASHED_WHOLE_BYTES, 1000])  # all of it, or blocks
def test_versions_follow_the_content_and_not_the_name(tmp_path: Path, whole_bytes: int) -> None:
    for name, content in (("1", b"ab"), ("2", b"ab"), ("3", b"ac")):
        write(tmp_path / name, content * 100_000)
    store = Folder(tmp_path)
    one, same, other = (reader.content_version(store, name, 200_000, whole_bytes) for name in "123")
    assert one == same != other
    if whole_bytes == reader.HASHED_WHOLE_BYTES:
        assert [file.version for file in find_files([str(tmp_path / "1")])] == [one]


def test_the_fingerprint_is_of_content_and_borders(tmp_path: Path) -> None:
    one, same, other = (
        write(tmp_path / name, text)
        for name, text in (("1", "[1, 2, 3]"), ("2", "[1, 2, 3]"), ("3", "[1, 2, 4]"))
    )

    def fingerprint(name: str, size: int) -> str:
        return cut(find_files([name]), size).fingerprint

    assert fingerprint(one, 2) == fingerprint(same, 2)
    assert len({fingerprint(one, 2), fingerprint(one, 1), fingerprint(other, 2)}) == 3


# --- pieces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "size"), [(1, 1), (10, 3), (9, 3), (2, 5)])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_pieces_hold_every_item_once_in_order(tmp_path: Path, items: int, size: int, suffix: str) -> None:
    values = list(range(items))
    text = json.dumps(values) if suffix == "json" else "\n".join(map(str, values))
    source = cut(find_files([write(tmp_path / f"i.{suffix}", text)]), size)
    assert values_of(source) == values
    assert [piece.items for piece in source.pieces] == [
        len(values[start : start + size]) for start in range(0, items, size)
    ]
    assert [piece.position for piece in source.pieces] == list(range(0, items, size))
    assert source.items == items


def test_no_piece_crosses_a_file_and_an_input_can_be_stored(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.json", "[1, 2, 3]"),
        write(tmp_path / "b.jsonl", ""),
        write(tmp_path / "c.jsonl", "4\n5\n"),
    ]
    source = Input.model_validate_json(cut(find_files(files), 2).model_dump_json())
    assert [(piece.file, piece.position, piece.items) for piece in source.pieces] == [
        (0, 0, 2),
        (0, 2, 1),
        (2, 0, 2),
    ]
    assert values_of(source) == [1, 2, 3, 4, 5]


def test_only_the_selected_positions_are_read(tmp_path: Path) -> None:
    source = cut(find_files([write(tmp_path / "i.jsonl", "".join(f"{n}\n" for n in range(10)))]), 4)
    assert list(read_piece(source, 1, {5, 7})) == [RawItem(1, 0, 5, 5), RawItem(1, 0, 7, 7)]


def test_items_are_named_by_their_position(tmp_path: Path) -> None:
    one = cut(find_files([write(tmp_path / "i.json", "[1, 2]")]), 1)
    two = cut(find_files([write(tmp_path / "i.json", "[1, 2]"), write(tmp_path / "j.json", "[3]")]), 1)
    assert [item_name(one, item) for piece in range(2) for item in read_piece(one, piece)] == ["0", "1"]
    assert [item_name(two, item) for piece in range(3) for item in read_piece(two, piece)] == [
        "0:0",
        "0:1",
        "1:0",
    ]


def test_json_and_jsonl_hold_the_same(tmp_path: Path) -> None:
    items = [{"a": "\u2028 stays in its line"}, {"b": 1}]
    texts = [json.dumps(item, ensure_ascii=False) for item in items]
    (tmp_path / "i.json").write_text(f"[{','.join(texts)}]", encoding="utf-8-sig")
    (tmp_path / "i.jsonl").write_text("\n\n".join(texts) + "\n", encoding="utf-8-sig")
    for name in ("i.json", "i.jsonl"):
        assert values_of(cut(find_files([str(tmp_path / name)]), 10)) == items


# --- what is damaged ----------------------------------------------------------------------------------------


def test_a_bad_line_is_a_bad_item_in_its_place(tmp_path: Path) -> None:
    lines = b'{"a": 1}\n{"cut\n"\xff"\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b'\n{"b": 2}\n'
    first, *bad, last = values_of(cut(find_files([write(tmp_path / "i.jsonl", lines)]), 10))
    assert (first, last) == ({"a": 1}, {"b": 2})
    reasons = [str(error) for error in bad if isinstance(error, ItemError)]
    assert [reason.partition(":")[0] for reason in reasons] == ["not readable as JSON", "not UTF-8"] + [
        "not readable as JSON"
    ] * 2
    assert all(len(reason) < 300 for reason in reasons)


def test_a_bad_element_is_a_bad_item_in_its_place(tmp_path: Path) -> None:
    source = cut(find_files([write(tmp_path / "i.json", b'[1, "\xff", ' + b"9" * 5000 + b", 4]")]), 10)
    first, wrong, long, last = values_of(source)
    assert (first, last, source.items) == (1, 4, 4)
    assert str(wrong).startswith("not UTF-8: byte 1 is 0xff")
    assert isinstance(long, ItemError)


@pytest.mark.parametrize("size", [1, 2, 3, 10])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("i.json", '[1, 2, {"b', "at byte 7 of 10: the file ends inside an item"),
        ("i.json", "[1, 2", "at byte 5 of 5: expected ',' or ']', found the end of the file"),
        ("i.json", "[1, 2,", "at byte 6 of 6: expected an item, found the end of the file"),
        ("i.json", "[1, 2 3]", "at byte 6 of 8: expected ',' or ']', found '3]'"),
        ("i.json", "[1, 2, nul, 4]", "at byte 7 of 14: Expecting value, found 'nul, 4]'"),
        ("i.json", "[1, 2][3]", "at byte 6 of 9: expected nothing after the list, found '[3]'"),
        ("i.json", "[1, 2, " + "[" * 100_000, "at byte 7 of 100007: an item is nested too deeply"),
        # An error at a quote, far from the end of the file: a string without an end, or one out of place.
        ("i.json", '[1, 2, {"a": "' + "b" * 90, "at byte 7 of 104: the file ends inside an item"),
        ("i.json", '[1, 2, {"a" "' + "b" * 90 + '"}]', "at byte 12 of 106: Expecting ':' delimiter, found"),
        ("i.json", '[1, 2, ["a" "' + "b" * 90, "at byte 12 of 103: Expecting ',' delimiter, found"),
        (
            "i.jsonl",
            '1\n2\n{"b',
            "at byte 4 of 7: the last line has no end: not readable as JSON: Unterminated string",
        ),
    ],
)
def test_items_before_a_break_are_kept(
    tmp_path: Path, name: str, content: str, reason: str, size: int
) -> None:
    source = cut(find_files([write(tmp_path / name, content)]), size)
    first, second, error = values_of(source)
    assert (first, second, source.items) == (1, 2, 3)
    assert str(error).startswith(f"input cut: {reason}")
    assert all((piece.items or 0) <= size for piece in source.pieces)
    assert [str(item.value) for item in read_piece(source, len(source.pieces) - 1, {2})] == [str(error)]


def test_a_last_line_without_line_feed_is_read(tmp_path: Path) -> None:
    assert values_of(cut(find_files([write(tmp_path / "i.jsonl", '1\n{"a": 2}')]), 10)) == [1, {"a": 2}]


def test_items_are_limited_in_bytes(tmp_path: Path) -> None:
    limits = {"block_bytes": 64, "max_item_bytes": 100}
    write(tmp_path / "i.jsonl", f'1\n"{"x" * 500}"\n2\n')
    file = opened(tmp_path / "i.jsonl", **limits)
    (span,) = json_files.line_spans(file, 10)
    one, long, two = [value for _, value in json_files.line_values(file, span.start, span.end, None)]
    assert (one, two, str(long)) == (1, 2, "item too large: more than 100 bytes")
    write(tmp_path / "i.json", f'[1, "{"x" * 500}", 2]')
    file = opened(tmp_path / "i.json", **limits)
    (span,) = json_files.list_spans(file, 10)
    assert [value for _, value in json_files.list_values(file, span.start, span.end, None)] == [1]
    assert (span.items, span.cut) == (2, "at byte 4 of 510: an item of more than 100 bytes")


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        (
            b'{"conversations": []}',
            r"expected a JSON list of items, found an object with the keys \['conversations'\]",
        ),
        (b'"text"', "found 'text'"),
        (b'[{"a', "not readable as JSON: at byte 1 of 4: the file ends inside an item"),
        (b'{"a": 1}\n{"b": 2}\n', "files named .jsonl"),
        (b"\xff\xfe\x00", "not UTF-8: byte 0 is 0xff"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"<html>", "not readable as JSON: at byte 0 of 6: expected '\\[', found '<html>'"),
        (b"[]", "holds no items"),
        (b"", "not readable as JSON"),
    ],
)
def test_a_file_that_is_no_list_is_named(tmp_path: Path, content: bytes, needed: str) -> None:
    with pytest.raises(ConfigError, match=needed) as error:
        cut(find_files([write(tmp_path / "in.json", content)]), 10)
    assert str(tmp_path / "in.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("i.json", "[10, 20]", ""),
        ("i.json", "[10, 20]", "[10,"),
        ("i.json", "[10, 20]", "[10; 20]"),
        ("i.json", "[10, 20]", "[10  20]"),
        ("i.jsonl", "1\n2\n", ""),
        ("i.jsonl", "1\n2\n", "102\n"),
    ],
)
def test_a_file_that_changed_since_it_was_cut_is_refused(
    tmp_path: Path, name: str, before: str, after: str
) -> None:
    source = cut(find_files([write(tmp_path / name, before)]), 10)
    write(tmp_path / name, after)
    with pytest.raises(ConfigError, match="has changed since it was cut"):
        values_of(source)


# --- https --------------------------------------------------------------------------------------------------


def test_a_source_behind_a_url_is_read_in_ranges(served: Server) -> None:  # noqa: F811
    served.files["/x/i.jsonl"] = b"1\n2\n3\n"
    source = cut(find_files([f"{served.url}/x/i.jsonl?key=a/b"]), 2)
    assert (values_of(source), source.files[0].format, source.files[0].size) == ([1, 2, 3], "jsonl", 6)
    assert folder_of(source, 0) == f"{served.url}/x"
    with pytest.raises(ConfigError, match="No such file"):
        find_files([f"{served.url}/none.jsonl"])
