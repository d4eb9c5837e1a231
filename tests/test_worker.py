"""One chunk from start to end: every item is a sample or a reject, and the bytes depend on the input alone."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from streaming import StreamingDataset
from tokenizing import content, picture, png, run_here, settings, some_items, turns, write_items

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.record import Record
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.tokenize import worker
from unitoken.tokenize.job import load_job, prepare
from unitoken.tokenize.merge import merge


def rejects(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("chunk-*/rejects.jsonl")) for line in path.read_text().splitlines()]


def image_item(path: str) -> dict[str, Any]:
    return {"conversations": turns("<|image|>", "ok"), "image": path}


def test_the_stock_reader_reads_every_sample(vqgan: Path, tmp_path: Path) -> None:
    items = some_items(tmp_path, 20)
    run_here(settings(vqgan), write_items(tmp_path, items), tmp_path / "out")
    manifest = merge(tmp_path / "out")
    vocabulary = Vocabulary.load(tmp_path / "out" / "vocabulary.json")
    records = [Record.from_mds(sample) for sample in StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False)]
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    good = [str(item.get("id", n)) for n, item in enumerate(items) if n % 7 != 6]
    assert [record.id for record in records] == [row["id"] for row in rows] == good
    assert (manifest.items, manifest.samples, manifest.rejected) == (20, 18, 2)
    for record, row in zip(records, rows, strict=True):
        assert row["tokens"] == len(record.tokens)
        assert row["target_tokens"] == (record.labels() >= 0).sum() > 0
        assert row["images"] == len(record.images) == len(record.image_spans)
        sizes = [Image.open(io.BytesIO(data)).size for data in record.images]
        assert row["image_sizes"] == [side for size in sizes for side in size]
        for start, end, height, width in record.image_spans:
            assert vocabulary.image_codes(record.tokens[start:end]).shape == (height, width) == (4, 4)
    drawn = next(row for row in rows if row["id"].startswith("draw"))
    assert (drawn["images"], drawn["question_images"]) == (1, 0)
    mixed = next(row for row in rows if row["images"] == 3)
    assert mixed["question_images"] == 2
    assert manifest.tokens == sum(row["tokens"] for row in rows)


@pytest.mark.parametrize("crop", ["square", "aspect"])
def test_bytes_do_not_depend_on_splits(vqgan: Path, tmp_path: Path, crop: str) -> None:
    source = write_items(tmp_path, some_items(tmp_path, 30))
    folders = []
    for splits in (1, 2, 3, 8):
        run_here(settings(vqgan, crop=crop), source, tmp_path / f"out{splits}", splits)
        merge(tmp_path / f"out{splits}")
        folders.append(content(tmp_path / f"out{splits}"))
    assert folders[0] == folders[1] == folders[2] == folders[3]
    assert len(folders[0]) == 8 * 4 + 6


def test_wide_images_keep_their_shape_with_crop_aspect(vqgan: Path, tmp_path: Path) -> None:
    name = picture(tmp_path / "wide.png", 1, (64, 16))
    run_here(settings(vqgan, crop="aspect"), write_items(tmp_path, [image_item(name)]), tmp_path / "out")
    merge(tmp_path / "out")
    [sample] = StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False)
    assert Record.from_mds(sample).image_spans[0, 2:].tolist() == [2, 8]


def test_bad_images_are_rejects_with_their_reason(vqgan: Path, tmp_path: Path, golden: Path) -> None:
    images = golden / "assets" / "images"
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # reading it would never end
    cases = {
        "none.png": "no such image file",
        "folder.png": "no such image file",
        "pipe.png": "no such image file",
        "zero\0byte.png": "no such image file",
        "x" * 5000: "no such image file|unreadable image file",
        "empty.png": "unusable image: .*not an image: 0 bytes",
        str(images / "x_notimage.png"): "unusable image: .*not an image: 21 bytes",
        str(images / "x_truncated.jpg"): "unusable image: .*truncated",
    }
    good = picture(tmp_path / "good.png", 1)
    items = [image_item(path) for path in cases] + [
        {"conversations": turns("<|image|><|image|>", "a"), "image": [good, "none.png"]}
    ]
    run_here(settings(vqgan), write_items(tmp_path, [*items, {"conversations": turns("a", "b")}]), tmp_path / "out")
    found = rejects(tmp_path / "out")
    assert [line["position"] for line in found] == list(range(len(items)))
    for line, needed in zip(found, [*cases.values(), "no such image file: none.png"], strict=True):
        assert re.match(needed, line["reason"]), line
        assert line["stage"] == "image"
    assert merge(tmp_path / "out").samples == 1


def test_no_broken_file_stops_the_run_and_reasons_are_the_same_each_time(vqgan: Path, tmp_path: Path, golden: Path) -> None:
    """Images cut and changed at many places: each is used or rejected, twice alike (no addresses, no folders)."""
    rng = np.random.default_rng(0)
    items = []
    for name in ("d14_square.png", "d06_exif6.jpg", "d04_palette.png", "d11_16bit.png"):
        whole = (golden / "assets" / "images" / name).read_bytes()
        for n in range(15):
            data = bytearray(whole)
            if n % 3:
                for at in rng.integers(0, len(data) if n % 2 else 200, 8):
                    data[at] = rng.integers(0, 256)
            else:
                data = data[: rng.integers(1, len(data))]
            (tmp_path / f"{n}-{name}").write_bytes(data)
            items.append(image_item(f"{n}-{name}"))
    source = write_items(tmp_path, items)
    for out in ("one", "two"):
        run_here(settings(vqgan), source, tmp_path / out)
        merge(tmp_path / out)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    reasons = [line["reason"] for line in rejects(tmp_path / "one")]
    assert len(reasons) > 10
    assert not any("0x" in reason or str(tmp_path) in reason for reason in reasons)


def test_images_are_limited_in_bytes(vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_ITEM_BYTES", len(png()) + 10)
    (tmp_path / "a.png").write_bytes(png())
    item = {"conversations": turns("<|image|><|image|>", "a"), "image": ["a.png", "a.png"]}
    run_here(settings(vqgan), write_items(tmp_path, [item, image_item("a.png")]), tmp_path / "out")
    [line] = rejects(tmp_path / "out")
    assert line["reason"].startswith("images too large: a.png: ")


def test_a_chunk_of_rejects_only_is_done_and_merges(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, [{}, {}, {"conversations": turns("a", "b")}])
    run_here(settings(vqgan, chunk_size=2), source, tmp_path / "out")
    manifest = merge(tmp_path / "out")
    assert (manifest.samples, manifest.rejected, manifest.chunks) == (1, 2, 2)
    assert len(list(StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False))) == 1


@pytest.mark.parametrize("victim", ["_row", "encode_images", "write_samples"])
def test_a_chunk_that_fails_midway_is_not_there(vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """An exception inside MDSWriter leaves a complete-looking index: it must not become a chunk."""
    source = write_items(tmp_path, some_items(tmp_path, 6))

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(worker, victim, fail)
        with pytest.raises(MemoryError):
            run_here(settings(vqgan), source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["job.json", "vocabulary.json"]
    run_here(settings(vqgan), source, tmp_path / "out")
    run_here(settings(vqgan), source, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_two_runs_into_one_folder_do_no_harm(vqgan: Path, tmp_path: Path) -> None:
    """A chunk that another run has just finished stays as it is; ours was the same."""
    source = write_items(tmp_path, some_items(tmp_path, 4))
    job = run_here(settings(vqgan), source, tmp_path / "out")
    before = content(tmp_path / "out")
    tokenizer = worker.Tokenizer(job, "cpu")
    tokenizer.write_chunk(worker.cut(worker.load_items(source), 4, 0), lambda finished, rejected: None)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_size": 24}, "target_size is 16 there and 24 now"),
        ({"crop": "aspect"}, "crop is 'square' there and 'aspect' now"),
        ({"chunk_size": 5}, "chunk_size is 4 there and 5 now"),
        ({"compat": "unitoken"}, "compat is None there and 'unitoken' now"),
    ],
)
def test_other_settings_into_the_same_folder_are_refused(vqgan: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    source = write_items(tmp_path, [{"conversations": turns("a", "b")}])
    prepare(settings(vqgan), source, tmp_path / "out")
    with pytest.raises(ConfigError, match=named):
        prepare(settings(vqgan, **change), source, tmp_path / "out")


def test_another_input_or_tokenizer_into_the_same_folder_is_refused(vqgan: Path, tmp_path: Path, golden: Path) -> None:
    source = write_items(tmp_path, [{"conversations": turns("a", "b")}])
    prepare(settings(vqgan), source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"source is '[0-9a-f]{16}' there and "):
        prepare(settings(vqgan), write_items(tmp_path / "x", [{}]), tmp_path / "out")
    with pytest.raises(ConfigError, match="vocabulary is "):
        prepare(settings(vqgan, tokenizer=str(golden / "assets" / "tokenizer_llama_style")), source, tmp_path / "out")


def test_the_share_of_rejects_may_change(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, [{}])
    prepare(settings(vqgan), source, tmp_path / "out")
    prepare(settings(vqgan, max_reject_fraction=0.5), source, tmp_path / "out")
    assert load_job(tmp_path / "out").max_reject_fraction == 0.01


@pytest.mark.parametrize("size", [10, 12, 4 * 2 * 100])
def test_sizes_that_do_not_fit_the_latents_are_refused(vqgan: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=f"target_size: expected a multiple of 8 pixels .* found {size}"):
        prepare(settings(vqgan, target_size=size), write_items(tmp_path, [{}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_refused(vqgan: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("dear")
    source = write_items(tmp_path, [{"conversations": turns("a", "b")}])
    with pytest.raises(ConfigError, match=r"found 'thesis.doc' in it and no job.json"):
        prepare(settings(vqgan), source, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a folder to write to, found a file"):
        prepare(settings(vqgan), source, source)
