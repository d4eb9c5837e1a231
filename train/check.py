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
from unitoken.train.about import Sizes, check_fits, check_target, read_about
from unitoken.train.config import DecoderConfig, StageConfig, VisionConfig
from unitoken.train.folders import LATEST, checkpoint_folder, find_origin, model_configs


class Checked(NamedTuple):
    decoder: DecoderConfig
    vision: VisionConfig | None
    vocabulary: Vocabulary


def check(config: StageConfig, world_size: int) -> Checked:
    """Everything that can be found wrong before anything large is loaded. Raises ConfigError."""
    decoder, vision = model_configs(config.model)
    _check_data(config, vision, world_size)
    _check_trainable(config, vision is not None)
    if config.save.export is not None:
        if Path(config.save.folder).resolve().is_relative_to(Path(config.save.export).resolve()):
            raise ConfigError(f"save.export: {config.save.export} holds the run's own folder, save.folder: {config.save.folder}")
        check_target(Path(config.save.export))
    vocabulary = check_mixture(config.data)
    if vocabulary.size > decoder.vocab_size:
        raise ConfigError(
            f"model.decoder: it has room for {decoder.vocab_size} ids (vocab_size), the datasets' vocabulary has {vocabulary.size}"
        )
    _check_origins(config, Sizes(decoder=decoder, vision=vision), vocabulary)
    return Checked(decoder, vision, vocabulary)


def _check_origins(config: StageConfig, sizes: Sizes, vocabulary: Vocabulary) -> None:
    """That the weights this stage begins with are this model's, and of the data's vocabulary."""
    origins = {}
    if (Path(config.save.folder) / LATEST).is_symlink():  # a run that resumes needs nothing else any more
        origins[f"save.folder: {config.save.folder}"] = find_origin(config.save.folder)
    else:
        if config.init_from is not None:
            origins[f"init_from: {config.init_from}"] = find_origin(config.init_from)
        if isinstance(config.model.decoder, str):
            origins[f"model.decoder: {config.model.decoder}"] = checkpoint_folder(config.model.decoder)
    for where, origin in origins.items():
        about = read_about(origin)
        if where.startswith("model.decoder"):  # its sizes are the model's, and its tower need not be used
            about = about._replace(sizes=None)
        check_fits(about, sizes, vocabulary, where)


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


def _check_trainable(config: StageConfig, has_vision: bool) -> None:
    parts = ["model", "lm_head"] + (["vit", "adapter"] if has_vision else [])
    for name in config.trainable:
        if name.split(".")[0] not in parts:
            raise ConfigError(f"trainable: '{name}' is no part of this model; its parts are {', '.join(parts)}")
    sees = {name.split(".")[0] for name in config.trainable}
    if config.data.continuous == "none" and sees <= {"vit", "adapter"}:
        raise ConfigError(
            f"trainable: [{', '.join(config.trainable)}] would train nothing: with data.continuous 'none' no image reaches them"
        )
    if not any(_learns(name, config.optimizer.lr_scales) for name in config.trainable):
        raise ConfigError(f"trainable: [{', '.join(config.trainable)}] would train nothing: optimizer.lr_scales gives all of it 0")


def _learns(name: str, scales: dict[str, float]) -> bool:
    """Whether something of that name has a learning rate over 0: the longest entry that names it decides, or one below it."""
    above = [entry for entry in scales if name == entry or name.startswith(f"{entry}.")]
    if not above or scales[max(above, key=len)] > 0:
        return True
    return any(scale > 0 for entry, scale in scales.items() if entry.startswith(f"{name}."))
