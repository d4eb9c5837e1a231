"""Each format: what is written by the field's own tools is read back, and what is damaged is counted."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from support.services import CLOUDS, started, used
from support.tars import tar_of
from unitoken.common.errors import ConfigError
from unitoken.storage.folder import Folder
from unitoken.storage.open import open_store
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources import json_files, reader, tars
from unitoken.tokenize.sources.base import SourceFile
from unitoken.tokenize.sources.reader import Input, cut, find_files, item_name, read_piece


def source_of(path: Path, chunk_size: int = 10) -> Input:
    return cut(find_files([str(path)]), chunk_size)


def opened(path: Path, **limits: int) -> SourceFile:
    return SourceFile(Folder(path.parent), path.name, path.stat().st_size, str(path), **limits)


def whole(source: Input) -> list[Any]:
    return [item.value for piece in range(len(source.pieces)) for item in read_piece(source, piece)]


# --- JSON ---------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
blanks = st.text(st.sampled_from(" \t\r\n"), max_size=3)


@st.composite
def json_lists(draw: st.DrawFn) -> tuple[list[Any], bytes]:
    """A list and a text of it, with blanks wherever they may stand."""
    values = draw(st.lists(json_values, min_size=1, max_size=8))
    ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 1]))
    texts = [json.dumps(value, ensure_ascii=ascii_only, indent=indent) for value in values]
    text = (
        draw(blanks) + "[" + ",".join(draw(blanks) + one + draw(blanks) for one in texts) + "]" + draw(blanks)
    )
    return values, (draw(st.sampled_from(["", "\ufeff"])) + text).encode("utf-8", "surrogatepass")


@given(json_lists(), st.integers(1, 4), st.sampled_from([1, 2, 3, 7, 64, 1 << 20]))
@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_list_is_what_json_loads_says_for_any_window_and_any_piece(
    tmp_path: Path, content: tuple[list[Any], bytes], chunk_size: int, window: int
) -> None:
    values, text = content
    (tmp_path / "i.json").write_bytes(text)
    file = opened(tmp_path / "i.json", block_bytes=window)
    spans = list(json_files.list_spans(file, chunk_size))
    pieces = [list(json_files.list_values(file, span.start, span.end, None)) for span in spans]
    assert [value for piece in pieces for _, value in piece] == values
    assert [number for number, _ in pieces[-1]] == list(range(len(pieces[-1])))
    assert [span.items for span in spans] == [len(piece) for piece in pieces]
    assert len(spans) == -(-len(values) // chunk_size)
    assert whole(source_of(tmp_path / "i.json", chunk_size)) == values


@given(json_lists(), st.data())
@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_list_cut_anywhere_keeps_what_stands_before(
    tmp_path: Path, content: tuple[list[Any], bytes], data: st.DataObject
) -> None:
    values, text = content
    text = text.rstrip()
    (tmp_path / "i.json").write_bytes(text[: data.draw(st.integers(0, len(text) - 1))])
    try:
        *before, error = whole(source_of(tmp_path / "i.json", data.draw(st.integers(1, 3))))
    except ConfigError:
        return
    assert str(error).startswith("input cut: at byte ")
    assert before[:-1] == values[: len(before[:-1])]  # the last one may be a number that lost its end
    assert len(before) <= len(values)


@given(
    st.lists(json_values, min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from([1, 3, 64, 1 << 20]),
    st.data(),
)
@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_lines_are_what_json_loads_says(
    tmp_path: Path, values: list[Any], chunk_size: int, window: int, data: st.DataObject
) -> None:
    ends = [data.draw(st.sampled_from(["\n", "\r\n", "\n\n", " \n\t\n"])) for _ in values]
    text = "".join(
        json.dumps(value, ensure_ascii=False) + end for value, end in zip(values, ends, strict=True)
    )
    (tmp_path / "i.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    file = opened(tmp_path / "i.jsonl", block_bytes=window)
    spans = list(json_files.line_spans(file, chunk_size))
    pieces = [list(json_files.line_values(file, span.start, span.end, None)) for span in spans]
    assert [value for piece in pieces for _, value in piece] == values
    assert whole(source_of(tmp_path / "i.jsonl", chunk_size)) == values


def test_a_long_element_is_scanned_a_few_times_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows double: 1000 blocks are not 1000 scans."""
    scans: list[int] = []

    class Scanner:
        def raw_decode(self, text: str, at: int) -> tuple[object, int]:
            scans.append(len(text))
            return json.JSONDecoder().raw_decode(text, at)

    monkeypatch.setattr(json_files, "SCANNER", Scanner())
    (tmp_path / "i.json").write_text(json.dumps(["x" * 100_000]))
    file = opened(tmp_path / "i.json", block_bytes=100)
    (span,) = json_files.list_spans(file, 10)
    ((_, value),) = json_files.list_values(file, span.start, span.end, None)
    assert value == "x" * 100_000
    assert 2 < len(scans) < 2 * 14


# --- tars ---------------------------------------------------------------------------------------------------


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%02d.tar"), maxcount=2, verbose=0) as writer:
        for n in range(5):
            writer.write(
                {
                    "__key__": f"a/{n:05d}",
                    "jpg": b"%d" % n,
                    "txt": f"text {n}\u2028",
                    "json": {"n": n},
                    "seg.PNG": b"s",
                }
            )
    source = cut(find_files([f"{tmp_path}/*.tar"]), 1000)
    items = [item for piece in range(len(source.pieces)) for item in read_piece(source, piece)]
    assert [item.value for item in items] == [
        {
            "__key__": f"a/{n:05d}",
            "jpg": b"%d" % n,
            "txt": f"text {n}\u2028",
            "json": {"n": n},
            "seg.png": b"s",
        }
        for n in range(5)
    ]
    assert [(item.file, item.position) for item in items] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert [item_name(source, item) for item in items] == [f"a/{n:05d}" for n in range(5)]
    assert source.items is None
    assert [item.value["__key__"] for item in read_piece(source, 1, {1})] == ["a/00003"]  # type: ignore[index]


def test_bad_samples_are_counted_in_their_place(tmp_path: Path) -> None:
    members = [
        ("good.txt", b"1"),
        ("bad.json", b"{"),
        ("twice.txt", b"1"),
        ("twice.TXT", b"2"),
        ("latin.txt", b"\xff"),
        ("large.jpg", b"x" * 600),
        ("large.png", b"x" * 600),
        ("README", b"no suffix"),
        ("last.txt", b"2"),
    ]
    path = tar_of(tmp_path / "i.tar", members)
    first, *bad, last = [value for _, value in tars.tar_values(opened(path, max_item_bytes=1000), None)]
    assert (first, last) == ({"__key__": "good", "txt": "1"}, {"__key__": "last", "txt": "2"})
    assert [str(error) for error in bad] == [
        "not readable as JSON: bad.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "bad sample: twice: two files that end in .txt",
        "not UTF-8: latin.txt: byte 0 is 0xff",
        "item too large: large: more than 1000 bytes",
    ]


def test_folders_and_links_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "i.tar", "w") as tar:
        for name, kind in (
            ("a", tarfile.DIRTYPE),
            ("a/1.jpg", tarfile.SYMTYPE),
            ("a/2.jpg", tarfile.LNKTYPE),
            ("p", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert whole(source_of(tmp_path / "i.tar")) == []


def test_a_tar_cut_anywhere_keeps_the_samples_before(tmp_path: Path) -> None:
    members = [(f"{n}.{suffix}", bytes([65 + n]) * 600) for n in range(4) for suffix in ("jpg", "txt")]
    whole_tar = tar_of(tmp_path / "whole.tar", members).read_bytes()
    good = whole(source_of(tmp_path / "whole.tar"))
    assert len(good) == 4
    content = len(members) * (512 + 1024)
    for size in [*range(512, content + 512, 171), content]:
        (tmp_path / "cut.tar").write_bytes(whole_tar[:size])
        *before, error = whole(source_of(tmp_path / "cut.tar"))
        assert before == good[: len(before)]
        assert len(before) >= size // (2 * 1536) - 1
        assert str(error).startswith("input cut: "), size


@pytest.mark.parametrize("at", [1536, 3 * 1536])
def test_a_broken_header_is_not_taken_for_the_end(tmp_path: Path, at: int) -> None:
    path = tar_of(tmp_path / "i.tar", [(f"{n}.jpg", b"x" * 600) for n in range(4)])
    content = bytearray(path.read_bytes())
    content[at : at + 100] = b"?" * 100
    path.write_bytes(content)
    *before, error = whole(source_of(path))
    assert len(before) == at // 1536 - 1  # the one before may go on behind the damage
    assert str(error).startswith(
        f"input cut: at byte {at} of {len(content)}: expected a file or the end of the archive, found "
    )


def test_a_tar_behind_a_tar_is_reported(tmp_path: Path) -> None:
    one = tar_of(tmp_path / "one.tar", [("1.jpg", b"1"), ("2.jpg", b"2")]).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    assert str(whole(source_of(tmp_path / "two.tar"))[-1]).startswith("input cut: ")


def test_a_tar_that_leads_back_to_itself_ends(tmp_path: Path) -> None:
    """CVE-2025-8194: a negative size let tarfile read the same header for ever."""
    info = tarfile.TarInfo("2.jpg")
    info.size = -1024
    header = info.tobuf(tarfile.GNU_FORMAT)
    one = tar_of(tmp_path / "i.tar", [("1.jpg", b"1")]).read_bytes()
    (tmp_path / "i.tar").write_bytes(one[:1024] + header + bytes(10240))
    assert str(whole(source_of(tmp_path / "i.tar"))[-1]).startswith("input cut: ")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x1f\x8b" * 400])
def test_a_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "i.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"i\.tar: not a tar: "):
        source_of(tmp_path / "i.tar")


def test_names_that_are_not_unicode_can_be_written_down(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "i.tar", [("caf\udce9.txt", b"1")])
    source = source_of(path)
    [item] = read_piece(source, 0)
    assert item_name(source, item) == "caf\\xe9"


# --- Parquet and Arrow --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_parquet_is_cut_by_rows_wherever_its_groups_end(tmp_path: Path, chunk_size: int) -> None:
    source = source_of(write_parquet(tmp_path / "i.parquet", some_rows(150), 40), chunk_size)
    assert whole(source) == some_rows(150)
    assert len(source.pieces) == -(-150 // chunk_size)
    assert source.items == 150


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_is_cut_by_rows_wherever_its_batches_end(tmp_path: Path, stream: bool) -> None:
    source = source_of(write_arrow(tmp_path / "i.arrow", some_rows(50), 8, stream), 7)
    assert whole(source) == some_rows(50)
    assert [item.value for item in read_piece(source, 2, {14, 16})] == [some_rows(50)[14], some_rows(50)[16]]


def test_a_folder_of_hugging_face_datasets_is_its_files_in_order(tmp_path: Path) -> None:
    rows = some_rows(20)
    files = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for number, name in enumerate(files):
        write_arrow(tmp_path / name, rows[10 * number : 10 * number + 10], 4)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    write_arrow(tmp_path / "cache-1.arrow", rows, 4)  # what a map() left behind
    assert whole(source_of(tmp_path)) == rows


def test_a_folder_of_arrow_files_without_a_state_is_all_of_them(tmp_path: Path) -> None:
    for number in range(2):
        write_arrow(tmp_path / f"{number}.arrow", some_rows(4)[2 * number : 2 * number + 2], 4)
    assert whole(source_of(tmp_path)) == some_rows(4)


def test_of_several_splits_one_is_to_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"holds several splits: choose from .*/train, .*/test"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize("name", ["i.parquet", "i.arrow"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PAR1", b"ARROW1\0\0"])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: not readable as (Parquet|Arrow): "):
        source_of(tmp_path / name)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("chunk_size", [7, 25, 1000])
def test_rows_behind_a_damaged_page_are_each_a_reject(
    tmp_path: Path, chunk_size: int, checksum: bool
) -> None:
    """The other groups are read; and the same rows are lost whatever the pieces."""
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
    values = whole(source_of(path, chunk_size))
    assert values[:20] + values[40:] == rows[:20] + rows[40:]
    assert {str(value).partition(": ")[0] for value in values[20:40]} == {"unreadable rows"}
    assert len({str(value) for value in values[20:40]}) == 1


def test_text_that_is_not_unicode_costs_its_row_only(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff", b"b"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "i.parquet")
    first, wrong, last = whole(source_of(tmp_path / "i.parquet"))
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert str(wrong).startswith("unreadable row: ")


def test_an_arrow_stream_cut_anywhere_keeps_what_stands_before(tmp_path: Path) -> None:
    rows = some_rows(20)
    content = write_arrow(tmp_path / "whole.arrow", rows, 5).read_bytes()
    outcomes = set()
    for size in (*range(0, len(content), 61), len(content) - 4):
        (tmp_path / "i.arrow").write_bytes(content[:size])
        try:
            *before, error = whole(source_of(tmp_path / "i.arrow", 3))
        except ConfigError:
            continue
        assert before == rows[: len(before)]
        assert str(error).startswith("input cut: behind row ")
        outcomes.add(len(before))
    assert outcomes == {5, 10, 15, 20}


def test_a_damaged_batch_is_a_reject_for_each_of_its_rows(tmp_path: Path) -> None:
    """Arrow follows offsets without a look: 4 GiB beyond the file."""
    rows = [{"text": "abcd"} for _ in range(8)]
    path = write_arrow(tmp_path / "i.arrow", rows, 4)
    content = bytearray(path.read_bytes())
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12, 16))
    at = content.index(offsets)
    content[at + 8 : at + 12] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    values = whole(source_of(path, 3))
    assert values[4:] == rows[4:]
    assert {str(value).partition(":")[0] for value in values[:4]} == {"unreadable rows"}


def test_a_store_that_fails_is_no_damage_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a network that is down would become rejects."""
    paths = [
        write_parquet(tmp_path / "i.parquet", some_rows(50), 10),
        write_arrow(tmp_path / "i.arrow", some_rows(50), 10),
        tar_of(tmp_path / "i.tar", [("1.jpg", b"1")]),
    ]
    whole_folder = Folder(tmp_path)
    for path in paths:
        source, asked = source_of(path), 0

        class Failing(Folder):
            def read_range(self, name: str, start: int, end: int) -> bytes:
                nonlocal asked
                asked += 1
                if asked > (3 if name == "i.parquet" else 0):
                    raise StoreError("the store is gone")
                return whole_folder.read_range(name, start, end)

        failing = Failing(tmp_path)
        monkeypatch.setattr(reader, "open_store", lambda url, failing=failing: failing)
        with pytest.raises(StoreError, match="the store is gone"):
            whole(source)
        with pytest.raises(ConfigError, match="cannot read the input: the store is gone"):
            cut(source.files, 10)
        monkeypatch.undo()


@pytest.mark.cloud
@pytest.mark.parametrize("scheme", CLOUDS)
def test_every_format_is_read_from_a_store_as_from_a_folder(scheme: str, tmp_path: Path) -> None:
    rows, folder = some_rows(30), tmp_path / "data"
    plain = [{"n": n} for n in range(30)]
    folder.mkdir()
    write_parquet(folder / "i.parquet", rows, 8)
    (folder / "hf").mkdir()
    write_arrow(folder / "hf" / "data.arrow", rows, 8)
    (folder / "hf" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "i.json").write_text(json.dumps(plain))
    (folder / "i.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in plain))
    for number in range(2):
        tar_of(
            folder / f"x-{number}.tar",
            [(f"{number}{n}.json", json.dumps(one).encode()) for n, one in enumerate(plain)],
        )
    with started(scheme, tmp_path / scheme) as service, used(service):
        url = service.url("data")
        for path in folder.rglob("*.*"):
            open_store(url).write(path.relative_to(folder).as_posix(), path.read_bytes())
        for name in ("i.parquet", "hf", "i.json", "i.jsonl", "x-*.tar"):
            here, there = (cut(find_files([f"{place}/{name}"]), 7) for place in (folder, url))
            assert [Path(file.name).name for file in there.files] == [
                Path(file.name).name for file in here.files
            ]
            assert there.pieces == here.pieces
            assert whole(there) == whole(here)
        with pytest.raises(ConfigError, match=r"none\.json: cannot read the input: No such file"):
            find_files([f"{url}/none.json"])


def test_a_parquet_column_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    """29 kB of zstd became 2.5 GB in memory."""
    path = tmp_path / "i.parquet"
    rows = pa.table({"id": ["a", "b"], "blob": [bytes(200 << 20), bytes(200 << 20)]})
    pq.write_table(rows, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    values = whole(source_of(path))
    assert len(values) == 2
    assert all("column 'blob' unpacks from " in str(value) for value in values)


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_a_header_of_gigabytes_ends_the_tar(kind: bytes, tmp_path: Path) -> None:
    """Tarfile would read it whole: 6 GB of memory, or minutes of looking through it."""
    path = tar_of(tmp_path / "a.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 3 << 30
    content = path.read_bytes()[:2048] + header.tobuf(tarfile.GNU_FORMAT)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(3 << 30)  # takes no room on the disk
    begun = time.monotonic()
    first, last = [item.value for item in read_piece(cut(find_files([str(path)]), 10), 0)]
    assert time.monotonic() - begun < 20
    assert first == {"__key__": "a", "txt": "x"}
    assert str(last).startswith("input cut: at byte 2048 of ")
    assert "a header of 3221225472 bytes" in str(last)


def test_a_sparse_file_larger_than_its_tar_is_a_reject(tmp_path: Path) -> None:
    """5 kB would become a gigabyte of zeros."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 10
        info.pax_headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": str((1 << 30) - 5000)}
        tar.addfile(info, io.BytesIO(b"x" * 10))
        info = tarfile.TarInfo("b.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"y"))
    first, second = [item.value for item in read_piece(cut(find_files([str(path)]), 10), 0)]
    assert str(first).startswith("item too large: a")
    assert second == {"__key__": "b", "txt": "y"}
