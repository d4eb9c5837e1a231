"""Chunks -> dataset: complete or refused, in numeric order, the same bytes each time."""

import json
import shutil
from pathlib import Path

import pytest
from streaming import StreamingDataset
from tokenizing import content, run_here, settings, turns, write_items

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.manifest import load_manifest, load_vocabulary, sha256_file
from unitoken.tokenize.job import prepare
from unitoken.tokenize.merge import UnfinishedError, merge, summary, too_many_rejects


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
    merge(out)
    ids = [sample["id"] for sample in StreamingDataset(local=str(out), batch_size=1, shuffle=False)]
    assert ids == [str(n) for n in range(12) if n != 2]


def test_the_manifest_accounts_for_every_file_and_item(out: Path) -> None:
    manifest = merge(out)
    assert manifest == load_manifest(out)
    assert load_vocabulary(out).fingerprint == manifest.vocabulary
    assert {name: sha256_file(out / name) for name in manifest.files} == manifest.files
    assert (manifest.items, manifest.samples, manifest.rejected) == (12, 11, 1)
    assert manifest.rejected == len((out / "rejects.jsonl").read_text().splitlines())


def test_merging_again_changes_nothing_also_after_a_crash(out: Path) -> None:
    merge(out)
    once = content(out)
    merge(out)
    assert content(out) == once
    (out / "manifest.json").unlink()  # killed before the last step
    (out / "index.json").write_text("old")
    merge(out)
    assert content(out) == once


def test_missing_chunks_are_named(out: Path) -> None:
    for number in (3, 10):
        shutil.rmtree(out / f"chunk-{number:06d}")
    with pytest.raises(UnfinishedError, match=r"missing 2 of 12 chunks: chunk-000003, chunk-000010\. Run the same"):
        merge(out)
    assert not (out / "index.json").exists()


def test_many_missing_chunks_are_cut_short(vqgan: Path, tmp_path: Path) -> None:
    prepare(settings(vqgan, chunk_size=1), write_items(tmp_path, [{}] * 20), tmp_path / "out")
    with pytest.raises(UnfinishedError, match=r"missing 20 of 20 chunks: chunk-000000, .* chunk-000007, \.\.\. chunk-000019\."):
        merge(tmp_path / "out")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "shard.00000.mds.zip", "x/shard.00000.mds", ""])
def test_a_shard_outside_its_chunk_is_refused(out: Path, name: str) -> None:
    path = out / "chunk-000001" / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="expected uncompressed shards named"):
        merge(out)
    assert not (out / "manifest.json").exists()


def test_broken_chunks_are_named(out: Path) -> None:
    shard = out / "chunk-000001" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"shard.00000.mds: \d+ bytes, index.json says \d+; remove .*chunk-000001"):
        merge(out)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"chunk-000001/shard.00000.mds: No such file"):
        merge(out)
    (out / "chunk-000001" / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"chunk-000001/index.json: no MDS index"):
        merge(out)


def test_a_folder_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no job.json in it"):
        merge(tmp_path)
    (tmp_path / "job.json").write_text('{"items": 3}')
    with pytest.raises(ConfigError, match=r"job.json: not readable"):
        merge(tmp_path)


def test_the_summary_says_what_a_person_asks(out: Path) -> None:
    text = summary(out, merge(out))
    assert "12 items -> 11 samples, 1 rejected; " in text
    assert "1  no conversations" in text
    assert str(out / "rejects.jsonl") in text


@pytest.mark.parametrize(
    ("rejected", "items", "allowed", "too_many"),
    [
        (9, 9, 0.01, False),
        (10, 1000, 0.01, False),
        (11, 1000, 0.01, True),
        (10, 10, 1.0, False),
        (10, 20, 0.0, True),
    ],
)
def test_ten_bad_items_are_forgiven_and_then_a_share(out: Path, rejected: int, items: int, allowed: float, too_many: bool) -> None:
    manifest = merge(out).model_copy(update={"rejected": rejected, "items": items, "samples": items - rejected})
    problem = too_many_rejects(manifest, allowed)
    assert (problem is not None) == too_many
    if problem:
        assert f"{rejected} of {items}" in problem
