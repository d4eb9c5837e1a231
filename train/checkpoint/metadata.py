"""Metadata of trained weights, kept beside them in a run's folder or an exported folder. Torch is not needed.

stage.yaml        the stage's settings, overrides included: `train.py runs/stage1/stage.yaml` repeats the run
model.json        the model's sizes, even if the stage read them from another folder (exported: config.json)
vocabulary.json   the datasets' vocabulary pictures.json     the sizes to which the datasets' images were cut
for the image tokenizer, so that images in prompts
                  are cut alike
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pydantic
import yaml

from unitoken.common.config import Config, ConfigT, load_config
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.files import write_aside
from unitoken.dataset.manifest import VOCABULARY
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.integrity import check_small_files
from unitoken.train.checkpoint.layouts import has_vision, model_configs, read_decoder, read_vision
from unitoken.train.checkpoint.locations import CONFIG, is_checkpoint, is_export
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig, VisionTowerConfig

STAGE = "stage.yaml"
MODEL = "model.json"
PICTURES = "pictures.json"


class ModelSizes(Config):
    """The content of `model.json`."""

    decoder: DecoderConfig
    vision: VisionTowerConfig | None


class PictureCrops(Config):
    """The content of `pictures.json`."""

    crops: list[tuple[int, int]]
    """Widths and heights in pixels; empty if the data has no images."""


class CheckpointMetadata(NamedTuple):
    """Metadata of trained weights; None for what an older folder, or another program's, does not have."""

    sizes: ModelSizes | None
    vocabulary: Vocabulary | None
    pictures: PictureCrops | None


def write_metadata(
    folder: Path,
    stage: StageConfig,
    sizes: ModelSizes,
    vocabulary: Vocabulary,
    pictures: PictureCrops | None = None,
) -> None:
    """Write the files of metadata into a run's folder."""
    write_aside(folder / STAGE, dump_stage(with_absolute_paths(stage)))
    write_aside(folder / MODEL, sizes.model_dump_json(indent=2).encode() + b"\n")
    if pictures is not None:
        write_aside(folder / PICTURES, pictures.model_dump_json().encode() + b"\n")
    vocabulary.save(folder / VOCABULARY)


def dump_stage(stage: StageConfig) -> bytes:
    """Return a YAML file that loads to the same settings, with the current defaults written out."""
    settings = stage.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()


def with_absolute_paths(stage: StageConfig) -> StageConfig:
    """Return the settings with absolute paths of the tokenizers, for use from another working directory."""
    codec = stage.codec
    if codec is None:
        return stage
    tokenizer, weights = (
        str(Path(name).resolve()) if Path(name).exists() else name
        for name in (codec.tokenizer, codec.vision.weights)
    )
    vision = codec.vision.model_copy(update={"weights": weights})
    codec = codec.model_copy(update={"tokenizer": tokenizer, "vision": vision})
    return stage.model_copy(update={"codec": codec})


def metadata_folder(origin: Path) -> Path:
    """Return the folder of the metadata of trained weights: of a checkpoint, the one that it is in."""
    return origin if origin.is_dir() and not is_checkpoint(origin) else origin.parent


def read_metadata(origin: Path) -> CheckpointMetadata:
    """Read the metadata beside trained weights.

    Args:
        origin: the file or folder that `find_origin` found.

    Raises:
        ConfigError: a file is there and can not be read.
    """
    vocabulary, pictures = None, None
    if metadata_folder(origin) != origin:
        vocabulary, pictures = _read_vocabulary(origin.parent), _read_pictures(origin.parent)
        sizes = _read_json_model(ModelSizes, origin.parent / MODEL, "the sizes of a model")
        return CheckpointMetadata(sizes, vocabulary, pictures)
    if is_export(origin):  # files of these names in another program's folder are not ours
        check_small_files(origin, json.loads((origin / CONFIG).read_bytes()))
        vocabulary, pictures = _read_vocabulary(origin), _read_pictures(origin)
    vision = read_vision(str(origin)) if has_vision(origin) else None
    sizes = ModelSizes(decoder=read_decoder(str(origin)), vision=vision)
    return CheckpointMetadata(sizes, vocabulary, pictures)


def read_stage(origin: Path) -> StageConfig | None:
    """Read the settings of the stage that made the weights; None if they are not there.

    Raises:
        ConfigError: this version of the program can not read the settings.
    """
    path = metadata_folder(origin) / STAGE
    return load_config(StageConfig, path) if path.is_file() else None


def read_sizes(origin: Path, config: ModelConfig) -> tuple[DecoderConfig, VisionTowerConfig | None]:
    """Return the sizes in the metadata of trained weights, or else those of `config`. Raises ConfigError."""
    about = read_metadata(origin)
    if about.sizes is not None:
        return about.sizes.decoder, about.sizes.vision
    return model_configs(config, about.vocabulary.size if about.vocabulary is not None else None)


def _read_vocabulary(folder: Path) -> Vocabulary | None:
    path = folder / VOCABULARY
    return Vocabulary.load(path) if path.is_file() else None


def _read_pictures(folder: Path) -> PictureCrops | None:
    return _read_json_model(PictureCrops, folder / PICTURES, "the sizes of pictures")


def _read_json_model(model: type[ConfigT], path: Path, content: str) -> ConfigT | None:
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        raise ConfigError(f"{path}: not {content}: {one_line(error, 200)}") from None
