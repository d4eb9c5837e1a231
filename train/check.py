"""Everything that can be found wrong with a stage before anything large is loaded; torch and Composer are not needed.

config = load_config(StageConfig, "yamls/stage1.yaml", ["optimizer.lr=5e-4"])
checked = check(config, world_size=8)
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.mixture import check_mixture
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.train.config import DecoderConfig, StageConfig, VisionConfig
from unitoken.train.folders import LATEST, find_checkpoint, model_configs
from unitoken.train.questions import check_samples


class Checked(NamedTuple):
    decoder: DecoderConfig
    vision: VisionConfig | None
    vocabulary: Vocabulary


def check(config: StageConfig, world_size: int) -> Checked:
    """Everything that can be found wrong before anything large is loaded. Raises ConfigError."""
    decoder, vision = model_configs(config.model)
    _check_data(config, vision, world_size)
    _check_trainable(config.trainable, vision is not None)
    resumes = (Path(config.save.folder) / LATEST).is_symlink()
    if config.init_from is not None and not resumes:  # a run that resumes needs it no more
        find_checkpoint(config.init_from)
    vocabulary = check_mixture(config.data)
    if vocabulary.size > decoder.vocab_size:
        raise ConfigError(
            f"model.decoder: it has room for {decoder.vocab_size} ids (vocab_size), the datasets' vocabulary has {vocabulary.size}"
        )
    check_samples(config)
    return Checked(decoder, vision, vocabulary)


def _check_data(config: StageConfig, vision: VisionConfig | None, world_size: int) -> None:
    data = config.data
    if data.global_batch % world_size:
        raise ConfigError(f"data.global_batch: {data.global_batch} packs can not be shared evenly by {world_size} ranks")
    if vision is None and data.continuous != "none":
        raise ConfigError(f"data.continuous: '{data.continuous}' needs model.vision; without a vision tower it is 'none'")
    if config.compat == "unitoken" and vision is not None and data.continuous != "all":
        raise ConfigError(f"data.continuous: compat 'unitoken' gives features to all images, found '{data.continuous}'")
    if vision is not None and data.continuous != "none" and data.packed_length <= vision.features + 1:
        raise ConfigError(f"data.packed_length: {data.packed_length} is too short: an image alone has {vision.features} features")


def _check_trainable(trainable: list[str], has_vision: bool) -> None:
    parts = ["model", "lm_head"] + (["vit", "adapter"] if has_vision else [])
    for name in trainable:
        if name.split(".")[0] not in parts:
            raise ConfigError(f"trainable: '{name}' is no part of this model; its parts are {', '.join(parts)}")
