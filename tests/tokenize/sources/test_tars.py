"""WebDataset tars: samples as webdataset writes them, and a reject for each damage."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from support.read_sources import opened, source_of, values_of
from support.tars import tar_of
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources import tars
from unitoken.tokenize.sources.reader import cut, find_files, item_name, read_piece


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
        "not readable as JSON: bad.json: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
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
    assert values_of(source_of(tmp_path / "i.tar")) == []


def test_a_tar_cut_anywhere_keeps_the_samples_before(tmp_path: Path) -> None:
    members = [(f"{n}.{suffix}", bytes([65 + n]) * 600) for n in range(4) for suffix in ("jpg", "txt")]
    whole_tar = tar_of(tmp_path / "whole.tar", members).read_bytes()
    good = values_of(source_of(tmp_path / "whole.tar"))
    assert len(good) == 4
    content = len(members) * (512 + 1024)
    for size in [*range(512, content + 512, 171), content]:
        (tmp_path / "cut.tar").write_bytes(whole_tar[:size])
        *before, error = values_of(source_of(tmp_path / "cut.tar"))
        assert before == good[: len(before)]
        assert len(before) >= size // (2 * 1536) - 1
        assert str(error).startswith("input cut: "), size


@pytest.mark.parametrize("at", [1536, 3 * 1536])
def test_a_broken_header_is_not_taken_for_the_end(tmp_path: Path, at: int) -> None:
    path = tar_of(tmp_path / "i.tar", [(f"{n}.jpg", b"x" * 600) for n in range(4)])
    content = bytearray(path.read_bytes())
    content[at : at + 100] = b"?" * 100
    path.write_bytes(content)
    *before, error = values_of(source_of(path))
    assert len(before) == at // 1536 - 1  # the last sample before the damage may not be whole
    assert str(error).startswith(
        f"input cut: at byte {at} of {len(content)}: expected a file or the end of the archive, found "
    )


def test_a_tar_behind_a_tar_is_reported(tmp_path: Path) -> None:
    one = tar_of(tmp_path / "one.tar", [("1.jpg", b"1"), ("2.jpg", b"2")]).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    assert str(values_of(source_of(tmp_path / "two.tar"))[-1]).startswith("input cut: ")


def test_a_tar_that_leads_back_to_itself_ends(tmp_path: Path) -> None:
    """CVE-2025-8194: a negative size let tarfile read the same header for ever."""
    info = tarfile.TarInfo("2.jpg")
    info.size = -1024
    header = info.tobuf(tarfile.GNU_FORMAT)
    one = tar_of(tmp_path / "i.tar", [("1.jpg", b"1")]).read_bytes()
    (tmp_path / "i.tar").write_bytes(one[:1024] + header + bytes(10240))
    assert str(values_of(source_of(tmp_path / "i.tar"))[-1]).startswith("input cut: ")


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


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_a_header_of_gigabytes_ends_the_tar(kind: bytes, tmp_path: Path) -> None:
    """Tarfile would read it whole, with 6 GB of memory or for minutes."""
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
