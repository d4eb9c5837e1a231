"""Lengths of samples, read from a sidecar."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from support.small_datasets import (
    BLOCK,
    make_record,
    small_vocabulary,
    text_records,
    write_dataset,
    write_manifest,
)
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.lengths import StreamSamples, read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import open_sources

VOCABULARY = small_vocabulary()
VIEWS = Views(image_size=8, patch_size=4)  # 4 features
#           text, question images, answer images
SHAPES = [(5, 0, 0), (6, 1, 0), (7, 2, 1), (8, 0, 2), (30, 0, 0), (9, 1, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [make_record(f"r{n}", VOCABULARY, *shape) for n, shape in enumerate(SHAPES)]
    return write_dataset(tmp_path_factory.mktemp("data") / "one", records)


def read(
    folder: Path, stream: dict | None = None, views: Views | None = VIEWS, **settings: Any
) -> StreamSamples:
    config = DataConfig.model_validate(
        {
            "streams": {"a": {"local": str(folder), **(stream or {})}},
            "packed_length": 1000,
            "global_batch": 1,
            **settings,
        }
    )
    sources = open_sources(config)
    return read_lengths(sources[0], Recipe.of(config, sources, views), views)


@pytest.mark.parametrize(
    ("continuous", "images"),
    [("none", [0, 0, 0, 0, 0, 0]), ("questions", [0, 1, 2, 0, 0, 1]), ("all", [0, 1, 3, 2, 0, 1])],
)
def test_lengths_include_the_features_of_images_that_have_them(
    folder: Path, continuous: str, images: list[int]
) -> None:
    found = read(folder, continuous=continuous)
    tokens = [text + 2 + (asked + drawn) * BLOCK for text, asked, drawn in SHAPES]
    assert found.images.tolist() == images
    assert found.lengths.tolist() == [t + 5 * i for t, i in zip(tokens, images, strict=True)]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["text"], [0, 4]),
        (["understanding"], [1, 5]),
        (["generation"], [2, 3]),
        (["text", "generation"], [0, 2, 3, 4]),
    ],
)
def test_only_samples_of_the_chosen_kinds_are_candidates(
    folder: Path, kinds: list[str], expected: list[int]
) -> None:
    found = read(folder, {"kinds": kinds})
    assert np.flatnonzero(found.lengths).tolist() == expected
    assert np.flatnonzero(found.target_tokens).tolist() == expected
    assert found.filtered == 6 - len(expected)


def test_samples_over_the_streams_limit_are_left_out_and_counted(folder: Path) -> None:
    found = read(folder, {"max_tokens": 24})
    assert found.lengths.tolist() == [7, 23, 0, 0, 0, 0]
    assert found.over_long == 4
    assert read(folder, packed_length=24).lengths.tolist() == found.lengths.tolist()
    assert read(folder, {"max_tokens": 2000}, packed_length=24).lengths.tolist() == found.lengths.tolist()


def test_samples_over_the_streams_limit_may_be_cut_and_counted(folder: Path) -> None:
    found = read(folder, {"max_tokens": 24}, over_long="truncate_text")
    assert found.lengths.tolist() == [7, 23, 24, 24, 24, 24]
    assert (found.over_long, found.cut) == (0, 4)
    assert max(found.target_tokens) <= 24


def test_a_samples_side_of_the_held_out_fraction_is_its_ids(tmp_path: Path) -> None:
    records = text_records(400)
    write_dataset(tmp_path / "a", records)
    write_dataset(tmp_path / "b", records[200:] + text_records(100, "other"))
    train, other = (read(tmp_path / "a", {"held_out": 0.2}, split=split) for split in ("train", "held_out"))
    assert ((train.lengths > 0) ^ (other.lengths > 0)).all()
    assert np.count_nonzero(other.lengths) == pytest.approx(80, abs=25)
    assert train.filtered == train.held_out == np.count_nonzero(other.lengths)
    again = read(tmp_path / "b", {"held_out": 0.2})
    assert (again.lengths[:200] > 0).tolist() == (train.lengths[200:] > 0).tolist()


def test_a_larger_fraction_holds_out_all_of_a_smaller_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", text_records(300))
    few, more = (
        read(tmp_path / "a", {"held_out": share}, split="held_out").lengths > 0 for share in (0.1, 0.3)
    )
    assert few.sum() < more.sum()
    assert not (few & ~more).any()


@pytest.mark.parametrize(
    ("stream", "settings", "found"),
    [
        (
            {},
            {"packed_length": 6},
            r"stream 'a': each of its 6 samples is longer than 6 positions \(the shortest has 7\)",
        ),
        (
            {"kinds": ["text"], "max_tokens": 5},
            {},
            "4 of its 6 samples are of other kinds or held out, each of the other 2 is longer",
        ),
        ({"held_out": 1e-9}, {"split": "held_out"}, "6 of its 6 samples are of other kinds or held out"),
    ],
)
def test_a_stream_without_a_candidate_is_an_error_that_says_why(
    folder: Path, stream: dict[str, Any], settings: dict[str, Any], found: str
) -> None:
    with pytest.raises(ConfigError, match=found):
        read(folder, stream, **settings)


def test_a_sidecar_of_other_samples_than_the_index_is_refused(tmp_path: Path) -> None:
    records = text_records(20)
    folder = write_dataset(tmp_path / "a", records)
    table = pyarrow.parquet.read_table(folder / SIDECAR)
    pyarrow.parquet.write_table(table.slice(0, 19), folder / SIDECAR)
    with pytest.raises(ConfigError, match=r"samples\.parquet is not the file that manifest\.json names"):
        read(folder)
    write_manifest(folder, records, VOCABULARY)
    with pytest.raises(ConfigError, match="19 samples, the shards of the index hold 20"):
        read(folder)
