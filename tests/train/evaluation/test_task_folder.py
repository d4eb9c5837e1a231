"""The units of a task as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.task_folder import TaskFolder


def test_units_survive_under_the_same_request_alone(tmp_path: Path) -> None:
    folder = TaskFolder(tmp_path / "a", {"seed": 0})
    assert not folder.is_begun()
    folder.begin()
    folder.add(0, [{"number": 1, "text": "é\n"}], {"0001.png": b"x"})
    again = TaskFolder(tmp_path / "a", {"seed": 0})
    again.begin()
    assert (again.has(0), again.has(1)) == (True, False)
    assert again.lines(1) == [{"number": 1, "text": "é\n"}]
    other = TaskFolder(tmp_path / "a", {"seed": 1})
    assert not other.is_begun()
    other.begin()
    assert other.is_begun()
    assert not other.has(0)
    assert not list((tmp_path / "a" / "pictures").iterdir())


def test_a_kill_while_units_are_removed_leaves_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TaskFolder(tmp_path / "a", {"seed": 0})
    first.begin()
    first.add(0, [{}], {})

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    other = TaskFolder(tmp_path / "a", {"seed": 1})
    with pytest.raises(KeyboardInterrupt):
        other.begin()
    monkeypatch.undo()
    assert not other.is_begun()
    other.begin()
    assert not other.has(0)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"it holds thesis.txt and no request.json of an evaluation"):
        TaskFolder(tmp_path, {}).begin()
