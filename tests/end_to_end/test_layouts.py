"""A dataset in the layout of a chat template goes through every command, and is not mixed with another."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.chat_tokenizers import CHATML, MISTRAL, chat_tokenizer
from support.drawn import CODEC
from support.stages import write_stage
from support.tokenizing import picture, run_here
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import load_manifest, load_vocabulary
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.merge import merge
from unitoken.train.check import check_stage
from unitoken.train.config import StageConfig

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    chat_tokenizer(CHATML).save_pretrained(folder / "chatml")
    chat_tokenizer(MISTRAL).save_pretrained(folder / "mistral")
    picture(folder / "0.png", 0)
    system = {"from": "system", "value": "Be kind."}
    question = [{"from": "human", "value": "<|image|>What is it?"}, {"from": "gpt", "value": "a cat"}]
    drawing = [{"from": "human", "value": "Draw a cat."}, {"from": "gpt", "value": "<|image|>"}]
    items = [{"conversations": turns, "image": ["0.png"]} for turns in (question, drawing)] * 6
    items += [{"conversations": [system, *question], "image": ["0.png"]}] * 4
    (folder / "items.json").write_text(json.dumps(items))
    return folder


def tokenized(folder: Path, tokenizer: str, layout: str, name: str, **changes: Any) -> Path:
    fields = {"tokenizer": str(folder / tokenizer), "layout": layout, "vision": CODEC["vision"], **changes}
    config = TokenizeConfig.model_validate({"target_size": 16, "max_reject_fraction": 1.0, **fields})
    run_here(config, folder / "items.json", folder / name)
    merge(str(folder / name))
    return folder / name


def test_a_chat_template_goes_through_every_command(folder: Path) -> None:
    data = tokenized(folder, "chatml", "chat_template", "data")
    manifest, vocabulary = load_manifest(data), load_vocabulary(data)
    assert (manifest.samples, manifest.layout) == (16, "chat_template")
    codec: dict[str, Any] = {**CODEC, "tokenizer": str(folder / "chatml")}
    stage = write_stage(
        folder,
        codec=codec,
        model={"decoder": {**DECODER, "vocab_size": vocabulary.size}},
        trainable=["model", "lm_head"],
        max_duration="2ba",
    )
    unitoken = [str(Path(sys.executable).with_name("unitoken"))]
    for arguments in (
        ["verify", str(data)],
        ["preview", str(data), "--n", "16"],
        ["train", str(stage), "data.continuous=none", "data.packed_length=256"],
        ["generate", str(folder / "run"), "--prompt", "Draw a cat.", "--out", str(folder / "drawn")],
    ):
        done = subprocess.run([*unitoken, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if arguments[0] == "preview":
            assert "<|im_start|>" in done.stdout
            assert "Be kind." in done.stdout
    assert (folder / "drawn" / "0000.png").is_file()


def test_other_layouts_are_not_mixed(folder: Path) -> None:
    data = tokenized(folder, "chatml", "chat_template", "first")
    other = tokenized(folder, "chatml", "chameleon", "second", system="prepend")
    streams = {"a": {"local": str(data)}, "b": {"local": str(other)}}
    stage = write_stage(
        folder, name="mixed", data={"streams": streams, "packed_length": 256, "global_batch": 1}
    )
    with pytest.raises(ConfigError, match=r"different layouts: .* has 'chat_template', .* has 'chameleon'"):
        check_stage(load_config(StageConfig, stage), 1)


def test_a_system_turn_is_a_counted_reject_where_there_is_none(folder: Path) -> None:
    out = tokenized(folder, "mistral", "chat_template", "rejects")
    reasons = [json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert len(reasons) == 4
    assert all(reason.startswith("system turn: the layout 'chat_template' has none") for reason in reasons)
    prepended = tokenized(folder, "mistral", "chat_template", "prepended", system="prepend")
    assert load_manifest(prepended).samples == 16


def test_a_run_is_not_continued_in_another_layout(folder: Path) -> None:
    tokenized(folder, "chatml", "chat_template", "begun")
    with pytest.raises(ConfigError, match="layout is 'chat_template' there and 'chameleon' now"):
        tokenized(folder, "chatml", "chameleon", "begun", system="prepend")
