"""Prompts with their expected answers, from every kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.items import hash_items, read_task_items


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_answers_come_from_the_item_or_its_last_turn(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    items = [
        {"conversations": turns},
        {"conversations": turns[:1], "answer": "dog"},
        {"prompt": "What?", "answers": ["a", {"answer": "b", "answer_id": 1}]},
        {"prompt": "What?"},
        {"prompt": "of a benchmark", "conversations": turns[:1]},
    ]
    found = read_task_items(write(tmp_path / "a.json", items))
    assert [item.answers for item in found] == [("A cat.",), ("dog",), ("a", "b"), (), ()]
    assert len({item.prompt.turns for item in found}) == 1, "the model never sees an answer"
    assert len(read_task_items(tmp_path / "a.json", limit=2)) == 2


def test_a_folder_of_texts_and_an_object_by_ids_are_read(tmp_path: Path) -> None:
    (tmp_path / "dpg").mkdir()
    for name in ("b", "a"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"Draw {name}.\n")
    found = read_task_items(tmp_path / "dpg")
    assert [(item.id, item.prompt.turns[0].segments) for item in found] == [
        ("a", ("Draw a.",)),
        ("b", ("Draw b.",)),
    ]
    by_id = {"x1": {"category": "logo", "prompt": "A logo."}}
    (item,) = read_task_items(write(tmp_path / "meta.json", by_id))
    assert (item.id, item.fields["category"]) == ("x1", "logo")


def test_the_hash_covers_prompts_pictures_and_answers(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    question = {"prompt": "What? <|image|>", "image": "a.png", "answer": "x"}

    def hash_of(**changes: str) -> str:
        return hash_items(read_task_items(write(tmp_path / "a.json", [question | changes])))

    first = hash_of()
    assert first == hash_of(unused="y")
    assert len({first, hash_of(answer="y"), hash_of(prompt="Which? <|image|>")}) == 3
    Image.new("RGB", (8, 8), (9, 9, 8)).save(tmp_path / "a.png")
    assert hash_of() != first


def test_answers_that_are_no_texts_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"item 0: answers: expected texts, found 3"):
        read_task_items(write(tmp_path / "a.json", [{"prompt": "x", "answer": 3}]))
    with pytest.raises(ConfigError, match=r"no \.txt files"):
        read_task_items(tmp_path)
