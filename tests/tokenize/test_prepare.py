"""A run is claimed once, cut once, and refused where it differs from the run that began the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.tokenizing import run_here, settings, turns, write_items
from unitoken.common.errors import ConfigError
from unitoken.storage.open import open_store
from unitoken.tokenize import prepare as prepare_module
from unitoken.tokenize.job import Job, load_job, load_work
from unitoken.tokenize.prepare import prepare

ITEM = {"conversations": turns("a", "b")}


@pytest.fixture
def begin(vqgan: Path, tmp_path: Path) -> Any:
    def run(*sources: Path, out: str = "out", **changes: Any) -> Job:
        return prepare(settings(vqgan, **changes), [str(source) for source in sources], str(tmp_path / out))

    return run


def test_a_second_start_does_not_scan_the_input_again(
    begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Millions of items take minutes, and every rank of a cluster starts by this."""
    source = write_items(tmp_path, [ITEM] * 10)
    first = begin(source)
    monkeypatch.setattr(prepare_module, "cut", lambda *args: pytest.fail("the input was scanned again"))
    assert begin(source) == first
    assert load_work(open_store(str(tmp_path / "out"))) == first.work


def test_an_input_that_moved_is_the_same_input(begin: Any, tmp_path: Path) -> None:
    source = write_items(tmp_path, [ITEM] * 3)
    begin(source)
    moved = tmp_path / "elsewhere" / "other.json"
    moved.parent.mkdir()
    source.rename(moved)
    assert begin(moved).input.files[0].name == str(moved)


def test_an_input_that_changed_is_refused(begin: Any, tmp_path: Path) -> None:
    begin(write_items(tmp_path, [ITEM]))
    with pytest.raises(ConfigError, match=r"source is '[0-9a-f]{16}' there and "):
        begin(write_items(tmp_path, [{"conversations": turns("a", "c")}]))


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"chunk_size": 5}, "chunk_size is 4 there and 5 now"),
        ({"crop": "aspect"}, "crop is 'square' there and 'aspect' now"),
        ({"crop_position": "random"}, "crop_position is 'center' there and 'random' now"),
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"max_tokens": 100}, "max_tokens is None there and 100 now"),
        ({"adapter": "sharegpt"}, "adapter is 'standard' there and 'sharegpt' now"),
        ({"compat": "unitoken"}, "compat is None there and 'unitoken' now"),
        ({"target_size": 24}, "target_size is 16 there and 24 now"),
    ],
)
def test_other_settings_are_refused_with_both_sides(
    begin: Any, tmp_path: Path, change: dict[str, Any], needed: str
) -> None:
    source = write_items(tmp_path, [ITEM] * 8)
    begin(source)
    with pytest.raises(ConfigError, match="was begun with other settings: ") as error:
        begin(source, **change)
    assert needed in str(error.value)


def test_another_precision_is_refused(begin: Any, vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, [ITEM])
    begin(source)
    with pytest.raises(ConfigError, match=r"vision\.precision is 'tf32' there and 'bf16' now"):
        begin(source, vision={"weights": str(vqgan), "precision": "bf16"})


def test_settings_that_change_no_byte_may_change(begin: Any, vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, [ITEM])
    begin(source)
    begin(
        source,
        max_reject_fraction=0.5,
        threads=3,
        timeout_seconds=5,
        vision={"weights": str(vqgan), "batch_size": 1},
    )
    assert load_job(open_store(str(tmp_path / "out"))).max_reject_fraction == 0.01


def test_a_run_killed_between_its_first_files_goes_on(begin: Any, tmp_path: Path) -> None:
    source = write_items(tmp_path, [ITEM] * 3)
    first = begin(source)
    for name in ("input.json", "vocabulary.json"):
        (tmp_path / "out" / name).unlink()
    assert begin(source) == first
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "job.json",
        "input.json",
        "settings.yaml",
        "vocabulary.json",
    }


def test_a_folder_with_other_files_is_refused(begin: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("dear")
    source = write_items(tmp_path, [ITEM])
    with pytest.raises(ConfigError, match=r"found 'thesis.doc' in it and no job.json"):
        begin(source)
    with pytest.raises(ConfigError, match="expected a folder to write to, found a file"):
        begin(source, out="items.json")


@pytest.mark.parametrize("size", [10, 12, 4 * 2 * 100])
def test_target_sizes_that_do_not_fit_the_latents_are_refused(begin: Any, tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=f"target_size: expected a multiple of 8 pixels .* found {size}"):
        begin(write_items(tmp_path, [{}]), target_size=size)
    assert not (tmp_path / "out").exists()


def test_a_job_file_of_another_kind_is_named(begin: Any, tmp_path: Path) -> None:
    source = write_items(tmp_path, [ITEM])
    begin(source)
    (tmp_path / "out" / "job.json").write_text(json.dumps({"items": 3}))
    with pytest.raises(ConfigError, match=r"out/job.json: not readable: "):
        begin(source)


def test_a_source_whose_name_is_not_utf_8_is_read(tmp_path: Path, vqgan: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/it\xffems.json"))
    source.write_text(json.dumps([{"conversations": turns("a", "b")}, {"conversations": []}]))
    job = run_here(settings(vqgan), source, tmp_path / "out")
    assert load_work(job.output.store).input.files[0].name == str(source)
    (line,) = (tmp_path / "out" / "chunk-000000" / "rejects.jsonl").read_bytes().splitlines()
    assert json.loads(line)["file"] == source.name


def test_an_output_folder_whose_name_is_not_utf_8_is_refused(tmp_path: Path, vqgan: Path) -> None:
    source = write_items(tmp_path, [ITEM])
    with pytest.raises(ConfigError, match="must be UTF-8"):
        prepare(settings(vqgan), [str(source)], os.fsdecode(os.fsencode(tmp_path) + b"/o\xfeut"))
