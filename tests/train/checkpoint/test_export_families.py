"""Exported Llamas, Qwens and Mistrals are plain folders of transformers: equal logits and no warning."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.chat_tokenizers import CHATML, chat_tokenizer
from support.drawn import CODEC
from support.small_datasets import make_record, write_dataset
from support.stages import VISION, stage
from unitoken.codec.config import CodecConfig
from unitoken.codec.tokenizer_vocabulary import tokenizer_vocabulary
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.export import export_model
from unitoken.train.checkpoint.metadata import read_metadata
from unitoken.train.config import StageConfig
from unitoken.train.generation.engine import load_model
from unitoken.train.model.unitoken import UniToken
from unitoken.train.stage import run_stage

ROWS = 640  # of the embedding: more than the vocabulary has tokens
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 12}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rope_scaling": SCALING, "rope_theta": 5e5}),
    "llama_yarn": ("llama", {"rope_scaling": YARN, "max_position_embeddings": 128}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
CLASSES = {"llama": "Llama", "mistral": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
IDS = torch.randint(0, 400, (2, 80), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and 24 samples in the layout of its chat template."""
    folder = tmp_path_factory.mktemp("families")
    chat_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    vocabulary = vocabulary_of(folder)
    records = [make_record(f"q{n}", vocabulary, 8 + n % 5, question_images=n % 3) for n in range(16)]
    records += [make_record(f"a{n}", vocabulary, 6, answer_images=1) for n in range(8)]
    write_dataset(folder / "data", records, vocabulary)
    return folder


def vocabulary_of(folder: Path) -> Vocabulary:
    from transformers import AutoTokenizer

    from unitoken.codec.image_tokenizer.files import find_image_tokenizer

    codes = find_image_tokenizer(codec(folder).vision).codebook_size
    return tokenizer_vocabulary(AutoTokenizer.from_pretrained(folder / "tokenizer"), codes, "chat_template")


def codec(folder: Path) -> CodecConfig:
    return CodecConfig.model_validate({**CODEC, "tokenizer": str(folder / "tokenizer")})


def save_theirs(folder: Path, name: str) -> None:
    """Save a model of transformers with random weights, of which none is 0 or 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
    for parameter_name, parameter in model.named_parameters():
        mean, deviation = (0.8, 0.3) if "norm" in parameter_name else (0.0, 0.2)
        torch.nn.init.normal_(parameter, mean, deviation)
    model.save_pretrained(folder)


def two_stages(folder: Path, name: str) -> StageConfig:
    """Train the tower on a model of transformers, and then all of it."""
    save_theirs(folder / name, name)
    tied = bool(FAMILIES[name][1].get("tie_word_embeddings"))
    common: dict[str, Any] = {
        "model": {"decoder": str(folder / name), "vision": VISION},
        "codec": codec(folder).model_dump(),
        "max_duration": "2ba",
    }
    overrides = ["data.packed_length=128", "save.interval=10ba"]
    first = stage(
        folder,
        *overrides,
        f"save.folder={folder}/{name}-1",
        **{**common, "name": "one", "trainable": ["vit", "adapter"]},
    )
    run_stage(first, check_stage(first, 1))
    parts = ["vit", "adapter", "model", *([] if tied else ["lm_head"])]
    second = stage(
        folder,
        *overrides,
        f"save.folder={folder}/{name}-2",
        f"init_from={folder}/{name}-1",
        f"save.export={folder}/{name}-export",
        **{**common, "name": "two", "trainable": parts},
    )
    run_stage(second, check_stage(second, 1))
    return second


class Exported:
    """An exported model, and the stage that made it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.stage = name, two_stages(folder, name)
        self.folder = folder / f"{name}-fp32"
        export_model(str(folder / f"{name}-2"), self.folder, "fp32")
        self.model = load_model(self.stage.model, folder / f"{name}-2")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            made[name] = Exported(folder, name)
        return made[name]

    return make


@pytest.fixture
def no_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if transformers logs a warning."""
    from transformers.utils import logging as theirs

    theirs.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield
    theirs.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@torch.no_grad()
def logits(model: UniToken) -> Tensor:
    positions = torch.arange(IDS.shape[1]).expand(2, -1)
    return torch.nn.functional.linear(
        model.model(model.model.embed_tokens(IDS), positions, None), model.output_weight
    )


@pytest.mark.filterwarnings("ignore:::composer", "ignore:::torch", "ignore:::streaming")
@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_and_an_export_give_equal_logits(
    name: str, exported: Callable[[str], Exported], no_log: None
) -> None:
    from transformers import AutoModelForCausalLM

    made = exported(name)
    theirs, report = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert type(theirs).__name__ == f"{CLASSES[FAMILIES[name][0]]}ForCausalLM"
    assert [list(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [[]] * 3
    with torch.no_grad():
        found = theirs.eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, logits(made.model), rtol=1e-5, atol=1e-5)
    assert theirs.config.max_position_embeddings == 128
    vocabulary = read_metadata(made.folder).vocabulary
    assert vocabulary is not None
    assert theirs.generation_config.eos_token_id == vocabulary.end_of_turn
