"""Inputs that once failed (tests/data/cases) go through the whole tokenization to the right result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.paths import DATA
from support.tokenizing import run_here, settings, turns, write_items
from unitoken.codec.conversations import parse
from unitoken.common.errors import ConfigError
from unitoken.dataset.mds_index import read_index
from unitoken.streaming_data.reading.shards import Shards
from unitoken.tokenize.merge import merge
from unitoken.tokenize.sources.adapters import find_adapter
from unitoken.tokenize.sources.reader import find_files

CASES = DATA / "cases"


def tokenized(
    source: Path, out: Path, vqgan: Path, **changes: Any
) -> tuple[list[tuple[str, int]], list[str]]:
    """Tokenize a source. Returns each sample's id and number of pictures, and the reasons of the rejects."""
    run_here(settings(vqgan, **changes), source, out)
    manifest = merge(str(out))
    shards = Shards("cases", out, read_index(out), None, out / "stamps", None)
    samples = []
    for number, entry in enumerate(read_index(out)):
        for record in shards.open(number).records(np.arange(entry["samples"]), 0):
            samples.append((record.id, len(record.images)))
    reasons = [json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert manifest.items == len(samples) + len(reasons)
    return samples, reasons


@pytest.mark.parametrize("name", sorted(path.name for path in (CASES / "pictures").iterdir()))
def test_pictures(name: str, vqgan: Path, tmp_path: Path) -> None:
    good = {"id": "text", "conversations": turns("a", "b")}
    path = CASES / "pictures" / name
    item = {"id": "picture", "conversations": turns("<|image|>", "b"), "image": str(path)}
    samples, reasons = tokenized(write_items(tmp_path, [good, item]), tmp_path / "out", vqgan)
    if name in ("noitem.avif", "broken2.avif", "ftex.jpg"):
        assert samples == [("text", 0)]
        assert len(reasons) == 1
        assert reasons[0].startswith("unusable image: ")
        assert name in reasons[0]
    else:
        assert samples == [("text", 0), ("picture", 1)]


@pytest.mark.parametrize(
    ("source", "adapter", "expected"),
    [
        ("items/placeholder_of_llava.json", "standard", [("asked", 1), ("two", 2)]),
        ("items/other_keys.json", "standard", [("images", 1), ("image_path", 1)]),
        ("items/messages_with_placeholders.json", "messages", [("string", 1), ("second_turn", 1)]),
        ("tars/mac.tar", "caption", [("000", 1), ("001", 1), ("002", 1)]),
        ("tars/std_images.tar", "standard", [("0", 1)]),
        ("tars/bomtxt.tar", "caption", [("0", 1), ("1", 1)]),
    ],
)
def test_items_and_tars_that_are_read(
    source: str, adapter: str, expected: list[object], vqgan: Path, tmp_path: Path
) -> None:
    assert tokenized(CASES / source, tmp_path / "out", vqgan, adapter=adapter) == (expected, [])


def test_placeholders_in_messages_keep_their_place() -> None:
    _, second = json.loads((CASES / "items" / "messages_with_placeholders.json").read_text())
    conversation = parse(find_adapter("messages")(second), "0")
    segments = [turn.segments for turn in conversation.turns]
    assert segments == [("Hi",), ("Hello.",), ("", "What is it?"), ("Shapes.",)]


def test_names_with_dots_are_reported_as_one_sample(vqgan: Path, tmp_path: Path) -> None:
    samples, reasons = tokenized(CASES / "tars" / "dotted.tar", tmp_path / "out", vqgan, adapter="caption")
    assert samples == []
    assert len(reasons) == 1
    assert "names hold dots: cat.000, cat.001, ... are one sample of 20 pictures" in reasons[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".tar", ".parquet", ".arrow"])
def test_a_git_lfs_pointer_is_reported_as_one(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"i{suffix}").write_bytes((CASES / "items" / "lfs.jsonl").read_bytes())
    with pytest.raises(ConfigError, match="a pointer of Git LFS, not the file itself: git lfs pull"):
        find_files([str(tmp_path / f"i{suffix}")])


def test_a_broken_pax_header_ends_the_tar_as_a_cut_does(vqgan: Path, tmp_path: Path) -> None:
    _, reasons = tokenized(CASES / "tars" / "pax_size.tar", tmp_path / "out", vqgan, adapter="caption")
    assert reasons[-1].startswith("input cut: at byte ")
