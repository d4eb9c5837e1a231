"""Packs that are too short for the data's images are found before anything large is loaded."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from support.small_datasets import BLOCK, make_record, small_vocabulary, write_dataset, write_manifest
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import SIDECAR, load_vocabulary
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.feature_cost import check_images_fit
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import open_sources

VOCABULARY = small_vocabulary()


def dataset(folder: Path, sizes: list[tuple[int, int]], drawn: int = 0) -> Path:
    """Write a sample with a question image of each size, `drawn` with a generated image, and one of text."""
    records = [make_record(f"q{n}", VOCABULARY, 6, question_images=1) for n in range(len(sizes))]
    records += [make_record(f"a{n}", VOCABULARY, 6, answer_images=1) for n in range(drawn)]
    records.append(make_record("t", VOCABULARY, 6))
    write_dataset(folder, records)
    table = pyarrow.parquet.read_table(folder / SIDECAR)
    of_images = [[*size] for size in sizes] + [[4, 4]] * drawn + [[]]
    column = pyarrow.array(of_images, pyarrow.list_(pyarrow.uint32()))
    pyarrow.parquet.write_table(
        table.set_column(table.column_names.index("image_sizes"), "image_sizes", column), folder / SIDECAR
    )
    write_manifest(folder, records, VOCABULARY)
    return folder


def check(folder: Path, packed_length: int, views: Views | None, continuous: str = "questions") -> None:
    config = DataConfig.model_validate(
        {
            "streams": {"a": {"local": str(folder)}},
            "packed_length": packed_length,
            "global_batch": 1,
            "continuous": continuous,
        }
    )
    for source in open_sources(config):
        check_images_fit(source, config, views, load_vocabulary(source.folder))


def test_with_anyres_the_smallest_image_of_the_data_decides(tmp_path: Path) -> None:
    views = Views(8, 4, anyres=True)
    folder = dataset(tmp_path / "one", [(64, 64), (30, 10), (64, 64)])
    assert views.count(64, 64) > views.count(30, 10)
    needed = BLOCK + 1 + views.count(30, 10)
    check(folder, needed, views)
    with pytest.raises(
        ConfigError,
        match=rf"packed_length: {needed - 1} is too short for any question image .*: "
        rf"the smallest takes {needed} \(",
    ):
        check(folder, needed - 1, views)


def test_generated_images_need_feature_room_only_if_all_do(tmp_path: Path) -> None:
    views = Views(8, 4)
    folder = dataset(tmp_path / "one", [], drawn=2)
    check(folder, BLOCK, views)
    with pytest.raises(ConfigError, match=f"generated image of stream 'a': the smallest takes {BLOCK + 5}"):
        check(folder, BLOCK, views, continuous="all")
    check(folder, BLOCK, None, continuous="none")
    with pytest.raises(ConfigError, match=f"generated image of stream 'a': the smallest takes {BLOCK}"):
        check(folder, BLOCK - 1, None, continuous="none")


def test_data_without_images_needs_no_room_for_one(tmp_path: Path) -> None:
    check(dataset(tmp_path / "one", []), 8, Views(8, 4))
