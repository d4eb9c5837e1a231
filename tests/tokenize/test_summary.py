"""What a command prints about its dataset, and when it ends with status 1."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.tokenizing import run_here, settings, turns, write_items
from unitoken.tokenize.merge import merge
from unitoken.tokenize.summary import problems, summary


@pytest.fixture(scope="module")
def merged(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chunks of one item, of which the third is a reject."""
    folder = tmp_path_factory.mktemp("summary")
    items = [{"conversations": turns("a", f"number {n}")} if n != 2 else {} for n in range(12)]
    run_here(settings(vqgan, chunk_size=1), write_items(folder, items), folder / "out")
    merge(str(folder / "out"))
    return folder / "out"


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))


def test_the_summary_has_counts_reasons_and_the_next_command(out: Path) -> None:
    text = summary(str(out), merge(str(out)))
    assert "12 items -> 11 samples, 1 rejected; " in text
    assert "1  no conversations" in text
    assert f"unitoken rejects {out}" in text


@pytest.mark.parametrize(
    ("rejected", "items", "allowed", "too_many"),
    [
        (9, 10, 0.01, False),
        (10, 1000, 0.01, False),
        (11, 1000, 0.01, True),
        (10, 11, 1.0, False),
        (10, 20, 0.0, True),
    ],
)
def test_ten_bad_items_are_forgiven_and_then_a_share(
    out: Path, rejected: int, items: int, allowed: float, too_many: bool
) -> None:
    manifest = merge(str(out)).model_copy(
        update={"rejected": rejected, "items": items, "samples": items - rejected}
    )
    found = problems(str(out), manifest, allowed)
    assert len(found) == too_many
    assert all(line.startswith(f"{rejected} of {items} items were rejected") for line in found)


def test_an_input_that_is_cut_is_a_problem_of_the_dataset(vqgan: Path, tmp_path: Path) -> None:
    source = write_items(tmp_path, [{"conversations": turns("a", "b")}] * 3)
    source.write_bytes(source.read_bytes()[:-10])
    run_here(settings(vqgan), source, tmp_path / "out")
    manifest = merge(str(tmp_path / "out"))
    assert (manifest.items, manifest.samples, manifest.rejected) == (3, 2, 1)
    assert problems(str(tmp_path / "out"), manifest, 0.01) == [
        "1 input file ends in the middle of an item; see 'input cut' in rejects.jsonl"
    ]
