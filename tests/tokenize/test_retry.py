"""Rejected items are tried again, and nothing is lost on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.tokenizing import content, picture, run_here, settings, turns, write_items
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import Manifest
from unitoken.storage.folder import Folder
from unitoken.tokenize.checks.verify import verify
from unitoken.tokenize.merge import merge
from unitoken.tokenize.rejects import group_rejects, show_rejects
from unitoken.tokenize.retry import begin_retry


def go_on(vqgan: Path, folder: Path) -> Manifest:
    """Do what the command does after `begin_retry`."""
    run_here(settings(vqgan), folder / "items.json", folder / "out")
    manifest = merge(str(folder / "out"))
    assert verify(str(folder / "out")) == []
    return manifest


def test_a_retry_takes_the_rejected_items_alone(vqgan: Path, folder: Path) -> None:
    for n in (0, 4):
        picture(folder / f"{n}.png", n)
    before = content(folder / "out" / "chunk-000000")
    assert begin_retry(str(folder / "out")) == 6
    assert (folder / "out" / "manifest.json").exists()  # until the merge the dataset stays as it was
    manifest = go_on(vqgan, folder)
    assert (manifest.items, manifest.samples, manifest.rejected) == (10, 6, 4)
    assert content(folder / "out" / "chunk-000000") == before
    assert {kind: count for kind, count, _ in group_rejects(str(folder / "out"))} == {
        "no such image": 3,
        "no conversations": 1,
    }
    # A second round tries the remaining rejects.
    picture(folder / "2.png", 2)
    assert begin_retry(str(folder / "out"), ["no such image"]) == 3
    assert go_on(vqgan, folder).rejected == 3


def test_an_unknown_kind_is_refused_with_the_known_kinds(folder: Path) -> None:
    before = content(folder / "out")
    with pytest.raises(
        ConfigError,
        match="no rejects of the kind 'no such picture'; there are: no such image, no conversations",
    ):
        begin_retry(str(folder / "out"), ["no such picture"])
    assert content(folder / "out") == before


def test_without_rejects_nothing_is_done(
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

    assert begin_retry(str(out)) == 6  # killed after it: the dataset is whole, and `verify` reports the retry
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
