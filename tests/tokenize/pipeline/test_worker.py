"""From items to published chunks: every item is a sample or a reject, the same bytes each time."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from streaming import StreamingDataset

from support.tokenizing import content, picture, png, run_here, settings, some_items, turns, write_items
from unitoken.common.files import AsideFolder
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.tokenize.merge import merge
from unitoken.tokenize.pipeline import tokenizer as tokenizer_module
from unitoken.tokenize.pipeline import worker, writer
from unitoken.tokenize.pipeline.concurrency import ITEM_BYTES, Limits
from unitoken.tokenize.pipeline.tokenizer import Tokenizer
from unitoken.tokenize.prepare import prepare


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("reader", "pictures", "encoder"))]


def rejects(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(out.glob("chunk-*/rejects.jsonl"))
        for line in path.read_text().splitlines()
    ]


def image_item(path: str) -> dict[str, Any]:
    return {"conversations": turns("<|image|>", "ok"), "image": path}


def test_the_stock_reader_reads_every_sample(vqgan: Path, tmp_path: Path) -> None:
    items = some_items(tmp_path, 20)
    run_here(settings(vqgan), write_items(tmp_path, items), tmp_path / "out")
    manifest = merge(str(tmp_path / "out"))
    vocabulary = Vocabulary.load(tmp_path / "out" / "vocabulary.json")
    records = [
        Record.from_mds(sample)
        for sample in StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False)
    ]
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
        merge(str(tmp_path / f"out{splits}"))
        folders.append(content(tmp_path / f"out{splits}"))
    assert folders[0] == folders[1] == folders[2] == folders[3]
    assert len(folders[0]) == 8 * 4 + 8


def test_wide_images_keep_their_shape_with_crop_aspect(vqgan: Path, tmp_path: Path) -> None:
    name = picture(tmp_path / "wide.png", 1, (64, 16))
    run_here(settings(vqgan, crop="aspect"), write_items(tmp_path, [image_item(name)]), tmp_path / "out")
    merge(str(tmp_path / "out"))
    [sample] = StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False)
    assert Record.from_mds(sample).image_spans[0, 2:].tolist() == [2, 8]


def test_bad_images_are_rejects_with_their_reason(vqgan: Path, tmp_path: Path, golden: Path) -> None:
    images = golden / "assets" / "images"
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # reading it would never end
    cases = {
        "none.png": "no such image: none.png$",
        "folder.png": "no such image",
        "pipe.png": "no such image",
        "zero\0byte.png": "no such image|image not reachable",
        "x" * 5000: "no such image|image not reachable",
        "empty.png": "unusable image: .*not an image: 0 bytes",
        str(images / "x_notimage.png"): "unusable image: .*not an image: 21 bytes",
        str(images / "x_truncated.jpg"): "unusable image: .*truncated",
    }
    good = picture(tmp_path / "good.png", 1)
    items = [image_item(path) for path in cases] + [
        {"conversations": turns("<|image|><|image|>", "a"), "image": [good, "none.png"]}
    ]
    run_here(
        settings(vqgan), write_items(tmp_path, [*items, {"conversations": turns("a", "b")}]), tmp_path / "out"
    )
    found = rejects(tmp_path / "out")
    assert [line["position"] for line in found] == list(range(len(items)))
    for line, needed in zip(found, [*cases.values(), "no such image: none.png"], strict=True):
        assert re.match(needed, line["reason"]), line
        assert line["stage"] == "image"
    assert merge(str(tmp_path / "out")).samples == 1


def test_broken_files_give_the_same_rejects_each_time(vqgan: Path, tmp_path: Path, golden: Path) -> None:
    """Images are cut and changed at many places. A reason must hold no addresses and no folders."""
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
        merge(str(tmp_path / out))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    reasons = [line["reason"] for line in rejects(tmp_path / "one")]
    assert len(reasons) > 10
    assert not any("0x" in reason or str(tmp_path) in reason for reason in reasons)


def test_images_are_limited_in_bytes(vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_ITEM_BYTES", len(png()) + 10)
    (tmp_path / "a.png").write_bytes(png())
    item = {"conversations": turns("<|image|><|image|>", "a"), "image": ["a.png", "a.png"]}
    run_here(settings(vqgan), write_items(tmp_path, [item, image_item("a.png")]), tmp_path / "out")
    [line] = rejects(tmp_path / "out")
    assert line["reason"].startswith("images too large: a.png: ")


def test_a_chunk_of_rejects_only_is_done_and_merges(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, [{}, {}, {"conversations": turns("a", "b")}])
    run_here(settings(vqgan, chunk_size=2), source, tmp_path / "out")
    manifest = merge(str(tmp_path / "out"))
    assert (manifest.samples, manifest.rejected, manifest.chunks) == (1, 2, 2)
    assert len(list(StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False))) == 1


@pytest.mark.parametrize(
    "victim", ["open_pictures", "adapt", "begin", "sidecar_row", "write_sidecar", "publish"]
)
def test_a_chunk_that_fails_midway_is_not_published(
    vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """In every thread: the error is raised, no thread survives, and no part of the chunk is left.

    An exception inside MDSWriter leaves an index that looks complete.
    """
    source = write_items(tmp_path, some_items(tmp_path, 30))
    calls = 0

    def fail(*args: object) -> None:
        nonlocal calls
        calls += 1
        raise MemoryError(victim)

    job = prepare(settings(vqgan), [str(source)], str(tmp_path / "out"))
    tokenizer = Tokenizer(job, "cpu")
    owners = {
        "begin": tokenizer.vision,
        "sidecar_row": writer,
        "write_sidecar": writer,
        "publish": AsideFolder,
    }
    with monkeypatch.context() as patch:
        patch.setattr(owners.get(victim, tokenizer), victim, fail)
        with pytest.raises(MemoryError, match=victim):
            worker.write_chunks(tokenizer, job.chunks(), quiet)
    assert calls
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["input.json", "job.json", "settings.yaml", "vocabulary.json"]
    run_here(settings(vqgan), source, tmp_path / "out")
    run_here(settings(vqgan), source, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def quiet(finished: int, rejected: int) -> None:
    pass


def test_two_runs_into_one_folder_do_no_harm(vqgan: Path, tmp_path: Path) -> None:
    """A chunk that another run has just finished stays as it is; ours is equal."""
    source = write_items(tmp_path, some_items(tmp_path, 4))
    job = run_here(settings(vqgan), source, tmp_path / "out")
    before = content(tmp_path / "out")
    worker.write_chunks(Tokenizer(job, "cpu"), job.chunks(), quiet)
    assert content(tmp_path / "out") == before


def test_a_chunk_that_another_run_finished_is_skipped(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, some_items(tmp_path, 8))
    job = prepare(settings(vqgan), [str(source)], str(tmp_path / "out"))
    reported: list[tuple[int, int]] = []
    run_here(settings(vqgan), source, tmp_path / "other")

    (tmp_path / "other" / "chunk-000001").rename(tmp_path / "out" / "chunk-000001")
    worker.run_rank(job, 0, 1, lambda finished, rejected: reported.append((finished, rejected)))
    assert sum(finished for finished, _ in reported) == 4
    assert content(tmp_path / "out") == content(tmp_path / "other") | {
        name: digest for name, digest in content(tmp_path / "out").items() if name.startswith("chunk-000001")
    }


def test_every_item_is_reported_once(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, some_items(tmp_path, 30))
    job = prepare(settings(vqgan), [str(source)], str(tmp_path / "out"))
    reported: list[tuple[int, int]] = []
    times = worker.run_rank(job, 0, 1, lambda finished, rejected: reported.append((finished, rejected)))
    assert (sum(finished for finished, _ in reported), sum(rejected for _, rejected in reported)) == (30, 4)
    assert times.images == 31
    assert 0 <= times.gpu_wait_share < 1
    assert worker.run_rank(job, 0, 1, quiet).images == 0  # nothing is left


def test_torch_has_its_threads_back_after_the_work(vqgan: Path, tmp_path: Path) -> None:
    """A number that stayed changed the last digits of later sums in the process, such as in training."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_here(settings(vqgan), write_items(tmp_path, some_items(tmp_path, 4)), tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_bytes_do_not_depend_on_threads_or_the_memory_limit(vqgan: Path, tmp_path: Path) -> None:
    """With four items on the way the reader waits for the writer."""
    source = write_items(tmp_path, some_items(tmp_path, 40))
    for name, threads, held_items in (("one", 1, 4096), ("seven", 7, 4)):
        job = prepare(settings(vqgan, threads=threads, chunk_size=17), [str(source)], str(tmp_path / name))
        limits = Limits(group_items=2, flushed_bytes=ITEM_BYTES, held_bytes=held_items * ITEM_BYTES)
        worker.write_chunks(Tokenizer(job, "cpu"), job.chunks(), quiet, limits)
        assert not job.missing()
    assert content(tmp_path / "one") == content(tmp_path / "seven")


def test_a_process_keeps_its_models_for_the_next_chunks(
    vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_items(tmp_path, some_items(tmp_path, 8))
    job = prepare(settings(vqgan), [str(source)], str(tmp_path / "out"))
    worker.run_chunks(job, job.chunks()[:1], quiet, "cpu")
    monkeypatch.setattr(tokenizer_module, "load_vision", lambda *args: pytest.fail("loaded again"))
    worker.run_chunks(job, job.chunks()[1:], quiet, "cpu")
    assert not job.missing()


def test_items_longer_than_max_tokens_are_rejects(vqgan: Path, tmp_path: Path) -> None:
    """Items whose images alone are too long never reach the image tokenizer."""
    name = picture(tmp_path / "a.png", 1)
    items = [
        {"conversations": turns("short", "text")},
        {"conversations": turns("a b " * 50, "text")},
        image_item(name),
        {"conversations": turns("<|image|><|image|>", "two"), "image": [name, name]},
    ]
    job = run_here(settings(vqgan, max_tokens=40), write_items(tmp_path, items), tmp_path / "out")
    found = {line["id"]: (line["stage"], line["reason"]) for line in rejects(tmp_path / "out")}
    assert found.keys() == {"1", "3"}
    assert re.fullmatch(r"too long: \d+ tokens, max_tokens is 40", found["1"][1])
    assert found["1"][0] == "sequence"
    assert found["3"] == ("image", "too long: 48 tokens in its images alone, max_tokens is 40")
    longest = max(
        row["tokens"]
        for row in pq.read_table(tmp_path / "out" / "chunk-000000" / "samples.parquet").to_pylist()
    )
    assert longest <= 40
    assert job.file.max_tokens == 40


def test_random_crops_depend_on_seed_and_id_alone(vqgan: Path, tmp_path: Path) -> None:
    """They do not depend on the item's place, and so not on other items of the input."""
    for n in range(4):
        rng = np.random.default_rng(n)
        Image.fromarray(rng.integers(0, 256, (16, 200, 3), np.uint8)).save(tmp_path / f"{n}.png")
    items = [{"id": f"i{n}", **image_item(f"{n}.png")} for n in range(4)]

    def tokens(out: str, chosen: list[Any], **changes: Any) -> dict[str, list[int]]:
        source = write_items(tmp_path, chosen)
        run_here(settings(vqgan, crop_position="random", **changes), source, tmp_path / out)
        merge(str(tmp_path / out))
        samples = StreamingDataset(local=str(tmp_path / out), batch_size=1, shuffle=False)
        return {sample["id"]: sample["tokens"].tolist() for sample in samples}

    found = tokens("a", items)
    assert tokens("b", items[::-1], chunk_size=1) == found
    other = tokens("c", items, seed=1)
    assert other.keys() == found.keys()
    assert all(other[name] != found[name] for name in found)


def test_a_reject_names_the_stage_that_refused_it(vqgan: Path, tmp_path: Path) -> None:
    source = tmp_path / "items.jsonl"
    good = json.dumps({"conversations": turns("a", "b")})
    source.write_text(
        "\n".join(
            [good, "{broken", json.dumps({"id": "no-turns"}), json.dumps({"conversations": turns(" ", "b")})]
        )
    )
    run_here(settings(vqgan), source, tmp_path / "out")
    found = [(line["position"], line["id"], line["stage"]) for line in rejects(tmp_path / "out")]
    assert found == [(1, "1", "source"), (2, "no-turns", "conversation"), (3, "3", "conversation")]
    assert {line["file"] for line in rejects(tmp_path / "out")} == {"items.jsonl"}

    (tmp_path / "mine.py").write_text("def adapt(raw):\n    return {'conversations': raw['x']}\n")
    source.write_text(source.read_text() + "\n" + json.dumps({"x": turns("a", "b")}))
    run_here(settings(vqgan, adapter=f"{tmp_path}/mine.py:adapt"), source, tmp_path / "mine")
    stages = [(line["stage"], line["reason"]) for line in rejects(tmp_path / "mine")]
    assert stages[0] == ("adapter", "adapter failed: KeyError: 'x'")
    assert [stage for stage, _ in stages] == ["adapter", "source", "adapter", "adapter"]
