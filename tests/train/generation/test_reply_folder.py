"""The folder of replies: finished replies are kept, and other files are left alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from unitoken.common.errors import ConfigError
from unitoken.train.generation.reply_folder import ReplyFolder, check_reply_folder


def line(number: int, *pictures: str) -> dict[str, Any]:
    return {"number": number, "prompt": "x", "pictures": list(pictures)}


def write(folder: Path, request: str, *numbers: int) -> ReplyFolder:
    check_reply_folder(folder, [])
    replies = ReplyFolder(folder, {"prompt": request})
    replies.begin()
    for number in numbers:
        name = f"{number:04d}"
        replies.add([(line(number, f"{name}.png"), {f"{name}.png": b"picture", f"{name}.txt": b"text"})])
    return replies


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_request_continues_after_a_kill(tmp_path: Path) -> None:
    write(tmp_path, "a", 3, 1, 2)
    with open(tmp_path / "results.jsonl", "ab") as file:
        file.write(b'{"number": 7, "pro')
    (tmp_path / "0002.png").unlink()
    assert ReplyFolder(tmp_path, {"prompt": "a"}).begin() == {1, 3}
    assert [json.loads(one)["number"] for one in (tmp_path / "results.jsonl").read_text().splitlines()] == [
        3,
        1,
    ]


def test_another_request_removes_only_files_of_replies(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 1, 2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "0009.png").write_text("mine")
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps(line(5, "../mine.png", "notes.txt")) + "\n")
    check_reply_folder(tmp_path, [])
    assert ReplyFolder(tmp_path, {"prompt": "b"}).begin() == set()
    assert names(tmp_path) == ["0009.png", "notes.txt", "request.json", "results.jsonl"]
    assert (tmp_path / "results.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "found", [{"thesis.txt": "mine"}, {"results.jsonl": '{"loss": 1}\n'}, {"results.jsonl": "12\n"}]
)
def test_a_folder_with_other_files_is_refused(tmp_path: Path, found: dict[str, str]) -> None:
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        ConfigError,
        match=rf"it holds {next(iter(found))} and no results.jsonl of replies: name an empty folder",
    ):
        check_reply_folder(tmp_path, [])
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == found


def test_input_images_inside_the_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "out", "a", 0)
    (tmp_path / "link.png").symlink_to("out/0000.png")
    for path in (tmp_path / "out" / "0000.png", tmp_path / "link.png"):
        with pytest.raises(ConfigError, match="it is inside --out"):
            check_reply_folder(tmp_path / "out", [path])
    check_reply_folder(tmp_path / "out", [tmp_path / "a.png"])
