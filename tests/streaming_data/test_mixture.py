import json
import subprocess
import sys

import pydantic
import pytest

from support.small_datasets import make_record, small_vocabulary, text_records, write_dataset, write_manifest
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.dataset.images import allowed_crops
from unitoken.dataset.manifest import INDEX, MANIFEST, SIDECAR, load_manifest
from unitoken.streaming_data.check import check_mixture, check_streams_vocabulary, other_codes
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import crops_of, open_sources, to_streams


def settings(tmp_path, streams: dict, **others) -> DataConfig:
    return DataConfig.model_validate(
        {
            "streams": streams,
            "packed_length": 64,
            "global_batch": 4,
            "cache": str(tmp_path / "cache"),
            **others,
        }
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "one", text_records(40))


@pytest.mark.parametrize(
    ("streams", "others", "found"),
    [
        (
            {"a": {"local": "x", "proportion": 1}, "b": {"local": "y", "repeat": 2}},
            {},
            r"'a' has it, 'b' \(repeat\) not",
        ),
        (
            {"a": {"local": "x", "proportion": 1}, "b": {"local": "y"}},
            {},
            r"'a' has it, 'b' \(no weight\) not",
        ),
        ({"a": {"local": "x", "choose": 1, "repeat": 2}}, {}, "repeat and choose"),
        ({"a": {"local": "x", "proportion": 0}}, {}, "proportions of all streams are 0"),
        ({"a": {"local": "x", "repeat": -1}}, {}, "greater than or equal to 0"),
        ({"a": {"repeat": 1}}, {}, "needs `local` or `remote`"),
        (
            {"a": {"local": "x", "choose": 5}},
            {"epoch_samples": 10},
            r"epoch_samples does not go with .* choose: 'a' \(choose\)",
        ),
        (
            {"a": {"local": "x", "repeat": 5}},
            {"epoch_tokens": 10},
            r"epoch_tokens does not go with .* choose: 'a' \(repeat\)",
        ),
        (
            {"a": {"local": "x"}},
            {"epoch_tokens": 10, "epoch_samples": 10},
            "one of epoch_samples and epoch_tokens",
        ),
        ({"a": {"local": "x"}}, {"unit": "bytes"}, "'samples', 'tokens' or 'target_tokens'"),
        (
            {"a": {"local": "x"}},
            {"split": "held_out"},
            "split: held_out needs `held_out` above 0 in every stream: 'a' has none",
        ),
        ({"a": {"local": "x", "held_out": 1}}, {}, "less than 1"),
        ({"a": {"local": "x", "kinds": ["txt"]}}, {}, "'understanding', 'generation' or 'text'"),
        ({"a": {"local": "x", "kinds": []}}, {}, "at least 1 item"),
        (
            {"a": {"local": "x", "endpoint": "http://h"}},
            {},
            "`endpoint` is for a `remote` that begins with s3://, found None",
        ),
        ({"a": {"local": "x"}}, {"cache_limit": "much"}, "valid integer"),
        ({"a": {"local": "x"}}, {"over_long": "truncate"}, "'reject' or 'truncate_text'"),
        ({}, {}, "at least 1 item"),
        (
            {"a": {"local": "x", "cache_limit": "1gb"}},
            {},
            "cache_limit",
        ),  # upstream's deletes local-only data
    ],
)
def test_a_mixture_that_contradicts_itself_is_refused(tmp_path, streams, others, found):
    with pytest.raises(ValueError, match=found):
        settings(tmp_path, streams, **others)


def test_a_misspelt_key_names_the_file_and_the_valid_keys(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("streams: {a: {local: x, propotion: 1}}\npacked_length: 64\nglobal_batch: 4\n")
    with pytest.raises(
        ConfigError,
        match=r"data.yaml: unknown key 'streams.a.propotion'; did you mean 'proportion'\?.*choose",
    ):
        load_config(DataConfig, path)


@pytest.mark.parametrize("weight", [{}, {"repeat": 2.0}, {"choose": 7}, {"proportion": 0.5}])
def test_streams_become_streamings_own_with_their_weight(tmp_path, dataset, weight):
    source = open_sources(settings(tmp_path, {"a": {"local": str(dataset), **weight}}))
    stream = to_streams(source)[0]
    assert stream.local == str(dataset)
    assert {
        key: getattr(stream, key) for key in ("proportion", "repeat", "choose") if hasattr(stream, key)
    } == weight


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/none: not a dataset folder: no such folder"):
        check_mixture(settings(tmp_path, {"a": {"local": str(tmp_path / "none")}}))
    with pytest.raises(ConfigError, match=f"{tmp_path}: not a dataset folder: it has no {MANIFEST}"):
        check_mixture(settings(tmp_path, {"a": {"local": str(tmp_path)}}))


def test_streams_of_different_vocabularies_are_refused_naming_both(tmp_path, dataset):
    vocabulary = small_vocabulary(60)
    other = write_dataset(tmp_path / "other", text_records(10), vocabulary)
    with pytest.raises(ConfigError) as caught:
        check_mixture(settings(tmp_path, {"a": {"local": str(dataset)}, "b": {"local": str(other)}}))
    for part in (str(dataset), str(other), vocabulary.fingerprint, small_vocabulary().fingerprint):
        assert part in str(caught.value)


def test_a_model_of_another_vocabulary_is_refused_naming_both(tmp_path, dataset):
    sources = open_sources(settings(tmp_path, {"a": {"local": str(dataset)}}))
    check_streams_vocabulary(sources, small_vocabulary(), "the model")
    with pytest.raises(ConfigError) as caught:
        check_streams_vocabulary(sources, small_vocabulary(60), "the model")
    for part in (str(dataset), small_vocabulary(60).fingerprint, small_vocabulary().fingerprint, "the model"):
        assert part in str(caught.value)


def test_a_mixture_is_checked_without_heavy_imports(tmp_path, dataset):
    config = settings(tmp_path, {"a": {"local": str(dataset)}}).model_dump_json()
    program = (
        "import sys\nfrom unitoken.streaming_data.sources import DataConfig, check_mixture\n"
        "print(check_mixture(DataConfig.model_validate_json(sys.argv[1])).fingerprint)\n"
        "assert not {'torch', 'streaming', 'composer', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, config], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == small_vocabulary().fingerprint


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_remote_datasets_small_files_are_fetched_and_nothing_else(tmp_path, dataset, prefix):
    config = settings(tmp_path, {"a": {"remote": f"{prefix}{dataset}"}})
    assert check_mixture(config).fingerprint == small_vocabulary().fingerprint
    folder = open_sources(config)[0].folder
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / SIDECAR).read_bytes() == (dataset / SIDECAR).read_bytes()
    assert not list(folder.glob("**/*.mds"))
    assert not list(folder.glob(".aside*"))


def test_a_remote_dataset_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=f"stream 'a': {tmp_path}/none/manifest.json: not there"):
        check_mixture(settings(tmp_path, {"a": {"remote": str(tmp_path / "none")}}))
    with pytest.raises(ConfigError, match="expected a path or a URL that begins with s3://"):
        check_mixture(settings(tmp_path, {"a": {"remote": "gopher://x/y"}}))


def test_the_cache_of_another_dataset_is_not_taken_for_this_one(tmp_path, dataset):
    cache = str(tmp_path / "local")
    check_mixture(settings(tmp_path, {"a": {"remote": str(dataset), "local": cache}}))
    other = write_dataset(tmp_path / "other", text_records(10))
    with pytest.raises(ConfigError, match="caches another dataset"):
        check_mixture(settings(tmp_path, {"a": {"remote": str(other), "local": cache}}))


def test_a_damaged_cached_file_is_fetched_again(tmp_path, dataset):
    config = settings(tmp_path, {"a": {"remote": str(dataset)}})
    folder = open_sources(config)[0].folder
    (folder / INDEX).write_text("{")
    check_mixture(config)
    assert (folder / INDEX).read_bytes() == (dataset / INDEX).read_bytes()


def test_a_remote_file_that_is_not_what_the_manifest_names_is_refused(tmp_path):
    remote = write_dataset(tmp_path / "remote", text_records(10))
    (remote / SIDECAR).write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=f"{remote}/{SIDECAR} is not the file that manifest.json names"):
        check_mixture(settings(tmp_path, {"a": {"remote": str(remote)}}))
    assert not list((tmp_path / "cache").glob("**/.aside*"))


def test_an_index_that_was_changed_by_hand_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "data", text_records(10))
    (folder / INDEX).write_text((folder / INDEX).read_text() + " ")
    with pytest.raises(ConfigError, match=f"stream 'a': {folder}/{INDEX} is not the file that"):
        check_mixture(settings(tmp_path, {"a": {"local": str(folder)}}))


@pytest.mark.parametrize(
    "basename", ["../secret.mds", "chunk-000000/../../secret.mds", "/etc/passwd", "..\\secret", ""]
)
def test_a_shard_name_that_leads_out_of_the_folder_is_refused(tmp_path, basename):
    records = text_records(10)
    folder = write_dataset(tmp_path / "data", records)
    index = json.loads((folder / INDEX).read_bytes())
    index["shards"][0]["raw_data"]["basename"] = basename
    (folder / INDEX).write_text(json.dumps(index))
    write_manifest(folder, records, small_vocabulary())
    with pytest.raises(ConfigError, match="leads out of the folder"):
        check_mixture(settings(tmp_path, {"a": {"local": str(folder)}}))


def test_a_moved_dataset_has_the_same_fingerprint_and_another_has_not(tmp_path, dataset):
    def fingerprint(folder):
        return open_sources(settings(tmp_path, {"a": {"local": str(folder)}}))[0].fingerprint

    before = write_dataset(tmp_path / "before", text_records(40))
    one = fingerprint(before)
    before.rename(tmp_path / "after")
    assert fingerprint(tmp_path / "after") == one == fingerprint(dataset)
    assert fingerprint(write_dataset(tmp_path / "other", text_records(40, seed=1))) != one


def test_the_cache_follows_the_users_environment(tmp_path, monkeypatch):
    config = settings(tmp_path, {"a": {"local": "x"}}, cache=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_folder == tmp_path / "unitoken"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert config.cache_folder == tmp_path / "home" / ".cache" / "unitoken"


def with_vision(folder, records, **changes):
    write_dataset(folder, records)
    manifest = load_manifest(folder)
    changed = manifest.model_copy(update={"vision": manifest.vision.model_copy(update=changes)})
    (folder / MANIFEST).write_bytes(changed.dump())
    return {"local": str(folder)}


def test_streams_of_other_image_tokenizers_are_told_apart_by_a_warning(tmp_path):
    drawn = [make_record("d", small_vocabulary(), 4, answer_images=1)]
    streams = {
        "a": with_vision(tmp_path / "a", drawn, precision="tf32"),
        "b": with_vision(tmp_path / "b", drawn, precision="tf32"),
        "texts": with_vision(tmp_path / "texts", text_records(3), precision="fp32"),  # hold no codes
    }
    assert other_codes(open_sources(settings(tmp_path, streams))) == []
    streams["c"] = with_vision(tmp_path / "c", drawn, precision="bf16", weights="unknown")
    message = "weights 0000000000000000 and unknown, precision tf32 and bf16"
    (line,) = other_codes(open_sources(settings(tmp_path, streams)))
    assert line == f"streams 'a' and 'c' have image codes of different tokenizers: {message}"


def test_sizes_are_written_as_people_write_them(tmp_path):
    limits = [
        settings(tmp_path, {"a": {"local": "x"}}, cache_limit=value).cache_limit
        for value in ("2gb", "1.5 MB", 1000)
    ]
    assert limits == [2 << 30, 3 << 19, 1000]


def test_a_batch_may_be_told_in_tokens():
    settings = {"streams": {"a": {"local": "x"}}, "packed_length": 64}
    assert DataConfig(**settings, global_batch="512tok").global_batch == 8
    for batch, message in (
        ("500tok", "500tok are no whole number of packs of packed_length: 64"),
        ("32tok", "32tok are no whole number"),
        ("tok", "global_batch"),
    ):
        with pytest.raises(pydantic.ValidationError, match=message):
            DataConfig(**settings, global_batch=batch)
    with pytest.raises(
        pydantic.ValidationError, match="packed_length"
    ):  # and no KeyError, where that is what is missing
        DataConfig(streams=settings["streams"], global_batch="512tok")


def test_the_crops_of_a_mixture_are_those_of_its_pictures_the_most_frequent_first(tmp_path):
    """Also of a remote dataset, and not of one without pictures, whatever its manifest says."""

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
    config = settings(tmp_path, {"few": {"local": few}, "many": {"remote": many}, "text": {"local": text}})
    aspect = allowed_crops("aspect", 64, 32)
    assert len(aspect) > 2
    assert crops_of([source.manifest for source in open_sources(config)]) == aspect
    assert (64, 64) in aspect
    only = settings(tmp_path, {"text": {"local": text}})
    assert crops_of([source.manifest for source in open_sources(only)]) == []
    square = settings(tmp_path, {"few": {"local": few}})
    assert crops_of([source.manifest for source in open_sources(square)]) == [(64, 64)]
