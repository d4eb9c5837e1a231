"""What a name in the input stands for: files, globs, ranges, and folders of Hugging Face's `datasets`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.arrow_files import some_rows, write_arrow
from support.read_sources import source_of, values_of
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources import patterns, reader
from unitoken.tokenize.sources.reader import find_files


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def names(files: list[reader.InputFile]) -> list[str]:
    return [Path(file.name).name for file in files]


def test_files_are_sorted_within_a_glob_but_globs_are_not(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json", "x-09.tar", "x-10.tar", "x-11.tar"):
        write(tmp_path / name, "[]")
    found = find_files(
        [f"{tmp_path}/*.jsonl", f"{tmp_path}/x-{{09..10}}.tar", f"{tmp_path}/a.jsonl", f"{tmp_path}/c.json"]
    )
    assert names(found) == ["a.jsonl", "b.jsonl", "x-09.tar", "x-10.tar", "a.jsonl", "c.json"]
    assert [file.format for file in found] == ["jsonl", "jsonl", "webdataset", "webdataset", "jsonl", "json"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    assert names(find_files([write(tmp_path / "a[1].json", "[1]")])) == ["a[1].json"]


@pytest.mark.parametrize("name", ["*.tar", "x-{3..2}.json"])
def test_a_name_that_matches_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        find_files([f"{tmp_path}/{name}"])


def test_globs_over_a_store_stay_in_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def sizes(self, prefix: str) -> dict[str, int]:
            assert prefix == "x-"
            return dict.fromkeys(["x-2.tar", "x-1.tar", "x-1.tar.txt", "x-y/x-3.tar"], 1)

    monkeypatch.setattr(patterns, "open_store", lambda url: {"s3://bucket/data": Store()}[url])
    assert patterns.expand("s3://bucket/data/x-*.tar") == [
        "s3://bucket/data/x-1.tar",
        "s3://bucket/data/x-2.tar",
    ]


@pytest.mark.parametrize("last", ["9999999999", "9" * 5000])
def test_a_range_of_too_many_files_is_one_line(last: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands for more than 1000000 files"):
        find_files([f"{tmp_path}/{{0..{last}}}.tar"])


def test_a_folder_of_datasets_is_its_files_in_order(tmp_path: Path) -> None:
    rows = some_rows(20)
    files = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for number, name in enumerate(files):
        write_arrow(tmp_path / name, rows[10 * number : 10 * number + 10], 4)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    write_arrow(tmp_path / "cache-1.arrow", rows, 4)  # the cache of a map()
    assert values_of(source_of(tmp_path)) == rows


def test_a_folder_of_arrow_files_without_a_state_is_all_of_them(tmp_path: Path) -> None:
    for number in range(2):
        write_arrow(tmp_path / f"{number}.arrow", some_rows(4)[2 * number : 2 * number + 2], 4)
    assert values_of(source_of(tmp_path)) == some_rows(4)


def test_one_of_several_splits_has_to_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"holds several splits: choose from .*/train, .*/test"):
        find_files([str(tmp_path)])
