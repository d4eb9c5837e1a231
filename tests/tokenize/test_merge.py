"""Chunks -> dataset: complete or refused, in numeric order, the same bytes each time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from streaming import StreamingDataset

from support.tokenizing import content, picture, run_here, settings, turns, write_items
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import load_manifest, load_vocabulary
from unitoken.tokenize.checks.verify import verify as find_problems
from unitoken.tokenize.job import Round, round_name
from unitoken.tokenize.merge import UnfinishedError, merge
from unitoken.tokenize.prepare import prepare
from unitoken.tokenize.summary import summary


@pytest.fixture(scope="module")
def chunks(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chunks of one item, of which the third is a reject."""
    folder = tmp_path_factory.mktemp("chunks")
    items = [{"conversations": turns("a", f"number {n}")} if n != 2 else {} for n in range(12)]
    run_here(settings(vqgan, chunk_size=1), write_items(folder, items), folder / "out")
    return folder / "out"


@pytest.fixture
def out(chunks: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chunks, tmp_path / "out"))


def test_a_dataset_is_in_the_order_of_its_chunks_by_number(out: Path) -> None:
    merge(str(out))
    ids = [sample["id"] for sample in StreamingDataset(local=str(out), batch_size=1, shuffle=False)]
    assert ids == [str(n) for n in range(12) if n != 2]


def test_the_manifest_accounts_for_every_file_and_item(out: Path) -> None:
    manifest = merge(str(out))
    assert manifest == load_manifest(out)
    assert load_vocabulary(out).fingerprint == manifest.vocabulary
    assert {name: sha256_of_file(out / name) for name in manifest.files} == manifest.files
    assert (manifest.items, manifest.samples, manifest.rejected) == (12, 11, 1)
    assert manifest.rejected == len((out / "rejects.jsonl").read_text().splitlines())


def test_a_second_merge_changes_nothing_even_after_a_crash(out: Path) -> None:
    merge(str(out))
    once = content(out)
    merge(str(out))
    assert content(out) == once
    (out / "manifest.json").unlink()  # killed before the last step
    (out / "index.json").write_text("old")
    merge(str(out))
    assert content(out) == once


def test_missing_chunks_are_named(out: Path) -> None:
    for number in (3, 10):
        shutil.rmtree(out / f"chunk-{number:06d}")
    with pytest.raises(
        UnfinishedError, match=r"missing 2 of 12 chunks: chunk-000003, chunk-000010\. Give the same `run`"
    ):
        merge(str(out))
    assert not (out / "index.json").exists()


def test_many_missing_chunks_are_cut_short(vqgan: Path, tmp_path: Path) -> None:
    prepare(settings(vqgan, chunk_size=1), [str(write_items(tmp_path, [{}] * 20))], str(tmp_path / "out"))
    with pytest.raises(
        UnfinishedError,
        match=r"missing 20 of 20 chunks: chunk-000000, .* chunk-000007, \.\.\. chunk-000019\.",
    ):
        merge(str(tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "shard.00000.mds.zip", "x/shard.00000.mds", ""]
)
def test_a_shard_outside_its_chunk_is_refused(out: Path, name: str) -> None:
    path = out / "chunk-000001" / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="expected uncompressed shards named"):
        merge(str(out))
    assert not (out / "manifest.json").exists()


def test_broken_chunks_are_named(out: Path) -> None:
    shard = out / "chunk-000001" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        ConfigError, match=r"shard.00000.mds: \d+ bytes, index.json says \d+ bytes; remove .*chunk-000001"
    ):
        merge(str(out))
    shard.unlink()
    with pytest.raises(ConfigError, match=r"chunk-000001/shard.00000.mds: not there, index.json says "):
        merge(str(out))
    (out / "chunk-000001" / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"chunk-000001/index.json: no MDS index"):
        merge(str(out))


@pytest.mark.parametrize("name", ["rejects.jsonl", "samples.parquet"])
def test_a_chunk_that_lost_items_is_refused(out: Path, name: str) -> None:
    """`in = out + rejected` holds for each chunk, and is counted, not assumed."""
    good, bad = out / "chunk-000001" / name, out / "chunk-000002" / name
    swapped = good.read_bytes(), bad.read_bytes()
    good.write_bytes(swapped[1])
    bad.write_bytes(swapped[0])
    with pytest.raises(
        ConfigError,
        match=r"chunk-000001: 1 samples in the shards, . in samples.parquet, . rejects, of 1 items; ",
    ):
        merge(str(out))


def test_the_last_round_of_retries_counts(vqgan: Path, tmp_path: Path) -> None:
    """Round 1 tries three rejects again; two of them have a picture by now. Round 2 tries one in vain."""
    names = [f"{n}.png" for n in range(6)]
    items = [{"conversations": turns("<|image|>", "a"), "image": name} for name in names]
    source, out = write_items(tmp_path, items), tmp_path / "out"
    picture(tmp_path / names[1], 1)
    run_here(settings(vqgan), source, out)
    assert (merge(str(out)).samples, merge(str(out)).rejected) == (1, 5)
    for number, (retried, come) in enumerate([([0, 2, 4], [2, 4]), ([5], [])], 1):
        for n in come:
            picture(tmp_path / names[n], n)
        tries = Round(items=[(n // 4, n) for n in retried])
        (out / round_name(number)).write_text(tries.model_dump_json())
        with pytest.raises(UnfinishedError, match=f"retry-{number:02d}-000000"):
            merge(str(out))
        run_here(settings(vqgan), source, out)
        manifest = merge(str(out))
    assert (manifest.items, manifest.samples, manifest.rejected) == (6, 3, 3)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert sorted(line["position"] for line in rejects) == [0, 3, 5]
    ids = [sample["id"] for sample in StreamingDataset(local=str(out), batch_size=1, shuffle=False)]
    assert ids == ["1", "2", "4"]
    once = content(out)
    (out / "manifest.json").unlink()
    merge(str(out))
    assert content(out) == once


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no job.json in it"):
        merge(str(tmp_path))
    (tmp_path / "job.json").write_text('{"items": 3}')
    with pytest.raises(ConfigError, match=r"job.json: not readable"):
        merge(str(tmp_path))


def test_left_out_turns_are_counted_over_all_chunks(vqgan: Path, tmp_path: Path) -> None:
    greeting = {"from": "gpt", "value": "Hello!"}
    items: list[dict[str, Any]] = [
        {"conversations": [greeting] * (number % 3 == 0) + turns("a", "b")} for number in range(20)
    ]
    # Rejected, and so not counted:
    items.append({"conversations": [greeting, *turns("a", "b")], "image": "none.png"})
    run_here(
        settings(vqgan, adapter="sharegpt", chunk_size=6), write_items(tmp_path, items), tmp_path / "out"
    )
    manifest = merge(str(tmp_path / "out"))
    assert (manifest.samples, manifest.rejected, manifest.turns_left_out) == (20, 1, 7)
    assert "7 conversations begin with the assistant and lost that turn" in summary(
        str(tmp_path / "out"), manifest
    )
    assert StreamingDataset(local=str(tmp_path / "out"), batch_size=1).num_samples == 20
    assert find_problems(str(tmp_path / "out"), 1.0) == []
