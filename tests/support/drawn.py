"""An untrained model that draws with the demo's tokenizers, as the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.checkpoints import write_checkpoint
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
ROOM = 583
"""The number of ids in the demo's vocabulary."""
UNIT = 8
"""The sides of a picture are a multiple of this many pixels."""


def demo_vocabulary() -> Vocabulary:
    """Return the vocabulary of the demo's two tokenizers."""
    from transformers import AutoTokenizer

    from unitoken.codec.image_tokenizer.files import find_image_tokenizer

    codec = CodecConfig.model_validate(CODEC)
    tokens = AutoTokenizer.from_pretrained(codec.tokenizer).get_vocab()
    return Vocabulary.from_tokens(tokens, find_image_tokenizer(codec.vision).codebook_size)


def drawing_stage(folder: Path, *overrides: str, **changes: Any) -> StageConfig:
    """Return a stage's settings with the demo's tokenizers and a vocabulary for them."""
    config = stage(folder, *overrides, codec=CODEC, **changes)
    return load_config(
        StageConfig, folder / f"{config.name}.yaml", [f"model.decoder.vocab_size={ROOM}", *overrides]
    )


def write_data(folder: Path) -> Path:
    """Write 90 samples in the demo's vocabulary, as `stages.write_data` does in another."""
    vocabulary = demo_vocabulary()
    records = [make_record(f"q{n}", vocabulary, 8 + n % 5, question_images=n % 3) for n in range(60)]
    records += [make_record(f"a{n}", vocabulary, 6, answer_images=1) for n in range(30)]
    return write_dataset(folder, records, vocabulary)


def write_run(folder: Path, config: StageConfig) -> Path:
    """Write the folder of a run with a checkpoint of new weights."""
    run = Path(config.save.folder)
    run.mkdir()
    model = build_model(*model_configs(config.model), config.model)
    load_weights(model, {}, seed=0)
    write_checkpoint(run, 1, model.state_dict())
    return run
