"""Compressed sources and CSV: the same items as without, and what breaks off is a reject."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.bad_inputs import damaged
from support.read_sources import whole
from support.tars import tar_of
from support.tokenizing import png, run_here, settings, turns, write_items
from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError
from unitoken.common.files import scratch_folder
from unitoken.tokenize.sources.reader import cut, find_files, item_name, read_piece

TEXTS = [{"id": f"i{n}", "conversations": turns(f"What {n}?", "A.")} for n in range(30)]


def packed(path: Path, content: bytes) -> Path:
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content))
    return path


def content_of(kind: str, folder: Path) -> bytes:
    if kind == "json":
        return json.dumps(TEXTS).encode()
    if kind == "jsonl":
        return b"".join(json.dumps(one).encode() + b"\n" for one in TEXTS)
    if kind == "tar":
        members = [(f"{n:03}.json", json.dumps(one).encode()) for n, one in enumerate(TEXTS)]
        return tar_of(folder / "i.tar", members).read_bytes()
    tab = "," if kind == "csv" else "\t"
    return "".join(
        f"{tab.join(row)}\n" for row in [("id", "text")] + [(f"00{n}", f'"a\nb{n}"') for n in range(30)]
    ).encode()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "tar", "csv", "tsv"])
def test_what_is_compressed_is_read_as_without(kind: str, suffix: str, tmp_path: Path) -> None:
    plain = tmp_path / f"i.{kind}"
    plain.write_bytes(content_of(kind, tmp_path))
    path = packed(tmp_path / f"i.{kind}{suffix}", plain.read_bytes())
    assert [item.value for item in whole(path)] == [item.value for item in whole(plain)]
    assert [item.position for item in whole(path)] == list(range(30))
    source = cut(find_files([str(path)]), 7)
    assert [item.position for item in read_piece(source, 0, {3, 29})] == [3, 29]
    assert not list(scratch_folder().glob(".aside-unpacked*"))


def test_tgz_is_a_tar_and_its_items_have_their_names(tmp_path: Path) -> None:
    path = packed(tmp_path / "i.tgz", content_of("tar", tmp_path))
    source = cut(find_files([str(path)]), 7)
    assert [item_name(source, item) for item in read_piece(source, 0)] == [f"{n:03}" for n in range(30)]


def test_a_row_of_csv_is_text_by_name_and_a_ragged_one_a_reject(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_bytes(b'\xef\xbb\xbfid,caption\n007,"a, b\nc"\n1\n2,d,e\n3,\n')
    *good, one, two = [item.value for item in whole(tmp_path / "i.csv")]
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
def test_a_quote_that_is_never_closed_is_a_cut_and_swallows_no_rows_in_silence(
    end: bytes, closed: bool, tmp_path: Path
) -> None:
    (tmp_path / "i.csv").write_bytes(b"id,caption\n1,a\n2,b\n" + end)
    *good, last = [item.value for item in whole(tmp_path / "i.csv")]
    assert [one["id"] for one in good] == ["1", "2"]
    assert (str(last) != "input cut: a quote that is opened in this row is never closed") is closed


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz", "tar.gz", "jsonl.zst", "csv", "csv.gz"])
def test_what_breaks_off_keeps_what_came_before_and_is_counted(kind: str, tmp_path: Path) -> None:
    inner = kind.partition(".")[0]
    path = tmp_path / f"i.{kind}"
    content = content_of(inner, tmp_path)
    if kind == "csv":
        path.write_bytes(content)
    else:
        packed(path, content)
    good = path.read_bytes()
    for _, bad in damaged(good, 0, 60):
        path.write_bytes(bad)
        try:
            values = [item.value for item in whole(path)]
        except ConfigError:  # nothing in it can be read
            continue
        assert (
            bad == good
            or kind.startswith("csv")
            or any(isinstance(value, ItemError) for value in values)
            or len(values) == 30
        )
    path.write_bytes(good[: len(good) * 2 // 3])
    values = [item.value for item in whole(path)]
    assert isinstance(values[-1], ItemError) or kind == "csv"
    assert not list(scratch_folder().glob(".aside-unpacked*"))


def test_a_bomb_is_cut(tmp_path: Path) -> None:
    """It takes neither memory nor more of the disk than its bound."""
    path = tmp_path / "i.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(1200):
            stream.write(b"{}".ljust((1 << 20) - 1) + b"\n")
    program = f"""
import re
from pathlib import Path
from unitoken.storage.folder import Folder
from unitoken.tokenize.sources.base import SourceFile
from unitoken.tokenize.sources.compressed import compressed_values
from unitoken.tokenize.sources.json_files import line_values

def read_all(file):
    return line_values(file, 0, file.size, None)

path = Path({str(path)!r})
file = SourceFile(Folder(path.parent), path.name, path.stat().st_size, str(path))
values = [value for _, value in compressed_values(file, ".gz", read_all, None, max_ratio=0)]
print(len(values), str(values[-1])[:90])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, peak = found.stdout.splitlines()
    assert "input cut: it unpacks to more than 0 times" in first
    assert int(peak) < 1000


def test_a_table_of_columns_is_not_read_from_a_packed_file(tmp_path: Path) -> None:
    (tmp_path / "i.parquet.gz").write_bytes(b"x")
    with pytest.raises(
        ConfigError, match=r"i\.parquet\.gz: a table of columns is not read from a \.gz file: unpack it"
    ):
        find_files([str(tmp_path / "i.parquet.gz")])


@pytest.mark.parametrize("name", ["i.zip", "i.doc", "i.json.bz2", "i.gz"])
def test_an_unknown_type_is_named_with_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    if name == "i.gz":
        return  # a name without an ending before it is taken for JSON
    with pytest.raises(ConfigError, match=r"a file of an unknown type .*; known are \.json, \.jsonl"):
        find_files([str(tmp_path / name)])


def test_a_compressed_source_is_tokenized_to_the_bytes_of_the_plain_one(tmp_path: Path, vqgan: Path) -> None:
    plain = write_items(tmp_path, TEXTS)
    path = packed(tmp_path / "items.json.gz", plain.read_bytes())
    shards = []
    for source, out in ((plain, tmp_path / "plain"), (path, tmp_path / "packed")):
        run_here(settings(vqgan, chunk_size=100), source, out)
        shards.append((out / "chunk-000000" / "shard.00000.mds").read_bytes())
    assert shards[0] == shards[1]


def test_a_folder_of_pictures_is_read_as_a_tar_of_them(tmp_path: Path, vqgan: Path) -> None:
    """With what img2dataset writes beside, and what macOS does."""
    folder = tmp_path / "images"
    for n in range(5):
        (folder / f"0000{n % 2}").mkdir(parents=True, exist_ok=True)
        stem = folder / f"0000{n % 2}" / f"{n:09}"
        stem.with_suffix(".jpg").write_bytes(png())
        stem.with_suffix(".txt").write_text(f"picture {n}")
        (stem.parent / f"._{n:09}.jpg").write_bytes(b"x")
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"x")
    source = cut(find_files([str(folder)]), 2)
    items = [item for piece in range(len(source.pieces)) for item in read_piece(source, piece)]
    assert [item_name(source, item) for item in items] == [f"00000/{n:09}" for n in (0, 2, 4)] + [
        f"00001/{n:09}" for n in (1, 3)
    ]
    assert items[0].value == {"__key__": "00000/000000000", "jpg": png(), "txt": "picture 0"}
    assert [item.position for item in read_piece(source, 1, {3})] == [3]

    run_here(settings(vqgan, adapter="caption", chunk_size=2), folder, tmp_path / "out")
    assert [
        line for path in (tmp_path / "out").rglob("rejects.jsonl") for line in path.read_text().splitlines()
    ] == []
    with pytest.raises(ConfigError, match="or one of pictures; found another folder"):
        find_files([str(tmp_path / "out")])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_loses_little_of_what_came_before(suffix: str, tmp_path: Path) -> None:
    """A read of 8 MB that met the damage gave nothing at all."""
    texts = [{"id": f"i{n}", "conversations": turns(os.urandom(200).hex(), "A.")} for n in range(5000)]
    path = packed(tmp_path / f"i.jsonl{suffix}", b"".join(json.dumps(one).encode() + b"\n" for one in texts))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) * 9 // 10])
    values = [item.value for item in whole(path)]
    kept = [value for value in values if not isinstance(value, ItemError)]
    assert kept == texts[: len(kept)]
    assert len(kept) > 3900
    assert str(values[-1]).startswith("input cut: after ")
    path.write_bytes(good + b"secret")
    values = [item.value for item in whole(path)]
    assert [value for value in values if not isinstance(value, ItemError)][:4900] == texts[:4900]
    assert "secr" not in str(values[-1])


def test_a_full_disk_is_no_damage_of_the_file(tmp_path: Path) -> None:
    """It would be counted as a cut, and a dataset without those items would be called finished."""
    texts = [{"id": f"i{n}", "conversations": turns(f"What {n}?", "A.")} for n in range(5000)]
    path = packed(tmp_path / "i.jsonl.gz", b"".join(json.dumps(one).encode() + b"\n" for one in texts))
    program = f"""
import resource, sys
sys.path.insert(0, "tests")
from pathlib import Path
from support.read_sources import whole
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    print("read", len(whole(Path({str(path)!r}))))
except OSError as error:
    print("OSError", error.errno)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == f"OSError {errno.EFBIG}\n"


def test_what_lies_in_a_folder_and_can_not_be_used_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in (
        ("a.png", png()),
        ("a.txt", b"a"),
        ("b.mp4", b"x"),
        ("b.txt", b"b"),
        ("c.png", png()),
        ("c.PNG", png()),
    ):
        (folder / name).write_bytes(content)
    (folder / "d.png").write_bytes(png())
    (folder / "d.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    (folder / "e.png").symlink_to(folder / "nowhere.png")
    values = {
        item_name(source, item): item.value
        for source in [cut(find_files([str(folder)]), 10)]
        for item in read_piece(source, 0)
    }
    assert values["a"] == {"__key__": "a", "png": png(), "txt": "a"}
    assert values["b"] == {"__key__": "b", "mp4": b"x", "txt": "b"}  # and so the adapter names it
    errors = [str(value) for value in values.values() if isinstance(value, ItemError)]
    assert sorted(errors)[:2] == [
        "bad sample: c: two files that end in .png",
        "bad sample: d.txt is a link that leads out of the folder",
    ]
    assert len(errors) == 3


def test_a_byte_of_another_encoding_costs_no_row_before_it(tmp_path: Path) -> None:
    rows = b"".join(b"%d,text\n" % n for n in range(1000))
    (tmp_path / "i.csv").write_bytes(b"id,caption\n" + rows + b"1000,caf\xe9\n")
    *good, last = [item.value for item in whole(tmp_path / "i.csv")]
    assert len(good) == 1000
    assert str(last) == f"input cut: byte {len(rows) + 11 + 8} is not UTF-8"


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
def test_two_columns_of_one_name_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"i.{kind}"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["image", "image"])
    if kind == "csv":
        path.write_text("image,image\na,b\n")
        (value,) = [item.value for item in whole(path)]
        assert str(value) == "input cut: two columns are called 'image'"
        return
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(ConfigError, match="two columns are called 'image'"):
        whole(path)


def test_rows_that_stand_in_no_bytes_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "i.arrow"
    with pa.ipc.new_stream(path, pa.schema([("a", pa.null())])) as stream:
        stream.write_batch(pa.record_batch([pa.nulls(2_000_000_000)], names=["a"]))
    with pytest.raises(ConfigError, match=r"rows in .* bytes are no data"):
        whole(path)
