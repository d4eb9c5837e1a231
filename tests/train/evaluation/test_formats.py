"""The layouts that other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unitoken.codec.conversations import Conversation
from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.config import TaskConfig
from unitoken.train.evaluation.formats import COMMAND, check_format, write_format
from unitoken.train.evaluation.items import TaskItem


def item(**fields: Any) -> TaskItem:
    return TaskItem("item 0", fields, Conversation("x", (), ()), ("yes",))


def task(write: str, **settings: Any) -> TaskConfig:
    draw = write != "lmms_eval"
    return TaskConfig.model_validate({"prompts": "a.json", "write": write, "draw": draw, **settings})


def drawings(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write drawings of 8 x 8 pixels, each of one grey, into a task's folder; return their lines."""
    (folder / "pictures").mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number, number, number)).save(folder / "pictures" / f"{number}.png")
    return [{"number": number, "picture": f"{number}.png"} for number in range(count)]


def greys(path: Path) -> list[list[int]]:
    values: list[list[int]] = np.asarray(Image.open(path))[::8, ::8, 0].tolist()
    return values


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_geneval_gets_metadata_and_samples(tmp_path: Path) -> None:
    items = [item(tag="color", prompt="a red cat", include=[{"class": "cat"}]), item(tag="x", prompt="é")]
    config = task("geneval", replies=2)
    for _ in range(2):  # a second time it replaces the first
        command = write_format("g", config, items, drawings(tmp_path, 4) if _ == 0 else lines_of(4), tmp_path)
    assert files_in(tmp_path / "geneval") == [
        f"{number:05d}/{name}"
        for number in range(2)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert json.loads((tmp_path / "geneval/00001/metadata.jsonl").read_text()) == items[1].fields
    assert greys(tmp_path / "geneval/00001/samples/0000.png") == [[2]]
    assert command.startswith(f"python evaluation/evaluate_images.py {tmp_path}/geneval --outfile ")
    assert (tmp_path / COMMAND).read_text() == f"{command}\n"


def lines_of(count: int) -> list[dict[str, Any]]:
    return [{"number": number, "picture": f"{number}.png"} for number in range(count)]


@pytest.mark.parametrize(
    ("replies", "grid"), [(1, [[0]]), (2, [[0, 1]]), (3, [[0, 1], [2, 0]]), (4, [[0, 1], [2, 3]])]
)
def test_dpg_bench_gets_a_grid_by_the_id(replies: int, grid: list[list[int]], tmp_path: Path) -> None:
    config = task("dpg_bench", replies=replies)
    command = write_format("d", config, [item(id="whoops37")], drawings(tmp_path, replies), tmp_path)
    assert greys(tmp_path / "dpg_bench" / "whoops37.png") == grid
    assert files_in(tmp_path / "dpg_bench") == ["whoops37.png"], "its program reads every file"
    assert f"--resolution 8 --pic-num {replies} " in command


def test_mjhq_gets_pictures_by_category(tmp_path: Path) -> None:
    items = [item(id="a1", category="logo"), item(id="b2", category="people")]
    command = write_format("m", task("mjhq_30k"), items, drawings(tmp_path, 2), tmp_path)
    assert files_in(tmp_path / "mjhq_30k") == ["logo/a1.png", "people/b2.png"]
    assert f"{tmp_path}/mjhq_30k MJHQ30K_IMGS" in command


def test_lmms_eval_reads_answers_by_document(tmp_path: Path) -> None:
    """Its model `from_log` takes the first text of the first list under `resps` of a `doc_id`."""
    lines = [{"number": 0, "text": "yes"}, {"number": 1, "text": "no"}]
    command = write_format("pope", task("lmms_eval"), [item(), item(doc_id=7)], lines, tmp_path)
    log = json.loads((tmp_path / "lmms_eval" / "pope.json").read_text())
    assert log["model_configs"]["task"] == "pope"
    assert log["args"]["limit"] is None
    assert {entry["doc_id"]: entry["resps"][0][0] for entry in log["logs"]} == {0: "yes", 7: "no"}
    assert f"--model from_log --model_args logs={tmp_path}/lmms_eval --tasks pope" in command


@pytest.mark.parametrize(
    ("write", "fields", "message"),
    [
        ("geneval", {"prompt": "x"}, "geneval needs the lines of evaluation_metadata.jsonl"),
        ("dpg_bench", {}, "dpg_bench names files by `id`, which is null"),
        ("dpg_bench", {"id": "../x"}, r"names files by `id`, which is \"../x\""),
        ("mjhq_30k", {"id": "x", "category": "/etc"}, r"names files by `category`, which is \"/etc\""),
        ("mjhq_30k", {"id": "..", "category": "art"}, "names files by `id`"),
    ],
)
def test_names_of_files_are_checked(write: str, fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^item 0: .*{message}"):
        check_format(task(write), [item(**fields)])
