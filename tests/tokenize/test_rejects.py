"""Rejects are shown by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unitoken.tokenize.rejects import group_rejects, show_rejects


def test_rejects_are_grouped_by_kind_the_most_frequent_first(folder: Path) -> None:
    assert group_rejects(str(folder / "out")) == [
        ("no such image", 5, "items.json item 0 (0) 0.png"),
        (
            "no conversations",
            1,
            "items.json item 9 (9) expected a list of turns under 'conversations', found []",
        ),
    ]


def test_rejects_are_shown_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_rejects(str(folder / "out"))
    assert capsys.readouterr().out == (
        f"{folder / 'out'}: 6 of 10 items were rejected\n"
        "       5  no such image     items.json item 0 (0) 0.png\n"
        "       1  no conversations  items.json item 9 (9) "
        "expected a list of turns under 'conversations', found []\n"
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
