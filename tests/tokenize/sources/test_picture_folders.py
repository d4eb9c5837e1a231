"""Folders of pictures: read as a tar of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tokenizing import png, run_here, settings
from unitoken.codec.conversations import ItemError
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources.reader import cut, find_files, item_name, read_piece


def test_a_folder_of_pictures_is_read_as_a_tar_of_them(tmp_path: Path, vqgan: Path) -> None:
    """Files that img2dataset and macOS put beside the pictures are passed over."""
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


def test_unusable_files_in_a_folder_are_rejects(tmp_path: Path) -> None:
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
    assert values["b"] == {"__key__": "b", "mp4": b"x", "txt": "b"}  # so that the adapter can name it
    errors = [str(value) for value in values.values() if isinstance(value, ItemError)]
    assert sorted(errors)[:2] == [
        "bad sample: c: two files that end in .png",
        "bad sample: d.txt is a link that leads out of the folder",
    ]
    assert len(errors) == 3
