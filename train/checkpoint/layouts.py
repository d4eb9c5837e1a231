"""Sizes and tensor names of folders of Hugging Face's layout, before any tensor is read.

They are read from config.json and the headers of the safetensors files. Neither torch nor Composer is needed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from unitoken.common.config import ConfigT, first_problem
from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.families import (
    FAMILIES,
    HEAD,
    NESTED,
    check_tensors,
    decoder_fields,
    decoder_names,
    text_fields,
    ties_inner_embeddings,
)
from unitoken.train.checkpoint.locations import CONFIG, TOWER, checkpoint_folder, is_export
from unitoken.train.config import DecoderConfig, ModelConfig, NewDecoderConfig, VisionTowerConfig

FIRST_NORM = "model.layers.0.self_attn.q_norm.weight"


def model_configs(
    config: ModelConfig, vocabulary_size: int | None = None
) -> tuple[DecoderConfig, VisionTowerConfig | None]:
    """Return the model's sizes, read from the folders or hub ids in the settings.

    Args:
        config: the settings.
        vocabulary_size: how many ids the datasets' vocabulary has, for `vocab_size: auto`.

    Raises:
        ConfigError: a folder is missing or not readable, or `auto` has no vocabulary to be as large as.
    """
    with _setting_in_errors("model.decoder"):
        decoder = _decoder_config(config.decoder, vocabulary_size)
    with _setting_in_errors("model.vision"):
        vision = read_vision(config.vision) if isinstance(config.vision, str) else config.vision
    return decoder, vision


def _decoder_config(decoder: str | NewDecoderConfig, vocabulary_size: int | None) -> DecoderConfig:
    if isinstance(decoder, str):
        return read_decoder(decoder)
    if decoder.vocab_size != "auto":
        return decoder.with_vocabulary(decoder.vocab_size)
    if vocabulary_size is None:
        raise ConfigError(
            "vocab_size: auto is the size of the datasets' vocabulary, which is not known here; give a number"
        )
    return decoder.with_vocabulary(vocabulary_size)


@contextlib.contextmanager
def _setting_in_errors(key: str) -> Iterator[None]:
    """Put the setting that names a folder before the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    if not isinstance(kind := fields.get("model_type"), str | None):
        raise ConfigError(f"{path}: `model_type`: expected text, found {type(kind).__name__}")
    return fields


def _check_field(path: Path, fields: dict[str, Any], key: str, expected: Any) -> None:
    """Raise ConfigError if a field of config.json has a value that the model's code does not support."""
    if fields.get(key, expected) != expected:
        raise ConfigError(f"{path}: `{key}` is {fields[key]!r}; only {expected!r} is supported")


class StoredTensor(NamedTuple):
    """A tensor's place in a safetensors file."""

    path: Path
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read a folder's tensors by name from the headers of its safetensors files.

    Those of an exported model's tower and adapter are among them.

    Raises:
        ConfigError: a file is missing or not readable.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, StoredTensor] = {}
    paths = tensor_files(folder) + (tensor_files(folder / TOWER) if _has_own_tower(folder) else [])
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open has no iterator
                    tensors[name] = StoredTensor(path, tuple(file.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not readable as safetensors: {error}") from None
    return tensors


def tensor_files(folder: Path) -> list[Path]:
    """Return `model.safetensors`, or the shards that its index names. Raises ConfigError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigError(f"{index}: `weight_map`: expected an object of file names")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise ConfigError(f"{index}: it names files outside its folder")
        paths = [folder / name for name in names]
    else:
        paths = [folder / "model.safetensors"]
    missing = [path.name for path in paths if not path.is_file()]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if missing and pickles:
        raise ConfigError(
            f"{folder}: it has no {missing[0]}, and {pickles[0]} is not read, as it may hold code: "
            "safetensors only"
        )
    if missing or not paths:
        raise ConfigError(f"{folder}: it has no {', '.join(missing) or 'tensors'}")
    return paths


def read_decoder(source: str) -> DecoderConfig:
    """Read the sizes of a decoder's checkpoint (transformers' `save_pretrained`, Lumina-mGPT, UniToken).

    Args:
        source: a folder or a hub id.

    Raises:
        ConfigError: no such folder, a family that is not supported, a feature that the model's code does not
            support, or heads or tied embeddings that are not those of the tensors.
    """
    folder = checkpoint_folder(source)
    path = folder / CONFIG
    whole = _read_json(path)
    kind, fields = text_fields(whole, path)
    sizes = decoder_fields(kind, fields, path)
    stored = stored_tensors(folder)
    shapes = {ours: stored[name].shape for ours, name in decoder_names(stored).items()}
    if HEAD not in shapes and ties_inner_embeddings(whole):
        sizes["tie_word_embeddings"] = True
    if kind in (None, "chameleon"):
        norm = shapes.get(FIRST_NORM)
        if norm is None:
            raise ConfigError(f"{folder}: not a Chameleon decoder: the tensor '{FIRST_NORM}' is missing")
        # Exported folders have the field: their files have a row for each head even where all rows are equal.
        sizes.setdefault("qk_norm", "layer_shared" if norm[:1] == (1,) else "layer_per_head")
    decoder = _validate(DecoderConfig, sizes, path)
    check_tensors(decoder, shapes, folder)
    return decoder


def read_vision(source: str) -> VisionTowerConfig:
    """Read the sizes of the vision tower of a SigLIP checkpoint, which may be a whole SigLIP.

    Args:
        source: a folder or a hub id.

    Raises:
        ConfigError: no such folder, no vision tower, or a feature that the model's code does not support.
    """
    folder = checkpoint_folder(source)
    path = (folder / TOWER if _has_own_tower(folder) else folder) / CONFIG
    fields = _read_json(path)
    kind = str(fields.get("model_type"))
    if kind in FAMILIES and "vision_config" not in fields:
        raise ConfigError(f"{path}: it has the sizes of a {kind.capitalize()} decoder and of no vision tower")
    fields = fields.get("vision_config", fields)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: `vision_config`: expected an object, found {type(fields).__name__}")
    _check_field(path, fields, "hidden_act", "gelu_pytorch_tanh")
    _check_field(path, fields, "num_channels", 3)
    sizes = {key: fields[key] for key in VisionTowerConfig.model_fields if key in fields}
    return _validate(VisionTowerConfig, sizes, path)


def has_vision(folder: Path) -> bool:
    """Return whether a decoder's folder has sizes of a tower: exported folders do, UniToken's do not.

    The towers of Emu3 and Janus are not of this project's kind.
    """
    fields = _read_json(folder / CONFIG)
    has_sizes = "vision_config" in fields and fields.get("model_type") not in NESTED
    return has_sizes or _has_own_tower(folder)


def _has_own_tower(folder: Path) -> bool:
    """Return whether an exported folder has its tower in a folder; those of older versions have it inside."""
    return is_export(folder) and (folder / TOWER / CONFIG).is_file()


def _validate(model: type[ConfigT], fields: dict[str, Any], path: Path) -> ConfigT:
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None
