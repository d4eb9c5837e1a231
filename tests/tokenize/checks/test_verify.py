"""Everything that is wrong in a dataset is found, with the name of its file or sample."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from support.tokenizing import content, picture, png, run_here, settings, some_items, turns, write_items
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import load_manifest
from unitoken.dataset.record import Record
from unitoken.dataset.sidecar import samples_schema
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.storage.folder import Folder
from unitoken.storage.open import open_store
from unitoken.tokenize.checks.preview import read_records
from unitoken.tokenize.checks.verify import choose_shards, verify
from unitoken.tokenize.checks.verify_records import Rules, check_sample, crop_latents
from unitoken.tokenize.merge import merge
from unitoken.tokenize.pipeline.item import Place, Rejects, Sample
from unitoken.tokenize.pipeline.writer import write_chunk_files, write_sidecar
from unitoken.tokenize.retry import begin_retry


@pytest.fixture(scope="module")
def made(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three chunks and a round of retries, each with a reject."""
    folder = tmp_path_factory.mktemp("verify")
    items = some_items(folder, 8)
    items += [
        {"conversations": turns("<|image|>", "late"), "image": name} for name in ("late.png", "never.png")
    ]
    source, out = write_items(folder, items), folder / "out"
    run_here(settings(vqgan), source, out)
    merge(str(out))
    picture(folder / "late.png", 5)
    begin_retry(str(out), ["no such image"])
    run_here(settings(vqgan), source, out)
    merge(str(out))
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_a_finished_dataset_has_no_problems(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(out)
    assert verify(str(out)) == []
    assert capsys.readouterr().out.startswith(f"{out}: 8 samples; 3 of 3 shards read, ")
    assert content(out) == before


def test_an_unfinished_folder_is_no_dataset(out: Path, tmp_path: Path) -> None:
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"it has no manifest.json; finish it with"):
        verify(str(out))
    with pytest.raises(ConfigError, match="not a dataset folder"):
        verify(str(tmp_path / "none"))


# --- changed bytes ---


def free(path: Path, data: bytes) -> list[tuple[int, int]]:
    """Return the bytes that may change.

    They hold names of inputs, a limit that may change, the version of pyarrow, settings, or rejects that were
    tried again.
    """
    if path.match("chunk-000002/rejects.jsonl") or path.name == "settings.yaml":
        return [(0, len(data))]
    spans = []
    if path.suffix == ".json":
        for name in (b'"name": "', b'"max_reject_fraction": '):
            spans += [(found.start(), data.index(b"\n", found.start())) for found in re.finditer(name, data)]
    elif path.parent.name != "out" and (start := data.find(b"parquet-cpp-arrow")) >= 0:
        spans.append((start, start + len(f"parquet-cpp-arrow version {pa.__version__}")))
    return spans


@pytest.mark.parametrize("seed", range(6))
def test_a_changed_byte_anywhere_is_found(out: Path, seed: int) -> None:
    draw = random.Random(seed)
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    assert len(paths) == 9 + 3 * 4 + 3
    for path in paths:
        data = path.read_bytes()
        positions = [
            at for at in range(len(data)) if not any(start <= at < end for start, end in free(path, data))
        ]
        for at in draw.sample(positions, min(1, len(positions))):
            changed = bytearray(data)
            changed[at] ^= draw.randrange(1, 256)
            path.write_bytes(changed)
            try:
                found = verify(str(out))
            except ConfigError as error:
                found = [str(error)]
            assert found, (
                f"{path.relative_to(out)}: byte {at} of {len(data)}: {data[at]} became {changed[at]}"
            )
        path.write_bytes(data)
    assert verify(str(out)) == []


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""])
def test_a_file_of_another_length_is_found(out: Path, change: Callable[[bytes], bytes]) -> None:
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if change(data) == data or free(path, data) == [(0, len(data))]:
            continue
        path.write_bytes(change(data))
        with contextlib.suppress(ConfigError):
            assert verify(str(out)), path
        path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["index.json", "samples.parquet", "rejects.jsonl", "chunk-000001/shard.00000.mds"]
)
def test_a_missing_file_is_found(out: Path, name: str) -> None:
    (out / name).unlink()
    assert any(name in line for line in verify(str(out)))


@pytest.mark.parametrize("name", ["index.json", "samples.parquet", "rejects.jsonl", "shard.00000.mds"])
def test_a_chunk_that_misses_a_file_is_found(out: Path, name: str) -> None:
    (out / "chunk-000001" / name).unlink()
    assert any(f"chunk-000001/{name}" in line for line in verify(str(out)))


# --- a sample of the shards ---


@pytest.mark.parametrize(
    ("shards", "sample"), [(1000, 0.01), (1000, 0.25), (7, 0.5), (3, 0.001), (5, 1.0), (0, 0.5)]
)
def test_a_sample_is_that_share_and_at_least_one(shards: int, sample: float) -> None:
    picked = choose_shards(shards, sample)
    assert len(picked) == max(int(shards * sample), min(1, shards))
    assert picked == sorted(set(picked))
    assert set(picked) <= set(range(shards))


def test_a_sample_reads_no_other_shard(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(str(out), 0.34) == []
    assert "1 of 3 shards read" in capsys.readouterr().out
    found = []
    for path in sorted(out.glob("*/shard.00000.mds")):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found.append(bool(verify(str(out), 0.34)))
        path.write_bytes(data)
    assert sorted(found) == [False, False, True]


# --- broken rules where every hash is right ---


def rewrite(
    out: Path,
    change: Callable[[list[Record]], list[Record]],
    row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    """Write chunk 0 anew with other records or rows, and every file that has hashes or counts of it."""
    from streaming import StreamingDataset

    chunk = out / "chunk-000000"
    records = [
        Record.from_mds(sample) for sample in StreamingDataset(local=str(chunk), batch_size=1, shuffle=False)
    ]
    rows = pq.read_table(chunk / "samples.parquet").to_pylist()
    sizes = [tuple(zip(r["image_sizes"][::2], r["image_sizes"][1::2], strict=True)) for r in rows]
    rejects = (chunk / "rejects.jsonl").read_bytes()
    shutil.rmtree(chunk)
    chunk.mkdir()
    vocabulary = Vocabulary.load(out / "vocabulary.json")
    samples = [
        Sample(Place(0, "", number, record.id), record, size)
        for number, (record, size) in enumerate(zip(change(records), sizes, strict=True))
    ]
    write_chunk_files(samples, Rejects(), chunk, vocabulary, lambda finished, rejected: None)
    (chunk / "rejects.jsonl").write_bytes(rejects)
    rows = pq.read_table(chunk / "samples.parquet").to_pylist()
    row(rows[1])
    write_sidecar(pa.Table.from_pylist(rows, samples_schema()), chunk / "samples.parquet")
    (out / "manifest.json").unlink()
    merge(str(out))


def of_second(**changes: Callable[[Record, Vocabulary], Any]) -> Callable[[Record, Vocabulary], Record]:
    return lambda record, vocabulary: dataclasses.replace(
        record, **{name: change(record, vocabulary) for name, change in changes.items()}
    )


def with_token(position: int, token: Callable[[Vocabulary], int]) -> Callable[[Record, Vocabulary], Any]:
    def change(record: Record, vocabulary: Vocabulary) -> Any:
        tokens = record.tokens.copy()
        tokens[position] = token(vocabulary)
        return tokens

    return change


def with_span(*values: int) -> Callable[[Record, Vocabulary], Any]:
    return lambda record, vocabulary: np.array([values], np.uint32)


def test_a_rewritten_chunk_is_right(out: Path) -> None:
    rewrite(out, lambda records: records)
    assert verify(str(out)) == []


BROKEN: dict[str, tuple[Callable[[Record, Vocabulary], Record], str]] = {
    "token": (
        of_second(tokens=with_token(-2, lambda v: v.size)),
        r"token \d+ is outside the vocabulary of \d+",
    ),
    "forged": (
        of_second(tokens=with_token(-2, lambda v: v.image_start)),
        r"special token \d+ at \d+, outside an image",
    ),
    "code": (
        of_second(tokens=with_token(-2, lambda v: v.image_ids[3])),
        r"special token \d+ at \d+, outside an image",
    ),
    "begin": (of_second(tokens=with_token(0, lambda v: v.end_of_turn)), r"begins with token \d+, expected 0"),
    "target end": (
        of_second(target_spans=with_span(3, 4000)),
        r"target spans: one ends at 4000 of \d+ tokens",
    ),
    "target empty": (of_second(target_spans=with_span(3, 3)), "target spans: one is empty"),
    "images": (of_second(images=lambda r, v: ()), "0 images, 1 image spans, 2 sides in samples.parquet"),
    "html": (of_second(images=lambda r, v: (b"<html>",)), r"image 0: no picture: not an image: 6 bytes"),
    "other": (
        of_second(images=lambda r, v: (png((7, 9)),)),
        r"image 0: 7 x 9 pixels, samples.parquet has 20 x 16",
    ),
    "span": (
        of_second(image_spans=lambda r, v: np.add(r.image_spans, [0, 1, 0, 0])),
        r"image 0: \d+ ids are no image block",
    ),
    "sides": (
        of_second(image_spans=lambda r, v: np.add(r.image_spans, [0, 0, 1, 0])),
        "image 0: 4 x 4 latents by its grid tokens, 5 x 4",
    ),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_rule_is_found_though_every_hash_is_right(out: Path, name: str) -> None:
    change, line = BROKEN[name]
    vocabulary = Vocabulary.load(out / "vocabulary.json")

    def second(records: list[Record]) -> list[Record]:
        changed = change(records[1], vocabulary)
        return [
            records[0],
            dataclasses.replace(changed, image_spans=changed.image_spans.astype(np.uint32)),
            *records[2:],
        ]

    rewrite(out, second)
    found = verify(str(out))
    assert len(found) == 1
    assert found[0].startswith("chunk-000000/shard.00000.mds: sample 1 ('1'): ")
    assert re.search(line, found[0])


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("id", "x", "id: '1', samples.parquet has 'x'"),
        ("tokens", 9, r"tokens: \d+, samples.parquet has 9"),
        ("target_tokens", 9, r"target_tokens: \d+, samples.parquet has 9"),
        ("images", 2, "images: 1, samples.parquet has 2"),
        ("question_images", 0, "question_images: 1, samples.parquet has 0"),
        ("image_sizes", [16, 20], "image 0: 20 x 16 pixels, samples.parquet has 16 x 20"),
        ("image_sizes", [16], "1 images, 1 image spans, 1 sides in samples.parquet"),
    ],
)
def test_a_row_that_differs_from_its_sample_is_found(out: Path, name: str, value: Any, line: str) -> None:
    rewrite(out, lambda records: records, lambda row: row.update({name: value}))
    found = verify(str(out))
    assert len(found) == 1
    assert re.fullmatch(f"chunk-000000/shard.00000.mds: sample 1 \\('.'\\): {line}", found[0])


def test_of_many_problems_in_a_shard_the_first_are_listed(out: Path) -> None:
    rewrite(
        out,
        lambda records: [dataclasses.replace(record, id="x") for record in records],
        lambda row: row.update(id="y"),
    )
    rewrite(out, lambda records: records, lambda row: row.update(id="y", tokens=1, target_tokens=2, images=3))
    assert [line.rpartition(": ")[2] for line in verify(str(out), listed_problems=2)][2] == "and 2 more"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"position": 99}, "line 1: the item at 99 of piece 1 is none of the chunk's"),
        ({"position": "6"}, "line 1: is no reject: TypeError"),
        ({"chunk": 7}, "line 1: is no reject: KeyError"),
        ({"more": 1}, "line 1: the item at 6 of piece 1 is none of the chunk's"),
    ],
)
def test_a_reject_without_an_item_is_found(out: Path, change: dict[str, Any], line: str) -> None:
    path = out / "chunk-000001" / "rejects.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    found = verify(str(out))
    assert len(found) == 1
    assert found[0].startswith(f"chunk-000001/rejects.jsonl: {line}")


def test_two_rejects_of_one_item_are_found(out: Path) -> None:
    path = out / "chunk-000002" / "rejects.jsonl"
    first, _ = path.read_text().splitlines(keepends=True)
    path.write_text(first * 2)
    assert verify(str(out)) == [
        "chunk-000002/rejects.jsonl: line 2: the item at 8 of piece 2 is none of the chunk's, "
        "or has a line already"
    ]


@pytest.mark.parametrize(
    "name", ["items", "samples", "rejected", "tokens", "target_tokens", "images", "chunks", "seed", "source"]
)
def test_a_manifest_that_miscounts_is_found(out: Path, name: str) -> None:
    path = out / "manifest.json"
    fields = json.loads(path.read_text())
    fields[name] = fields[name] + 1 if isinstance(fields[name], int) else "0" * 16
    if name in ("items", "samples", "rejected"):  # keeps the sum of the manifest right
        fields["items"] = fields["samples"] + fields["rejected"] + (name == "items")
        fields["rejected"] += name == "items"
    path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    assert any(name in line for line in verify(str(out)))


# --- rules of one sample ---


def test_a_picture_rotated_by_exif_has_its_displayed_size(out: Path) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(buffer, "JPEG", exif=exif)
    rules = Rules(
        Vocabulary.load(out / "vocabulary.json"), crop_latents("square", 16, 4), compat=False, originals=True
    )
    block = rules.vocabulary.image_block(np.zeros((4, 4), int))
    tokens = np.array([rules.vocabulary.bos, *block, rules.vocabulary.end_of_turn], rules.token_type)
    record = Record(
        "a",
        tokens,
        np.array([[len(tokens) - 1, len(tokens)]], "u4"),
        np.array([[1, 1 + len(block), 4, 4]], "u4"),
        (buffer.getvalue(),),
    )
    row = {
        "id": "a",
        "tokens": len(tokens),
        "target_tokens": 1,
        "images": 1,
        "question_images": 1,
        "image_sizes": [10, 30],
        "generated": [False],
    }
    assert list(check_sample(record, row, rules)) == []
    assert list(check_sample(record, row | {"image_sizes": [30, 10]}, rules)) == [
        "image 0: 10 x 30 pixels, samples.parquet has 30 x 10"
    ]
    as_stored = dataclasses.replace(rules, compat=True)
    assert list(check_sample(record, row | {"image_sizes": [30, 10]}, as_stored)) == []
    assert list(check_sample(record, row | {"image_sizes": [10, 30]}, as_stored)) != []
    without = dataclasses.replace(rules, originals=False)
    assert list(check_sample(record, row, without)) == ["image 0: bytes in a dataset without images"]
    bare = dataclasses.replace(record, images=(b"",))
    assert list(check_sample(bare, row | {"image_sizes": [0, 0]}, without)) == []
    assert list(check_sample(bare, row | {"image_sizes": [0, 0]}, rules)) != []
    other = dataclasses.replace(rules, sizes=crop_latents("square", 32, 4))
    assert list(check_sample(record, row, other)) == [
        "image 0: 4 x 4 latents, which the dataset's crops do not make"
    ]
    wider = dataclasses.replace(record, tokens=tokens.astype("u4"))
    assert list(check_sample(wider, row, rules)) == [f"tokens: uint32 ({len(tokens)},), expected uint16 (T,)"]


def test_crops_have_these_sizes_in_latents() -> None:
    assert crop_latents("square", 512, 16) == {(32, 32)}
    assert {(32, 32), (16, 64), (64, 16)} <= crop_latents("aspect", 512, 16)
    assert all(height % 2 == width % 2 == 0 for height, width in crop_latents("aspect", 512, 16))


def test_a_dataset_in_compat_may_hold_forged_tokens(vqgan: Path, tmp_path: Path) -> None:
    items = [{"conversations": turns("<racm3:break> and <eoss>", "a")}]
    run_here(settings(vqgan, compat="unitoken"), write_items(tmp_path, items), tmp_path / "out")
    merge(str(tmp_path / "out"))
    assert verify(str(tmp_path / "out")) == []


def test_other_crops_are_verified(vqgan: Path, tmp_path: Path) -> None:
    picture(tmp_path / "wide.png", 1, (90, 30))
    items = [{"conversations": turns("<|image|>", "a"), "image": "wide.png"}]
    run_here(settings(vqgan, crop="aspect", target_size=32), write_items(tmp_path, items), tmp_path / "out")
    merge(str(tmp_path / "out"))
    assert verify(str(tmp_path / "out")) == []


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "chunk-000000/../shard.00000.mds", "chunk-000000/shard.00000.mds.x"]
)
def test_a_shard_outside_the_folder_is_named_and_not_read(
    out: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((out / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    (out / "index.json").write_text(json.dumps(index, sort_keys=True) + "\n")
    manifest = load_manifest(out)
    files = manifest.files | {"index.json": sha256_of_file(out / "index.json")}
    (out / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).dump())
    read, names = Folder.read, []

    def note_and_read(self: Folder, name: str) -> bytes:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(Folder, "read", note_and_read)
    assert verify(str(out)) == [
        f"{out}/index.json: expected shards named chunk-NNNNNN/shard.NNNNN.mds, found {name!r}"
    ]
    assert names
    assert not [name for name in names if "shard" in name or "passwd" in name or "secret" in name]


@pytest.mark.cloud
def test_a_dataset_in_a_bucket_is_verified(out: Path, tmp_path: Path) -> None:
    from support.services import started, used

    (tmp_path / "server").mkdir()
    with started("s3", tmp_path / "server") as service, used(service):
        url = service.url("set")
        store = open_store(url)
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            store.upload(path, str(path.relative_to(out)))
        assert verify(url) == []
        assert [record.id for record in read_records(store)] == [
            record.id for record in read_records(open_store(str(out)))
        ]
        shard = (out / "chunk-000001" / "shard.00000.mds").read_bytes()
        store.write("chunk-000001/shard.00000.mds", shard[:-1] + b"x")
        (line,) = verify(url)
        assert line.startswith("chunk-000001/shard.00000.mds: {'bytes': ")
        store.delete("chunk-000001/shard.00000.mds")
        assert all("chunk-000001/shard.00000.mds" in line and "not there" in line for line in verify(url))
        assert begin_retry(url) == 2
