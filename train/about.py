"""What a run's folder, and a model exported from it, say of themselves, so that using them needs nothing else. Torch is not needed.

stage.yaml        the stage's settings, overrides included: `train.py runs/stage1/stage.yaml` is the same run
model.json        the model's sizes, also where the stage took them from a folder that is elsewhere (exported: config.json)
vocabulary.json   the datasets'
pictures.json     what the datasets' pictures were cut to for the image tokenizer; what the model is asked about is cut alike
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
import yaml

from unitoken.common.config import Config, changed, flat, load_config
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside
from unitoken.dataset.manifest import VOCABULARY
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.mixture import check_mixture
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig, VisionConfig
from unitoken.train.folders import CONFIG, has_vision, model_configs, read_decoder, read_vision
from unitoken.train.integrity import check_small_files

STAGE = "stage.yaml"
MODEL = "model.json"
PICTURES = "pictures.json"


Told = TypeVar("Told", bound=Config)


class Sizes(Config):
    """`model.json`."""

    decoder: DecoderConfig
    vision: VisionConfig | None


class Pictures(Config):
    """`pictures.json`."""

    crops: list[tuple[int, int]]  # width and height in pixels; empty where the data has no pictures


class About(NamedTuple):
    """What is known of trained weights; None where the folder is older, or another program's."""

    sizes: Sizes | None
    vocabulary: Vocabulary | None
    pictures: Pictures | None


def write_about(folder: Path, stage: StageConfig, sizes: Sizes, vocabulary: Vocabulary, pictures: Pictures | None = None) -> None:
    write_aside(folder / STAGE, dump_stage(found_anywhere(stage)))
    write_aside(folder / MODEL, sizes.model_dump_json(indent=2).encode() + b"\n")
    if pictures is not None:
        write_aside(folder / PICTURES, pictures.model_dump_json().encode() + b"\n")
    vocabulary.save(folder / VOCABULARY)


def dump_stage(stage: StageConfig) -> bytes:
    """A YAML file that loads to the same settings, defaults of today included."""
    return yaml.safe_dump(stage.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True).encode()


def found_anywhere(stage: StageConfig) -> StageConfig:
    """With the whole paths of its tokenizers, for a folder that is used from elsewhere."""
    codec = stage.codec
    if codec is None:
        return stage
    tokenizer, weights = (
        str(Path(name).resolve()) if Path(name).exists() else name for name in (codec.tokenizer, codec.vision.weights)
    )
    vision = codec.vision.model_copy(update={"weights": weights})
    return stage.model_copy(update={"codec": codec.model_copy(update={"tokenizer": tokenizer, "vision": vision})})


def read_about(origin: Path) -> About:
    """Of what `find_origin` found. Raises ConfigError for files that are there and can not be read."""
    folder = origin if origin.is_dir() else origin.parent
    told = is_export(folder) if origin.is_dir() else True
    if told and origin.is_dir():
        check_small_files(folder, json.loads((folder / CONFIG).read_bytes()))
    vocabulary = Vocabulary.load(folder / VOCABULARY) if told and (folder / VOCABULARY).is_file() else None
    pictures = _read(Pictures, folder / PICTURES, "the sizes of pictures") if told else None
    if origin.is_dir():
        vision = read_vision(str(folder)) if has_vision(folder) else None
        return About(Sizes(decoder=read_decoder(str(folder)), vision=vision), vocabulary, pictures)
    return About(_read(Sizes, folder / MODEL, "the sizes of a model"), vocabulary, pictures)


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


def sizes_of(origin: Path, config: ModelConfig) -> tuple[DecoderConfig, VisionConfig | None]:
    """The sizes of the weights in `origin`, by themselves or by the settings of the model. Raises ConfigError."""
    sizes = read_about(origin).sizes
    return (sizes.decoder, sizes.vision) if sizes else model_configs(config)


def shared(stage: StageConfig) -> dict[str, Any]:
    """The settings by their dotted names, without the places of data and folders, which machines may name in their own way."""
    places = ("save.folder", "data.cache")
    return {
        name: value
        for name, value in flat(stage.model_dump(mode="json")).items()
        if not name.startswith(places) and not name.endswith(".local")
    }


# What the weights of a finished run depend on: not how it was computed, nor what was written beside.
_OF_WEIGHTS = ("model.", "init_from", "trainable", "optimizer.", "data.", "precision", "compat", "seed")
_OF_COMPUTING = ("model.attention", "model.compile", "data.cache", "data.workers", "data.prefetch")


def check_finished(run: Path, stage: StageConfig) -> None:
    """Raises ConfigError where a finished run was another one: taken for done, what is asked for would never be trained."""
    made_by = read_stage(run)
    then, now = (flat(one.model_dump(mode="json")) if one is not None else {} for one in (made_by, stage))
    names = [name for name in changed(then, now) if name.startswith(_OF_WEIGHTS) and not name.startswith(_OF_COMPUTING)]
    found = [f"{name} {then.get(name)}, now {now.get(name)}" for name in names]
    if made_by is not None and found:
        raise ConfigError(f"{run}: finished with other settings: {'; '.join(found)}. Choose another save.folder")


class Whole(NamedTuple):
    """`About` with nothing missing that a model needs."""

    stage: StageConfig | None
    sizes: Sizes
    vocabulary: Vocabulary
    pictures: Pictures | None


def read_whole(origin: Path, stage: StageConfig | None = None) -> Whole:
    """What `origin` says of itself; what it does not say, `stage` says. Raises ConfigError where neither does."""
    about, stage = read_about(origin), stage or read_stage(origin)
    if stage is None and (about.sizes is None or about.vocabulary is None):
        missing = VOCABULARY if about.vocabulary is None else MODEL
        raise ConfigError(f"{origin}: no {missing} beside it; name the stage that made it: --config yamls/stage1.yaml")
    sizes, vocabulary = about.sizes, about.vocabulary
    if sizes is None:
        assert stage is not None
        decoder, vision = model_configs(stage.model)
        sizes = Sizes(decoder=decoder, vision=vision)
    if vocabulary is None:
        assert stage is not None
        vocabulary = check_mixture(stage.data)
    return Whole(stage, sizes, vocabulary, about.pictures)


# What gives tensors their shapes and layers their order; `other_constants` has the rest.
_DECODER = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_heads", "swin_norm")
_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def check_fits(about: About, sizes: Sizes, vocabulary: Vocabulary, where: str) -> None:
    """Raises ConfigError where weights are of another architecture, or were trained in another vocabulary, than is needed."""
    if about.sizes is not None:
        _same(about.sizes.decoder, sizes.decoder, _DECODER, where, "decoder")
        if about.sizes.vision is not None and sizes.vision is None:
            raise ConfigError(f"{where}: it has a vision tower, this stage's model has none (model.vision)")
        if about.sizes.vision is not None and sizes.vision is not None:
            _same(about.sizes.vision, sizes.vision, _VISION, where, "vision tower")
    if about.vocabulary is not None and about.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"{where}: it was trained in a vocabulary with fingerprint {about.vocabulary.fingerprint} "
            f"({about.vocabulary.size} tokens), the datasets have {vocabulary.fingerprint} ({vocabulary.size} tokens)"
        )


def other_constants(about: About, sizes: Sizes) -> str | None:
    """Numbers that no tensor shows and that differ: the same weights are another model with them."""
    if about.sizes is None:
        return None
    found = _differences(about.sizes.decoder, sizes.decoder, ("rope_theta", "rms_norm_eps"))
    if about.sizes.vision is not None and sizes.vision is not None:
        found += _differences(about.sizes.vision, sizes.vision, ("layer_norm_eps",))
    return f"its model and this stage's have {', '.join(found)}" if found else None


def _same(found: Config, needed: Config, fields: tuple[str, ...], where: str, part: str) -> None:
    if differences := _differences(found, needed, fields):
        raise ConfigError(f"{where}: another architecture: its {part} and this stage's have {', '.join(differences)}")


def _differences(found: Config, needed: Config, fields: tuple[str, ...]) -> list[str]:
    return [
        f"{field} {getattr(found, field)} and {getattr(needed, field)}"
        for field in fields
        if getattr(found, field) != getattr(needed, field)
    ]


def check_target(out: Path) -> None:
    """Raises ConfigError where an export would replace something that is none, or something that somebody put into one."""
    if not out.exists():
        if out.is_symlink():
            raise ConfigError(f"{out}: it is a link to {out.readlink()}, which is not there")
        return
    mark = mark_of(out)
    if mark is None:
        raise ConfigError(f"{out}: it is there and is no exported model, so it is not replaced")
    files = mark.get("files")  # none: exported before they were listed, and an export makes no folders
    more = sorted(path.name for path in out.iterdir() if (path.is_dir() if files is None else path.name not in files))
    if more:
        raise ConfigError(f"{out}: it holds {', '.join(more)} besides the exported model, so it is not replaced")


def is_export(folder: Path) -> bool:
    return mark_of(folder) is not None


def mark_of(folder: Path) -> dict[str, Any] | None:
    """What an exported model's config.json says of the export; None where it is another's, or none at all."""
    try:
        mark = json.loads((folder / CONFIG).read_bytes())["unitoken"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return mark if isinstance(mark, dict) else None
