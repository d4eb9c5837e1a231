"""The input: what a name stands for, how it is cut, what is read, what is said of a file that is none."""

import json
import os
from pathlib import Path

import pytest

from support.served import Server, served  # noqa: F401 - a fixture
from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources import base as formats
from unitoken.tokenize.sources import reader
from unitoken.tokenize.sources.reader import Input, RawItem, base, cut, find_files, item_name, read_piece


def whole(source: Input) -> list[object]:
    return [item.value for piece in range(len(source.pieces)) for item in read_piece(source, piece)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def names(files: list[reader.InputFile]) -> list[str]:
    return [Path(file.name).name for file in files]


# --- names -----------------------------------------------------------------------------------------------------------


def test_files_come_in_the_order_of_their_names_within_a_glob_and_as_given_over_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json", "x-09.tar", "x-10.tar", "x-11.tar"):
        write(tmp_path / name, "[]")
    found = find_files(
        [f"{tmp_path}/*.jsonl", f"{tmp_path}/x-{{09..10}}.tar", f"{tmp_path}/a.jsonl", f"{tmp_path}/c.json"]
    )
    assert names(found) == ["a.jsonl", "b.jsonl", "x-09.tar", "x-10.tar", "a.jsonl", "c.json"]
    assert [file.format for file in found] == ["jsonl", "jsonl", "webdataset", "webdataset", "jsonl", "json"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    assert names(find_files([write(tmp_path / "a[1].json", "[1]")])) == ["a[1].json"]


@pytest.mark.parametrize("name", ["*.tar", "x-{3..2}.json"])
def test_a_name_that_stands_for_nothing_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        find_files([f"{tmp_path}/{name}"])


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


def test_globs_over_a_store_stay_in_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def sizes(self, prefix: str) -> dict[str, int]:
            assert prefix == "x-"
            return dict.fromkeys(["x-2.tar", "x-1.tar", "x-1.tar.txt", "x-y/x-3.tar"], 1)

    monkeypatch.setattr(reader, "open_store", lambda url: {"s3://bucket/data": Store()}[url])
    assert reader._matches("s3://bucket/data/x-*.tar") == [
        "s3://bucket/data/x-1.tar",
        "s3://bucket/data/x-2.tar",
    ]


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
    found = [base(Input(files=files, pieces=[]), number) for number in range(len(files))]
    assert found == ["data", ".", "/", "s3://bucket/x", "https://host/x"]


def test_versions_follow_the_content_and_not_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hashed in (reader.HASHED_BYTES, 1000):  # all of it, and blocks of it
        monkeypatch.setattr(reader, "HASHED_BYTES", hashed)
        one, same, other = (
            write(tmp_path / name, content * 100_000)
            for name, content in (("1", b"ab"), ("2", b"ab"), ("3", b"ac"))
        )
        versions = [file.version for file in find_files([one, same, other])]
        assert versions[0] == versions[1] != versions[2]


def test_the_fingerprint_is_of_content_and_borders(tmp_path: Path) -> None:
    one, same, other = (
        write(tmp_path / name, text)
        for name, text in (("1", "[1, 2, 3]"), ("2", "[1, 2, 3]"), ("3", "[1, 2, 4]"))
    )

    def fingerprint(name: str, size: int) -> str:
        return cut(find_files([name]), size).fingerprint

    assert fingerprint(one, 2) == fingerprint(same, 2)
    assert len({fingerprint(one, 2), fingerprint(one, 1), fingerprint(other, 2)}) == 3


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "size"), [(1, 1), (10, 3), (9, 3), (2, 5)])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_pieces_hold_every_item_once_in_order(tmp_path: Path, items: int, size: int, suffix: str) -> None:
    values = list(range(items))
    text = json.dumps(values) if suffix == "json" else "\n".join(map(str, values))
    source = cut(find_files([write(tmp_path / f"i.{suffix}", text)]), size)
    assert whole(source) == values
    assert [piece.items for piece in source.pieces] == [
        len(values[start : start + size]) for start in range(0, items, size)
    ]
    assert [piece.position for piece in source.pieces] == list(range(0, items, size))
    assert source.items == items


def test_no_piece_crosses_a_file_and_an_input_survives_being_stored(tmp_path: Path) -> None:
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
    assert whole(source) == [1, 2, 3, 4, 5]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    source = cut(find_files([write(tmp_path / "i.jsonl", "".join(f"{n}\n" for n in range(10)))]), 4)
    assert list(read_piece(source, 1, {5, 7})) == [RawItem(1, 0, 5, 5), RawItem(1, 0, 7, 7)]


def test_items_are_named_by_their_place(tmp_path: Path) -> None:
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
        assert whole(cut(find_files([str(tmp_path / name)]), 10)) == items


# --- what is damaged -------------------------------------------------------------------------------------------------


def test_a_bad_line_is_a_bad_item_in_its_place(tmp_path: Path) -> None:
    lines = b'{"a": 1}\n{"cut\n"\xff"\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b'\n{"b": 2}\n'
    first, *bad, last = whole(cut(find_files([write(tmp_path / "i.jsonl", lines)]), 10))
    assert (first, last) == ({"a": 1}, {"b": 2})
    reasons = [str(error) for error in bad if isinstance(error, ItemError)]
    assert [reason.partition(":")[0] for reason in reasons] == ["not readable as JSON", "not UTF-8"] + [
        "not readable as JSON"
    ] * 2
    assert all(len(reason) < 300 for reason in reasons)


def test_a_bad_element_is_a_bad_item_in_its_place(tmp_path: Path) -> None:
    source = cut(find_files([write(tmp_path / "i.json", b'[1, "\xff", ' + b"9" * 5000 + b", 4]")]), 10)
    first, wrong, long, last = whole(source)
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
        (
            "i.jsonl",
            '1\n2\n{"b',
            "at byte 4 of 7: the last line has no end: not readable as JSON: Unterminated string",
        ),
    ],
)
def test_where_a_file_breaks_off_all_before_is_kept(
    tmp_path: Path, name: str, content: str, reason: str, size: int
) -> None:
    source = cut(find_files([write(tmp_path / name, content)]), size)
    first, second, error = whole(source)
    assert (first, second, source.items) == (1, 2, 3)
    assert str(error).startswith(f"input cut: {reason}")
    assert all((piece.items or 0) <= size for piece in source.pieces)
    assert [str(item.value) for item in read_piece(source, len(source.pieces) - 1, {2})] == [str(error)]


def test_a_last_line_without_its_end_is_whole_if_it_can_be_read(tmp_path: Path) -> None:
    assert whole(cut(find_files([write(tmp_path / "i.jsonl", '1\n{"a": 2}')]), 10)) == [1, {"a": 2}]


def test_items_are_limited_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unitoken.tokenize.sources import json_files

    monkeypatch.setattr(json_files, "MAX_ITEM_BYTES", 100)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 64)
    one, long, two = whole(cut(find_files([write(tmp_path / "i.jsonl", f'1\n"{"x" * 500}"\n2\n')]), 10))
    assert (one, two, str(long)) == (1, 2, "item too large: more than 100 bytes")
    one, long = whole(cut(find_files([write(tmp_path / "i.json", f'[1, "{"x" * 500}", 2]')]), 10))
    assert str(long) == "input cut: at byte 4 of 510: an item of more than 100 bytes"


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
def test_a_file_that_is_no_longer_the_one_that_was_cut_is_refused(
    tmp_path: Path, name: str, before: str, after: str
) -> None:
    source = cut(find_files([write(tmp_path / name, before)]), 10)
    write(tmp_path / name, after)
    with pytest.raises(ConfigError, match="has changed since it was cut"):
        whole(source)


# --- https -----------------------------------------------------------------------------------------------------------


def test_a_source_behind_a_url_is_read_by_ranges(served: Server) -> None:  # noqa: F811
    served.files["/x/i.jsonl"] = b"1\n2\n3\n"
    source = cut(find_files([f"{served.url}/x/i.jsonl?key=a/b"]), 2)
    assert (whole(source), source.files[0].format, source.files[0].size) == ([1, 2, 3], "jsonl", 6)
    assert base(source, 0) == f"{served.url}/x"
    with pytest.raises(ConfigError, match="No such file"):
        find_files([f"{served.url}/none.jsonl"])


@pytest.mark.parametrize("last", ["9999999999", "9" * 5000])
def test_a_range_of_too_many_files_is_one_line(last: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands for more than 1000000 files"):
        find_files([f"{tmp_path}/{{0..{last}}}.tar"])
