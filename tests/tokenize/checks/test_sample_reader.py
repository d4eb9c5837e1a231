"""Single samples by their number."""

import json
from pathlib import Path

import pytest

from support.small_datasets import text_records, write_dataset
from unitoken.common.errors import DataError
from unitoken.storage.folder import Folder
from unitoken.tokenize.checks.sample_reader import SampleReader, spread_numbers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("reader") / "data", text_records(60))


class Counting(Folder):
    """A folder that counts what is read of its shards."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read_bytes: list[int] = []

    def read_range(self, name: str, start: int, end: int) -> bytes:
        self.read_bytes.append(end - start)
        return super().read_range(name, start, end)


def test_any_sample_is_read_without_the_others(dataset: Path) -> None:
    store = Counting(dataset)
    reader, records = SampleReader(store), text_records(60)
    assert len(reader) == 60
    assert len(reader.entries) > 2
    for number in (59, 0, 30):
        assert str(reader.read(number).to_mds()) == str(records[number].to_mds())
    assert len(store.read_bytes) == 6
    assert max(store.read_bytes) < 300


def test_a_corrupt_sample_is_named(dataset: Path, tmp_path: Path) -> None:
    index = json.loads((dataset / "index.json").read_bytes())
    name = index["shards"][1]["raw_data"]["basename"]
    for path in dataset.rglob("*.*"):
        copy = tmp_path / path.relative_to(dataset)
        copy.parent.mkdir(exist_ok=True, parents=True)
        copy.write_bytes(path.read_bytes() if path != dataset / name else b"\xff" * 4096)
    reader = SampleReader(Folder(tmp_path))
    first = index["shards"][0]["samples"]
    assert reader.read(first - 1).id == f"s{first - 1}"
    with pytest.raises(DataError, match=rf"{name}: sample 0 is not readable: .*; see `unitoken verify`"):
        reader.read(first)


def test_chosen_samples_are_from_all_over_the_dataset() -> None:
    numbers = spread_numbers(1000, 10)
    assert [number // 100 for number in numbers] == list(range(10))
    assert len({number % 100 for number in numbers}) > 1
    assert numbers == spread_numbers(1000, 10)
    assert spread_numbers(3, 10) == [0, 1, 2]
    assert spread_numbers(0, 10) == []
