"""A model that draws with the demo's tokenizers, untrained, as a run's folder; for tests of what is asked of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.paths import ROOT
from support.small_datasets import make_record, write_dataset
from support.stages import stage
from unitoken.codec.config import CodecConfig
from unitoken.common.config import load_config
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.layouts import model_configs
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import StageConfig
from unitoken.train.model.unitoken import build_model

CODEC = {
    "tokenizer": str(ROOT / "demo/assets/tokenizer"),
    "vision": {"kind": "chameleon", "weights": str(ROOT / "demo/assets/vqgan")},
}
ROOM = 583  # ids of the demo's vocabulary
UNIT = 8  # pixels of a picture's side are a multiple of it


def demo_vocabulary() -> Vocabulary:
    from transformers import AutoTokenizer

    from unitoken.codec.image_tokenizer.files import find_image_tokenizer

    codec = CodecConfig.model_validate(CODEC)
    tokens = AutoTokenizer.from_pretrained(codec.tokenizer).get_vocab()
    return Vocabulary.from_tokens(tokens, find_image_tokenizer(codec.vision).codebook_size)


def drawing_stage(folder: Path, *overrides: str, **changes: Any) -> StageConfig:
    config = stage(folder, *overrides, codec=CODEC, **changes)
    return load_config(
        StageConfig, folder / f"{config.name}.yaml", [f"model.decoder.vocab_size={ROOM}", *overrides]
    )


def write_data(folder: Path) -> Path:
    """90 samples in the demo's vocabulary, as those of `stages.write_data`."""
    vocabulary = demo_vocabulary()
    records = [make_record(f"q{n}", vocabulary, 8 + n % 5, question_images=n % 3) for n in range(60)]
    records += [make_record(f"a{n}", vocabulary, 6, answer_images=1) for n in range(30)]
    return write_dataset(folder, records, vocabulary)


def write_run(folder: Path, config: StageConfig) -> Path:
    """`folder/run` with a checkpoint of new weights, as a run leaves it."""
    run = Path(config.save.folder)
    run.mkdir()
    model = build_model(*model_configs(config.model), config.model)
    load_weights(model, {}, seed=0)
    state = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state": {"model": state}}, run / "step-00000001.pt")
    (run / "latest").symlink_to("step-00000001.pt")
    return run
