"""Prompts as files and settings say them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from support.drawn import drawing_stage
from support.small_datasets import png
from unitoken.codec.conversations import Conversation
from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.metadata import PictureCrops
from unitoken.train.generation.check_samples import check_samples, drawn_sizes, guidance_of, unguided, unusual
from unitoken.train.generation.prompts import conversation_of, files_of, originals_of, read_prompts

ITEM = {
    "conversations": [{"from": "human", "value": "What? <|image|>"}, {"from": "gpt", "value": "A cat."}],
    "image": ["a.png"],
}
DRAW = {"prompt": "Draw a cat."}


def said(conversations: list[Conversation]) -> list[tuple[str, ...]]:
    return [conversation.turns[-1].segments for conversation in conversations]


def test_the_answer_of_an_item_and_its_pictures_are_kept_from_the_model() -> None:
    turns = [
        {"from": "human", "value": "<|image|> Now draw it."},
        {"from": "gpt", "value": "Here: <|image|>"},
    ]
    conversation = conversation_of({"conversations": turns, "image": ["a.png", "b.png"]}, "x")
    assert conversation.images == ("a.png",)
    assert len(conversation.turns) == 1
    story = [*turns, {"from": "human", "value": "And again."}, {"from": "gpt", "value": None}]
    assert conversation_of({"conversations": story, "image": ["a.png", "b.png"]}, "x").images == (
        "a.png",
        "b.png",
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", json.dumps([ITEM, DRAW])),
        ("p.JSON", json.dumps([ITEM, DRAW], indent=1)),
        ("p.jsonl", f"{json.dumps(ITEM)}\n\n{json.dumps(DRAW)}\n"),
        ("p.JSONL", f"\ufeff{json.dumps(ITEM)}\r\n{json.dumps(DRAW)}\r\n"),
    ],
)
def test_the_input_format_is_read_as_items_whatever_its_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    found = read_prompts(tmp_path / name)
    assert said(found) == [("What? ", ""), ("Draw a cat.",)]
    assert found[0].images == (str(tmp_path / "a.png"),)


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.TXT").write_bytes("\ufeffDraw a cat.\r\n\nWhat is\u2028love?\n".encode())
    assert said(read_prompts(tmp_path / "p.TXT")) == [("Draw a cat.",), ("What is\u2028love?",)]


def test_json_lines_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "one\u2028two\x85"}, ensure_ascii=False), "utf-8")
    assert said(read_prompts(tmp_path / "p.jsonl")) == [("one\u2028two\x85",)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "Draw a cat.", r"p\.csv: prompts come from a \.txt, a \.json or a \.jsonl, found '\.csv'"),
        ("p.json", json.dumps(ITEM), r"p\.json: expected a list of items, found \{'conversations'"),
        ("p.json", "Draw a cat.", r"p\.json: not JSON"),
        ("p.jsonl", json.dumps(DRAW) + "\n{", r"p\.jsonl:2: not JSON"),
        ("p.json", "[]", "it holds no prompt"),
    ],
)
def test_what_is_no_file_of_prompts_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", {"base64": "{}"}])
def test_pictures_may_be_inside_of_the_file(tmp_path: Path, form: Any) -> None:
    text = base64.b64encode(png(1)).decode()
    image = form.format(text) if isinstance(form, str) else {"base64": text}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "What?", "image": image}))
    found = read_prompts(tmp_path / "p.jsonl")
    assert files_of(found) == []
    assert originals_of(found[0]) == [png(1)]


def test_a_broken_picture_inside_of_the_file_is_one_short_line() -> None:
    found = [
        conversation_of({"conversations": ITEM["conversations"], "image": [{"base64": "?" * 9999}]}, "x")
    ]
    with pytest.raises(ConfigError, match="bad base64: data:image") as error:
        files_of(found)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("url", ["s3://bucket/a.png", "https://host/a.png", "gs://bucket/a.png"])
def test_urls_are_said_not_to_be_fetched(tmp_path: Path, url: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "What?", "image": url}]))
    with pytest.raises(
        ConfigError, match=f"^{url}: pictures of prompts are not fetched from anywhere: name a file"
    ):
        files_of(read_prompts(tmp_path / "p.json"))


def test_guidance_is_off_where_training_showed_no_null_prompt(tmp_path: Path) -> None:
    without, shown = drawing_stage(tmp_path), drawing_stage(tmp_path, "data.null_prompt_fraction=0.1")
    assert [guidance_of(None, config, 4.0) for config in (without, shown)] == [1.0, 4.0]
    assert [guidance_of(2.5, config, 4.0) for config in (without, shown)] == [2.5, 2.5]
    assert (
        unguided(2.5, without)
        == "guidance 2.5 is away from a prompt that training never showed: data.null_prompt_fraction is 0"
    )
    assert not unguided(1.0, without)
    assert not unguided(2.5, shown)


def test_drawings_have_the_sizes_of_the_data_where_nobody_says_another(tmp_path: Path) -> None:
    pictures = PictureCrops(crops=[(16, 16), (24, 8)])
    assert drawn_sizes(drawing_stage(tmp_path), pictures) == [(16, 16), (8, 24)]
    assert drawn_sizes(drawing_stage(tmp_path, "samples={size: [8, 16]}"), pictures) == [(8, 16)]
    assert (
        drawn_sizes(drawing_stage(tmp_path), None)
        == drawn_sizes(drawing_stage(tmp_path), PictureCrops(crops=[]))
        == [(512, 512)]
    )
    assert unusual((8, 24), pictures) is None
    assert unusual((24, 8), None) is None
    assert unusual((24, 8), pictures) == "no picture of the data has 8x24 pixels, they have 16x16, 24x8"


def test_samples_that_are_odd_are_warned_of_and_broken_pictures_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1)[:20])
    pictures = PictureCrops(crops=[(16, 16)])
    config = drawing_stage(tmp_path, "samples={draw: [x], size: [24, 16], guidance: 2}")
    size, guidance = check_samples(config, pictures)
    assert size == "samples: no picture of the data has 16x24 pixels, they have 16x16"
    assert guidance.startswith("samples: guidance 2 is away from a prompt that training never showed")
    assert not check_samples(drawing_stage(tmp_path, "samples={draw: [x]}"), pictures)
    config = drawing_stage(tmp_path, f"samples={{answer: {{{tmp_path}/a.png: What}}}}")
    with pytest.raises(ConfigError, match=r"samples\.answer: .*a\.png: (not an image|cannot be decoded)"):
        check_samples(config, pictures)
