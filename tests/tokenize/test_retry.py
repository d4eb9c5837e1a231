"""What was rejected is shown by kind, and tried again without losing anything on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.tokenizing import content, picture, run_here, settings, turns, write_items
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import Manifest
from unitoken.storage.folder import Folder
from unitoken.tokenize.checks.verify import verify
from unitoken.tokenize.merge import merge
from unitoken.tokenize.retry import begin_retry, grouped, show_rejects

ITEMS = 10


@pytest.fixture(scope="module")
def made(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten items in chunks of four: of every second one the image is missing, item 9 has no turns."""
    folder = tmp_path_factory.mktemp("rejects")
    items: list[dict[str, Any]] = [
        {"conversations": turns("<|image|>", f"n {n}"), "image": f"{n}.png"} for n in range(ITEMS)
    ]
    items[9] = {"conversations": []}
    for n in range(1, ITEMS, 2):
        picture(folder / f"{n}.png", n)
    run_here(settings(vqgan), write_items(folder, items), folder / "out")
    merge(str(folder / "out"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def go_on(vqgan: Path, folder: Path) -> Manifest:
    """What the command does after `begin_retry`."""
    run_here(settings(vqgan), folder / "items.json", folder / "out")
    manifest = merge(str(folder / "out"))
    assert verify(str(folder / "out")) == []
    return manifest


def test_rejects_are_grouped_by_kind_the_most_frequent_first(folder: Path) -> None:
    assert grouped(str(folder / "out")) == [
        ("no such image", 5, "items.json item 0 (0) 0.png"),
        (
            "no conversations",
            1,
            "items.json item 9 (9) expected a list of turns under 'conversations', found []",
        ),
    ]


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_rejects(str(folder / "out"))
    assert capsys.readouterr().out == (
        f"{folder / 'out'}: 6 of 10 items were rejected\n"
        "       5  no such image     items.json item 0 (0) 0.png\n"
        "       1  no conversations  items.json item 9 (9) expected a list of turns under 'conversations', found []\n"
    )


def test_a_long_table_is_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"chunk": 0, "file": "f", "position": 1, "id": "i", "stage": "adapter"}
    lines = [json.dumps(line | {"reason": f"kind {n % 40:02d}: {'x' * 200}"}) for n in range(90)]
    (folder / "out" / "rejects.jsonl").write_text("\n".join(lines))
    show_rejects(str(folder / "out"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 32
    assert printed[1] == f"       3  kind 00  f item 1 (i) {'x' * 84}..."
    assert printed[-1] == "      20  of 10 more kinds"


def test_a_retry_takes_the_rejected_items_alone(vqgan: Path, folder: Path) -> None:
    for n in (0, 4):
        picture(folder / f"{n}.png", n)
    before = content(folder / "out" / "chunk-000000")
    assert begin_retry(str(folder / "out")) == 6
    assert (folder / "out" / "manifest.json").exists()  # until the merge the dataset is what it was
    manifest = go_on(vqgan, folder)
    assert (manifest.items, manifest.samples, manifest.rejected) == (10, 6, 4)
    assert content(folder / "out" / "chunk-000000") == before
    assert {kind: count for kind, count, _ in grouped(str(folder / "out"))} == {
        "no such image": 3,
        "no conversations": 1,
    }
    # A second round tries what is left.
    picture(folder / "2.png", 2)
    assert begin_retry(str(folder / "out"), ["no such image"]) == 3
    assert go_on(vqgan, folder).rejected == 3


def test_an_unknown_kind_is_refused_with_those_there_are(folder: Path) -> None:
    before = content(folder / "out")
    with pytest.raises(
        ConfigError,
        match="no rejects of the kind 'no such picture'; there are: no such image, no conversations",
    ):
        begin_retry(str(folder / "out"), ["no such picture"])
    assert content(folder / "out") == before


def test_where_nothing_was_rejected_nothing_is_done(
    vqgan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(settings(vqgan), write_items(tmp_path, [{"conversations": turns("a", "b")}]), tmp_path / "out")
    merge(str(tmp_path / "out"))
    before = content(tmp_path / "out")
    assert begin_retry(str(tmp_path / "out")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: nothing was rejected\n"
    assert content(tmp_path / "out") == before
    show_rejects(str(tmp_path / "out"))


def test_an_unfinished_dataset_is_refused(folder: Path) -> None:
    (folder / "out" / "manifest.json").unlink()
    for function in (begin_retry, show_rejects):
        with pytest.raises(ConfigError, match=r"it has no manifest.json; finish it with"):
            function(str(folder / "out"))


@pytest.mark.parametrize("verb", ["upload", "delete"])
def test_killed_at_any_step_the_same_command_goes_on(
    vqgan: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    out = folder / "out"
    for n in (0, 2, 4):
        picture(folder / f"{n}.png", n)
    whole = Path(shutil.copytree(folder, folder.parent / "undisturbed"))
    begin_retry(str(whole / "out"))
    go_on(vqgan, whole)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    before = content(out)
    monkeypatch.setattr(Folder, "write", killed)  # no round yet
    with pytest.raises(KeyboardInterrupt):
        begin_retry(str(out))
    monkeypatch.undo()
    assert content(out) == before

    assert begin_retry(str(out)) == 6  # killed behind it: whole as it was, and said to be begun
    assert {name: content(out)[name] for name in before} == before
    (line,) = verify(str(out))
    assert line.endswith("a retry was begun and did not end, run it again")

    assert begin_retry(str(out), ["no such image"]) == 6
    run_here(settings(vqgan), folder / "items.json", out)
    monkeypatch.setattr(Folder, verb, killed)  # in the merge
    with pytest.raises(KeyboardInterrupt):
        merge(str(out))
    monkeypatch.undo()
    assert begin_retry(str(out)) == 6
    assert go_on(vqgan, folder).rejected == 3
    assert content(out) == content(whole / "out")
