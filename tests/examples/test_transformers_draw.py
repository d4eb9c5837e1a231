"""The example draws with transformers what `unitoken generate` draws."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import drawn
from support.chat_tokenizers import CHATML, chat_tokenizer
from support.paths import ROOT
from support.stages import DECODER, stage
from unitoken.codec.config import CodecConfig
from unitoken.codec.tokenizer_vocabulary import tokenizer_vocabulary
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.metadata import ModelSizes, PictureCrops, read_stage, write_metadata
from unitoken.train.config import StageConfig
from unitoken.train.export.model import export_model
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import generate, load_model
from unitoken.train.generation.prompts import build_prompt
from unitoken.train.generation.sampling import Sampling

SIZE = (4, 4)  # in latents, of 4 pixels each way
FAMILIES: dict[str, dict[str, Any]] = {
    "chameleon": {},
    "llama": {"qk_norm": "none", "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("transformers_draw", ROOT / "examples/transformers_draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_and_vocabulary(folder: Path, family: str) -> tuple[StageConfig, Vocabulary]:
    """Chameleon in its own layout, or a Llama in that of a chat template."""
    codec = dict(drawn.CODEC)
    vocabulary = drawn.demo_vocabulary()
    if family != "chameleon":
        tokenizer = chat_tokenizer(CHATML)
        tokenizer.save_pretrained(folder / "tokenizer")
        codec["tokenizer"] = str(folder / "tokenizer")
        vocabulary = tokenizer_vocabulary(tokenizer, len(vocabulary.image_ids), "chat_template")
    decoder = {**DECODER, **FAMILIES[family], "vocab_size": vocabulary.size + 5}
    config = stage(
        folder,
        "data.continuous=none",
        "data.packed_length=256",
        model={"decoder": decoder},
        codec=codec,
        trainable=["model"],
    )
    return config, vocabulary


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config, vocabulary = settings_and_vocabulary(folder, request.param)
    run = drawn.write_run(folder, config)
    decoder, _ = model_configs(config.model)
    crops = PictureCrops(crops=[(16, 16)])
    write_metadata(run, config, ModelSizes(decoder=decoder, vision=None), vocabulary, crops)
    export_model(str(run), folder / "model", "fp32")
    return folder / "model"


def test_the_likeliest_codes_are_those_of_our_own_generate(exported: Path, example: Any) -> None:
    config = read_stage(exported)
    assert config is not None
    assert config.codec is not None
    vocabulary = Vocabulary.load(exported / "vocabulary.json")
    # The export's own tokenizer holds the added tokens, and gives the same ids.
    codec = CodecConfig(tokenizer=str(exported), vision=config.codec.vision)
    dialogue = Dialogue(codec, vocabulary)
    assert dialogue.vocabulary == vocabulary
    prompts = dialogue.encode([build_prompt("Draw a 7.", [])], [(16, 16)])
    before = Dialogue(config.codec, vocabulary).encode([build_prompt("Draw a 7.", [])], [(16, 16)])
    assert prompts[0].tokens.tolist() == before[0].tokens.tolist()
    likeliest = Sampling(temperature=0.0)
    model = load_model(config.model, exported)
    (ours,) = generate(model, vocabulary, prompts, likeliest, sizes=[SIZE], drawing=True)
    theirs = example.draw(exported, "Draw a 7.", SIZE, sample=False)
    assert theirs == ours
    codes = vocabulary.image_codes(np.array(theirs))
    assert codes.shape == SIZE
    assert codes.min() < codes.max(), "the model draws one code only, which tells nothing"


def test_the_command_writes_a_picture(exported: Path, example: Any, tmp_path: Path) -> None:
    example.main([str(exported), "Draw a 7.", str(tmp_path / "7.png"), "--size", "16", "24"])
    with Image.open(tmp_path / "7.png") as picture:
        assert picture.size == (24, 16)
