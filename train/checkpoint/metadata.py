"""What a run's folder, and a model exported from it, say of themselves, so that using them needs nothing else. Torch is not needed.

stage.yaml        the stage's settings, overrides included: `train.py runs/stage1/stage.yaml` is the same run
model.json        the model's sizes, also where the stage took them from a folder that is elsewhere (exported: config.json)
vocabulary.json   the datasets'
pictures.json     what the datasets' pictures were cut to for the image tokenizer; what the model is asked about is cut alike
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, TypeVar

import pydantic
import yaml

from unitoken.common.config import Config, load_config
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside
from unitoken.dataset.manifest import VOCABULARY
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.export_mark import is_export
from unitoken.train.checkpoint.integrity import check_small_files
from unitoken.train.checkpoint.layouts import CONFIG, has_vision, model_configs, read_decoder, read_vision
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig, VisionTowerConfig

STAGE = "stage.yaml"
MODEL = "model.json"
PICTURES = "pictures.json"


Told = TypeVar("Told", bound=Config)


class ModelSizes(Config):
    """`model.json`."""

    decoder: DecoderConfig
    vision: VisionTowerConfig | None


class PictureCrops(Config):
    """`pictures.json`."""

    crops: list[tuple[int, int]]  # width and height in pixels; empty where the data has no pictures


class About(NamedTuple):
    """What is known of trained weights; None where the folder is older, or another program's."""

    sizes: ModelSizes | None
    vocabulary: Vocabulary | None
    pictures: PictureCrops | None


def write_about(
    folder: Path,
    stage: StageConfig,
    sizes: ModelSizes,
    vocabulary: Vocabulary,
    pictures: PictureCrops | None = None,
) -> None:
    write_aside(folder / STAGE, dump_stage(found_anywhere(stage)))
    write_aside(folder / MODEL, sizes.model_dump_json(indent=2).encode() + b"\n")
    if pictures is not None:
        write_aside(folder / PICTURES, pictures.model_dump_json().encode() + b"\n")
    vocabulary.save(folder / VOCABULARY)


def dump_stage(stage: StageConfig) -> bytes:
    """A YAML file that loads to the same settings, defaults of today included."""
    return yaml.safe_dump(
        stage.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
    ).encode()


def found_anywhere(stage: StageConfig) -> StageConfig:
    """With the whole paths of its tokenizers, for a folder that is used from elsewhere."""
    codec = stage.codec
    if codec is None:
        return stage
    tokenizer, weights = (
        str(Path(name).resolve()) if Path(name).exists() else name
        for name in (codec.tokenizer, codec.vision.weights)
    )
    vision = codec.vision.model_copy(update={"weights": weights})
    return stage.model_copy(
        update={"codec": codec.model_copy(update={"tokenizer": tokenizer, "vision": vision})}
    )


def read_about(origin: Path) -> About:
    """Of what `find_origin` found. Raises ConfigError for files that are there and can not be read."""
    folder = origin if origin.is_dir() else origin.parent
    told = is_export(folder) if origin.is_dir() else True
    if told and origin.is_dir():
        check_small_files(folder, json.loads((folder / CONFIG).read_bytes()))
    vocabulary = Vocabulary.load(folder / VOCABULARY) if told and (folder / VOCABULARY).is_file() else None
    pictures = _read(PictureCrops, folder / PICTURES, "the sizes of pictures") if told else None
    if origin.is_dir():
        vision = read_vision(str(folder)) if has_vision(folder) else None
        return About(ModelSizes(decoder=read_decoder(str(folder)), vision=vision), vocabulary, pictures)
    return About(_read(ModelSizes, folder / MODEL, "the sizes of a model"), vocabulary, pictures)


def read_stage(origin: Path) -> StageConfig | None:
    """The settings of the stage that made it. Raises ConfigError where a newer program can not read them any more."""
    path = (origin if origin.is_dir() else origin.parent) / STAGE
    return load_config(StageConfig, path) if path.is_file() else None


def _read(model: type[Told], path: Path, what: str) -> Told | None:
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        raise ConfigError(f"{path}: not {what}: {' '.join(str(error).split())[:200]}") from None


def sizes_of(origin: Path, config: ModelConfig) -> tuple[DecoderConfig, VisionTowerConfig | None]:
    """The sizes of the weights in `origin`, by themselves or by the settings of the model. Raises ConfigError."""
    sizes = read_about(origin).sizes
    return (sizes.decoder, sizes.vision) if sizes else model_configs(config)
