"""Finding the datasets of a mixture, and their small files."""

import json
from pathlib import Path

import pytest

from support.small_datasets import (
    data_config,
    make_record,
    small_vocabulary,
    text_records,
    write_dataset,
    write_manifest,
)
from unitoken.common.errors import ConfigError
from unitoken.dataset.images import allowed_crops
from unitoken.dataset.manifest import INDEX, MANIFEST, SIDECAR
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.check import check_sources
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import crops_of, open_sources, to_streams


def check(config: DataConfig) -> Vocabulary:
    return check_sources(open_sources(config), config, None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "one", text_records(40))


@pytest.mark.parametrize("weight", [{}, {"repeat": 2.0}, {"choose": 7}, {"proportion": 0.5}])
def test_streams_become_streamings_own_with_their_weight(
    tmp_path: Path, dataset: Path, weight: dict[str, float]
) -> None:
    source = open_sources(data_config(tmp_path, {"a": {"local": str(dataset), **weight}}))
    stream = to_streams(source)[0]
    assert stream.local == str(dataset)
    assert {
        key: getattr(stream, key) for key in ("proportion", "repeat", "choose") if hasattr(stream, key)
    } == weight


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/none: not a dataset folder: no such folder"):
        check(data_config(tmp_path, {"a": {"local": str(tmp_path / "none")}}))
    with pytest.raises(ConfigError, match=f"{tmp_path}: not a dataset folder: it has no {MANIFEST}"):
        check(data_config(tmp_path, {"a": {"local": str(tmp_path)}}))


def test_streams_of_different_vocabularies_are_refused(tmp_path: Path, dataset: Path) -> None:
    vocabulary = small_vocabulary(60)
    other = write_dataset(tmp_path / "other", text_records(10), vocabulary)
    with pytest.raises(ConfigError) as caught:
        check(data_config(tmp_path, {"a": {"local": str(dataset)}, "b": {"local": str(other)}}))
    for part in (str(dataset), str(other), vocabulary.fingerprint, small_vocabulary().fingerprint):
        assert part in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_only_the_small_files_of_a_remote_dataset_are_fetched(
    tmp_path: Path, dataset: Path, prefix: str
) -> None:
    config = data_config(tmp_path, {"a": {"remote": f"{prefix}{dataset}"}})
    assert check(config).fingerprint == small_vocabulary().fingerprint
    folder = open_sources(config)[0].folder
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / SIDECAR).read_bytes() == (dataset / SIDECAR).read_bytes()
    assert not list(folder.glob("**/*.mds"))
    assert not list(folder.glob(".aside*"))


def test_a_missing_remote_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"stream 'a': {tmp_path}/none: not a dataset folder: it has no"):
        check(data_config(tmp_path, {"a": {"remote": str(tmp_path / "none")}}))
    with pytest.raises(ConfigError, match="expected a path or a URL that begins with s3://"):
        check(data_config(tmp_path, {"a": {"remote": "gopher://x/y"}}))


def test_the_cache_of_another_dataset_is_not_taken_for_this_one(tmp_path: Path, dataset: Path) -> None:
    cache = str(tmp_path / "local")
    check(data_config(tmp_path, {"a": {"remote": str(dataset), "local": cache}}))
    other = write_dataset(tmp_path / "other", text_records(10))
    with pytest.raises(ConfigError, match="caches another dataset"):
        check(data_config(tmp_path, {"a": {"remote": str(other), "local": cache}}))


def test_a_damaged_cached_file_is_fetched_again(tmp_path: Path, dataset: Path) -> None:
    config = data_config(tmp_path, {"a": {"remote": str(dataset)}})
    folder = open_sources(config)[0].folder
    (folder / INDEX).write_text("{")
    check(config)
    assert (folder / INDEX).read_bytes() == (dataset / INDEX).read_bytes()


def test_a_remote_file_that_differs_from_the_manifest_is_refused(tmp_path: Path) -> None:
    remote = write_dataset(tmp_path / "remote", text_records(10))
    (remote / SIDECAR).write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=f"{remote}/{SIDECAR} is not the file that manifest.json names"):
        check(data_config(tmp_path, {"a": {"remote": str(remote)}}))
    assert not list((tmp_path / "cache").glob("**/.aside*"))


def test_an_index_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", text_records(10))
    (folder / INDEX).write_text((folder / INDEX).read_text() + " ")
    with pytest.raises(ConfigError, match=f"stream 'a': {folder}/{INDEX} is not the file that"):
        check(data_config(tmp_path, {"a": {"local": str(folder)}}))


@pytest.mark.parametrize(
    "basename", ["../secret.mds", "chunk-000000/../../secret.mds", "/etc/passwd", "..\\secret", ""]
)
def test_a_shard_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, basename: str) -> None:
    records = text_records(10)
    folder = write_dataset(tmp_path / "data", records)
    index = json.loads((folder / INDEX).read_bytes())
    index["shards"][0]["raw_data"]["basename"] = basename
    (folder / INDEX).write_text(json.dumps(index))
    write_manifest(folder, records, small_vocabulary())
    with pytest.raises(ConfigError, match="leads out of the folder"):
        check(data_config(tmp_path, {"a": {"local": str(folder)}}))


def test_moving_a_dataset_keeps_its_fingerprint(tmp_path: Path, dataset: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return open_sources(data_config(tmp_path, {"a": {"local": str(folder)}}))[0].fingerprint

    before = write_dataset(tmp_path / "before", text_records(40))
    one = fingerprint(before)
    before.rename(tmp_path / "after")
    assert fingerprint(tmp_path / "after") == one == fingerprint(dataset)
    assert fingerprint(write_dataset(tmp_path / "other", text_records(40, seed=1))) != one


def test_crops_are_those_of_the_datasets_with_most_images_first(tmp_path: Path) -> None:
    """Remote datasets count, and datasets without images do not, even if their manifests name crops."""

    def dataset(name: str, pictures: int, **manifest: object) -> str:
        folder = tmp_path / name
        write_dataset(
            folder,
            [make_record(f"r{n}", small_vocabulary(), 4, question_images=1) for n in range(pictures)]
            or text_records(3),
        )
        fields = {**json.loads((folder / MANIFEST).read_bytes()), **manifest}
        (folder / MANIFEST).write_text(json.dumps(fields))
        return str(folder)

    few = dataset("few", 2, crop="square", target_size=64)
    many = dataset("many", 5, crop="aspect", target_size=64)
    text = dataset("text", 0, crop="square", target_size=512)
    config = data_config(tmp_path, {"few": {"local": few}, "many": {"remote": many}, "text": {"local": text}})
    aspect = allowed_crops("aspect", 64, 32)
    assert len(aspect) > 2
    assert crops_of([source.manifest for source in open_sources(config)]) == aspect
    assert (64, 64) in aspect
    only = data_config(tmp_path, {"text": {"local": text}})
    assert crops_of([source.manifest for source in open_sources(only)]) == []
    square = data_config(tmp_path, {"few": {"local": few}})
    assert crops_of([source.manifest for source in open_sources(square)]) == [(64, 64)]
