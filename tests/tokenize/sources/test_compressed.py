"""Compressed files: the same items as without compression, and a reject where they break off."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from support.bad_inputs import damaged
from support.read_sources import items_of, source_of, values_of
from support.tars import tar_of
from support.tokenizing import run_here, settings, turns, write_items
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
def test_a_compressed_file_holds_the_same_items(kind: str, suffix: str, tmp_path: Path) -> None:
    plain = tmp_path / f"i.{kind}"
    plain.write_bytes(content_of(kind, tmp_path))
    path = packed(tmp_path / f"i.{kind}{suffix}", plain.read_bytes())
    assert values_of(source_of(path)) == values_of(source_of(plain))
    assert [item.position for item in items_of(source_of(path))] == list(range(30))
    source = cut(find_files([str(path)]), 7)
    assert [item.position for item in read_piece(source, 0, {3, 29})] == [3, 29]
    assert not list(scratch_folder().glob(".aside-unpacked*"))


def test_tgz_is_a_tar_and_its_items_have_their_names(tmp_path: Path) -> None:
    path = packed(tmp_path / "i.tgz", content_of("tar", tmp_path))
    source = cut(find_files([str(path)]), 7)
    assert [item_name(source, item) for item in read_piece(source, 0)] == [f"{n:03}" for n in range(30)]


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz", "tar.gz", "jsonl.zst", "csv", "csv.gz"])
def test_a_damaged_file_keeps_the_items_before_and_is_counted(kind: str, tmp_path: Path) -> None:
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
            values = values_of(source_of(path))
        except ConfigError:  # nothing in it can be read
            continue
        assert (
            bad == good
            or kind.startswith("csv")
            or any(isinstance(value, ItemError) for value in values)
            or len(values) == 30
        )
    path.write_bytes(good[: len(good) * 2 // 3])
    values = values_of(source_of(path))
    assert isinstance(values[-1], ItemError) or kind == "csv"
    assert not list(scratch_folder().glob(".aside-unpacked*"))


def test_a_decompression_bomb_is_cut(tmp_path: Path) -> None:
    """Decompression is bounded, in memory and on the disk."""
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


def test_a_compressed_source_gives_the_same_dataset(tmp_path: Path, vqgan: Path) -> None:
    plain = write_items(tmp_path, TEXTS)
    path = packed(tmp_path / "items.json.gz", plain.read_bytes())
    shards = []
    for source, out in ((plain, tmp_path / "plain"), (path, tmp_path / "packed")):
        run_here(settings(vqgan, chunk_size=100), source, out)
        shards.append((out / "chunk-000000" / "shard.00000.mds").read_bytes())
    assert shards[0] == shards[1]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_loses_few_of_the_items_before_it(suffix: str, tmp_path: Path) -> None:
    """One read of 8 MB would return nothing if there is damage in it."""
    texts = [{"id": f"i{n}", "conversations": turns(os.urandom(200).hex(), "A.")} for n in range(5000)]
    path = packed(tmp_path / f"i.jsonl{suffix}", b"".join(json.dumps(one).encode() + b"\n" for one in texts))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) * 9 // 10])
    values = values_of(source_of(path))
    kept = [value for value in values if not isinstance(value, ItemError)]
    assert kept == texts[: len(kept)]
    assert len(kept) > 3900
    assert str(values[-1]).startswith("input cut: after ")
    path.write_bytes(good + b"secret")
    values = values_of(source_of(path))
    assert [value for value in values if not isinstance(value, ItemError)][:4900] == texts[:4900]
    assert "secr" not in str(values[-1])


def test_a_full_disk_is_no_damage_of_the_file(tmp_path: Path) -> None:
    """Taken for damage, it would leave a dataset without those items that counts as finished."""
    texts = [{"id": f"i{n}", "conversations": turns(f"What {n}?", "A.")} for n in range(5000)]
    path = packed(tmp_path / "i.jsonl.gz", b"".join(json.dumps(one).encode() + b"\n" for one in texts))
    program = f"""
import resource, sys
sys.path.insert(0, "tests")
from pathlib import Path
from support.read_sources import items_of, source_of, values_of
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    print("read", len(values_of(source_of(Path({str(path)!r})))))
except OSError as error:
    print("OSError", error.errno)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == f"OSError {errno.EFBIG}\n"
