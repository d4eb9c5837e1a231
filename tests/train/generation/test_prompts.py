"""Prompts from files and from settings."""

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
from unitoken.train.config import StageConfig
from unitoken.train.generation.check_samples import (
    check_samples,
    guidance_or_default,
    image_sizes,
    untrained_guidance,
    unusual_size,
)
from unitoken.train.generation.prompts import image_files, parse_prompt, read_images, read_prompts

ITEM = {
    "conversations": [{"from": "human", "value": "What? <|image|>"}, {"from": "gpt", "value": "A cat."}],
    "image": ["a.png"],
}
DRAW = {"prompt": "Draw a cat."}


def segments(conversations: list[Conversation]) -> list[tuple[str, ...]]:
    return [conversation.turns[-1].segments for conversation in conversations]


def test_the_last_answer_and_its_images_are_removed() -> None:
    turns = [
        {"from": "human", "value": "<|image|> Now draw it."},
        {"from": "gpt", "value": "Here: <|image|>"},
    ]
    conversation = parse_prompt({"conversations": turns, "image": ["a.png", "b.png"]}, "x")
    assert conversation.images == ("a.png",)
    assert len(conversation.turns) == 1
    story = [*turns, {"from": "human", "value": "And again."}, {"from": "gpt", "value": None}]
    assert parse_prompt({"conversations": story, "image": ["a.png", "b.png"]}, "x").images == (
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
def test_items_are_read_from_json_and_json_lines(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    prompts = read_prompts(tmp_path / name)
    assert segments(prompts) == [("What? ", ""), ("Draw a cat.",)]
    assert prompts[0].images == (str(tmp_path / "a.png"),)


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "p.TXT").write_bytes("\ufeffDraw a cat.\r\n\nWhat is\u2028love?\n".encode())
    assert segments(read_prompts(tmp_path / "p.TXT")) == [("Draw a cat.",), ("What is\u2028love?",)]


def test_json_lines_may_contain_unicode_line_separators(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "one\u2028two\x85"}, ensure_ascii=False), "utf-8")
    assert segments(read_prompts(tmp_path / "p.jsonl")) == [("one\u2028two\x85",)]


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
def test_a_bad_file_of_prompts_is_a_one_line_error(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", {"base64": "{}"}])
def test_images_may_be_inline(tmp_path: Path, form: Any) -> None:
    text = base64.b64encode(png(1)).decode()
    image = form.format(text) if isinstance(form, str) else {"base64": text}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "What?", "image": image}))
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert image_files(prompts) == []
    assert read_images(prompts[0]) == [png(1)]


def test_a_broken_inline_image_is_a_short_error() -> None:
    prompts = [parse_prompt({"conversations": ITEM["conversations"], "image": [{"base64": "?" * 9999}]}, "x")]
    with pytest.raises(ConfigError, match="bad base64: data:image") as error:
        image_files(prompts)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("url", ["s3://bucket/a.png", "https://host/a.png", "gs://bucket/a.png"])
def test_urls_are_refused(tmp_path: Path, url: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "What?", "image": url}]))
    with pytest.raises(
        ConfigError, match=f"^{url}: pictures of prompts are not fetched from anywhere: name a file"
    ):
        image_files(read_prompts(tmp_path / "p.json"))


def test_guidance_is_off_after_training_without_null_prompts() -> None:
    assert [guidance_or_default(None, 4.0, trained) for trained in (False, True)] == [1.0, 4.0]
    assert [guidance_or_default(2.5, 4.0, trained) for trained in (False, True)] == [2.5, 2.5]
    assert (
        untrained_guidance(2.5, trained=False)
        == "guidance 2.5 is away from a prompt that training never showed: data.null_prompt_fraction is 0"
    )
    assert not untrained_guidance(1.0, trained=False)
    assert not untrained_guidance(2.5, trained=True)


def test_images_have_the_sizes_of_the_data_by_default() -> None:
    pictures = PictureCrops(crops=[(16, 16), (24, 8)])
    assert image_sizes(None, pictures) == [(16, 16), (8, 24)]
    assert image_sizes((8, 16), pictures) == [(8, 16)]
    assert image_sizes(None, None) == image_sizes(None, PictureCrops(crops=[])) == [(512, 512)]
    assert unusual_size((8, 24), pictures) is None
    assert unusual_size((24, 8), None) is None
    assert unusual_size((24, 8), pictures) == "no picture of the data has 8x24 pixels, they have 16x16, 24x8"


def check(config: StageConfig, pictures: PictureCrops) -> list[str]:
    guidance_trained = config.data.null_prompt_fraction > 0
    return check_samples(config.samples, config.codec, pictures, guidance_trained)


def test_unusual_samples_are_warned_of_and_broken_images_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1)[:20])
    pictures = PictureCrops(crops=[(16, 16)])
    config = drawing_stage(tmp_path, "samples={draw: [x], size: [24, 16], guidance: 2}")
    size, guidance = check(config, pictures)
    assert size == "samples: no picture of the data has 16x24 pixels, they have 16x16"
    assert guidance.startswith("samples: guidance 2 is away from a prompt that training never showed")
    assert not check(drawing_stage(tmp_path, "samples={draw: [x]}"), pictures)
    config = drawing_stage(tmp_path, f"samples={{answer: {{{tmp_path}/a.png: What}}}}")
    with pytest.raises(ConfigError, match=r"samples\.answer: .*a\.png: (not an image|cannot be decoded)"):
        check(config, pictures)
