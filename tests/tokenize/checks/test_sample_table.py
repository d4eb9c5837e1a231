"""What is known of every sample without its shard."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from support.small_datasets import make_record, small_vocabulary, write_dataset
from support.tokenizing import run_here, settings, turns, write_items
from unitoken.common.errors import ConfigError
from unitoken.dataset.kinds import KINDS
from unitoken.storage.folder import Folder
from unitoken.storage.open import open_store
from unitoken.tokenize.checks.sample_filters import filter_query, read_filters
from unitoken.tokenize.checks.sample_reader import SampleReader
from unitoken.tokenize.checks.sample_table import PROPORTIONS, Filters, PictureSizes, SampleTable
from unitoken.tokenize.merge import merge


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = small_vocabulary()
    records = [
        make_record(f"{'abc'[number % 3]}-{number}", vocabulary, 5 + number, number % 3 == 1, number % 3 == 2)
        for number in range(30)
    ]
    return write_dataset(tmp_path_factory.mktemp("table") / "data", records, vocabulary)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), list(range(30))),
        (Filters(kinds=("text",)), list(range(0, 30, 3))),
        (Filters(kinds=("understanding", "generation"), longest=20), [1, 2]),
        (Filters(shortest=30, kinds=("text",)), [24, 27]),
        (Filters(part_of_id="C-2"), [2, 20, 23, 26, 29]),
        (Filters(source=1), []),
        (Filters(part_of_id="%"), []),
    ],
)
def test_samples_are_found_by_the_sidecar(dataset: Path, filters: Filters, expected: list[int]) -> None:
    store = Folder(dataset)
    with SampleTable(store, SampleReader(store).entries) as table:
        assert table.find(filters).tolist() == expected


def test_pictures_are_counted_by_size_and_shape() -> None:
    sizes = PictureSizes()
    sizes.add(np.array([[640, 480], [480, 640], [10, 10], [0, 0], [1, 70_000]], np.uint32))
    assert np.flatnonzero(sizes.longer_sides).tolist() == [10, 640, 1 << 14]
    assert sizes.longer_sides[640] == 2
    assert sizes.proportions.sum() == 4
    middle = len(PROPORTIONS) // 2 - 1
    assert PROPORTIONS[middle] < 1 < PROPORTIONS[middle + 1]
    assert sizes.proportions[middle] == 1
    assert sizes.proportions[0] == 1  # narrower than all borders


def test_a_sample_knows_its_file(vqgan: Path, tmp_path: Path) -> None:
    sources = [
        write_items(tmp_path / name, [{"conversations": turns("a", "b")}] * count)
        for name, count in (("one", 5), ("two", 2))
    ]
    from unitoken.tokenize.pipeline.worker import run_rank
    from unitoken.tokenize.prepare import prepare

    job = prepare(settings(vqgan), [str(source) for source in sources], str(tmp_path / "data"))
    run_rank(job, 0, 1, lambda finished, rejected: None)
    merge(str(tmp_path / "data"))
    store = open_store(str(tmp_path / "data"))
    with SampleTable(store, SampleReader(store).entries) as table:
        assert table.source_names == tuple(map(str, sources))  # both are called items.json
        assert table.find(Filters(source=1)).tolist() == [5, 6]
        assert [KINDS[place] for place in table.kinds] == ["text"] * 7


def test_one_file_is_no_choice(vqgan: Path, tmp_path: Path) -> None:
    run_here(settings(vqgan), write_items(tmp_path, [{"conversations": turns("a", "b")}]), tmp_path / "data")
    merge(str(tmp_path / "data"))
    store = open_store(str(tmp_path / "data"))
    with SampleTable(store, SampleReader(store).entries) as table:
        assert table.source_names == ()


def test_a_sidecar_of_another_dataset_is_refused(dataset: Path) -> None:
    store = Folder(dataset)
    with pytest.raises(ConfigError, match=r"samples\.parquet: 30 samples, the index has \d+"):
        SampleTable(store, SampleReader(store).entries[1:])


def test_filters_survive_the_address_of_a_page() -> None:
    filters = Filters(("text", "generation"), 3, 40, 0, "a&b=<c>")
    fields: dict[str, list[str]] = {}
    for name, value in filter_query(filters):
        fields.setdefault(name, []).append(value)
    assert read_filters(fields) == filters
    assert filter_query(Filters()) == []
    assert read_filters({"from": [""], "id": [""]}) == Filters()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"from": ["-1"]}, "from: expected a whole number, found '-1'"),
        ({"to": ["²"]}, "to: expected a whole number"),
        ({"source": ["9" * 13]}, "source: expected a whole number"),
        ({"kind": ["text", "../x"]}, "kind: expected text, understanding, generation"),
    ],
)
def test_what_no_form_sends_is_refused(fields: dict[str, list[str]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_filters(fields)


class Remote(Folder):
    """A folder that looks like a bucket."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.url = "s3://bucket/data"
        self.opened: list[BinaryIO] = []

    def open(self, name: str) -> BinaryIO:
        self.opened.append(super().open(name))
        return self.opened[-1]


def test_a_buckets_sidecar_is_read_once(dataset: Path) -> None:
    store = Remote(dataset)
    with SampleTable(store, SampleReader(store).entries) as table:
        assert [file.closed for file in store.opened] == [True]
        for _ in range(2):
            assert table.find(Filters(part_of_id="a-1")).tolist() == [12, 15, 18]
    assert len(store.opened) == 1
