"""Checkpoints on disk before any tensor is read: where they are, which sizes they have. Neither torch nor Composer is needed."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from unitoken.codec.config import FOLDERS_BEGIN_WITH, how_to_get
from unitoken.common.config import ConfigT, first_problem
from unitoken.common.errors import ConfigError
from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig

STEP = re.compile(r"step-(\d{8,})\.pt")
LATEST = "latest"  # in a run's folder: a link to its newest checkpoint
CONFIG = "config.json"  # in a folder of Hugging Face's layout
FIRST_NORM = "model.layers.0.self_attn.q_norm.weight"


def model_configs(config: ModelConfig) -> tuple[DecoderConfig, VisionTowerConfig | None]:
    """The model's sizes, read from the checkpoints where folders or hub ids are given. Raises ConfigError."""
    with _named("model.decoder"):
        decoder = read_decoder(config.decoder) if isinstance(config.decoder, str) else config.decoder
    with _named("model.vision"):
        vision = read_vision(config.vision) if isinstance(config.vision, str) else config.vision
    return decoder, vision


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """A folder that is missing is no help without the setting that names it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def find_origin(source: str) -> Path:
    """Where trained weights are: a checkpoint file (step-*.pt), the newest one where `source` is a run's folder, or a folder of
    Hugging Face's layout, downloaded where `source` is a hub id.

    Raises:
        ConfigError: there is nothing of that name, or it is none of these.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not zipfile.is_zipfile(path):  # as torch writes it
            hint = "; name the folder that it is in" if path.suffix in (".safetensors", ".json") else ""
            raise ConfigError(f"{path}: not a checkpoint of a run (step-00000100.pt), or not all of it{hint}")
        return path.resolve()  # a link may move on while we read
    if path.is_dir():
        if (checkpoint := latest_checkpoint(path)) is not None:
            return checkpoint
        if not (path / CONFIG).is_file():
            raise ConfigError(
                f"{path}: no checkpoint in it, neither a run's step-*.pt (did that stage run?) nor a model's {CONFIG}"
            )
        return path
    if (
        path.parent.is_dir() and path.parent != Path()
    ):  # runs/stage1 looks like a hub id; where there is runs/, it is none
        raise ConfigError(f"{source}: no such checkpoint")
    return checkpoint_folder(source)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from; None in a folder where nothing was saved yet.

    Copies and object stores lose links, and a run may be killed before it made its first: then the newest it is, as a file
    of that name is whole.
    """
    link = folder / LATEST
    if not link.is_symlink():
        saved = sorted(path for path in folder.glob("step-*.pt") if STEP.fullmatch(path.name))
        if not saved and link.exists():
            raise ConfigError(
                f"{link}: it is no link, and there is no step-00000100.pt or the like beside it to go on from"
            )
        return saved[-1] if saved else None
    checkpoint = folder / link.readlink()
    if not checkpoint.is_file():
        raise ConfigError(f"{link}: it names {checkpoint.name}, which is not there")
    return checkpoint


def checkpoint_folder(source: str) -> Path:
    """A local folder as it is; anything that looks like a hub id is downloaded first."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith(FOLDERS_BEGIN_WITH) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ConfigError(f"{source}: no such folder, and not a hub id (owner/name){how_to_get(source)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub's client raises a dozen kinds: offline, unknown, gated, disk full
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{source}: no such folder, and the hub did not give it: {first}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def _fixed(path: Path, fields: dict[str, Any], key: str, expected: Any) -> None:
    if fields.get(key, expected) != expected:
        raise ConfigError(f"{path}: `{key}` is {fields[key]!r}; only {expected!r} is supported")


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """A checkpoint's tensors by name, from the headers of its safetensors files."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Stored] = {}
    for path in tensor_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                stored |= {key: Stored(path, tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118 - no iterator
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not readable as safetensors: {error}") from None
    return stored


def tensor_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = _read_json(index).get("weight_map", {})
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ConfigError(f"{index}: `weight_map`: expected an object of file names")
        names = sorted(set(places.values()))
        if any(Path(name).name != name for name in names):
            raise ConfigError(f"{index}: it names files outside its folder")
        paths = [folder / name for name in names]
    else:
        paths = [folder / "model.safetensors"]
    missing = [path.name for path in paths if not path.is_file()]
    if missing and (pickles := sorted(path.name for path in folder.glob("*.bin"))):
        raise ConfigError(
            f"{folder}: it has no {missing[0]}, and {pickles[0]} is not read, as it may hold code: safetensors only"
        )
    if missing or not paths:
        raise ConfigError(f"{folder}: it has no {', '.join(missing) or 'tensors'}")
    return paths


def read_decoder(source: str) -> DecoderConfig:
    """The sizes of a Chameleon checkpoint (transformers' `save_pretrained`, Lumina-mGPT, UniToken)."""
    folder = checkpoint_folder(source)
    path = folder / CONFIG
    fields = _read_json(path)
    _fixed(path, fields, "hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        _fixed(path, fields, key, False)
    rope = fields.get("rope_parameters") or {}  # transformers 5 keeps theta here
    if fields.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError(f"{path}: scaled rotary embeddings are not supported")
    known = {key: fields[key] for key in DecoderConfig.model_fields if fields.get(key) is not None}
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    norm = stored_tensors(folder).get(FIRST_NORM)
    if norm is None:
        raise ConfigError(f"{folder}: no Chameleon decoder: the tensor '{FIRST_NORM}' is missing")
    if (
        "qk_norm" not in known
    ):  # an exported folder says it: there the file has a row a head also where they are one
        known["qk_norm"] = "shared" if norm.shape[:1] == (1,) else "per_head"
    return _validated(DecoderConfig, known, path)


def read_vision(source: str) -> VisionTowerConfig:
    """The sizes of a SigLIP checkpoint: a vision tower, or a whole SigLIP of which only the tower is used."""
    path = checkpoint_folder(source) / CONFIG
    fields = _read_json(path)
    if fields.get("model_type") == "chameleon" and "vision_config" not in fields:
        raise ConfigError(f"{path}: the sizes of a Chameleon decoder and of no vision tower")
    fields = fields.get("vision_config", fields)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: `vision_config`: expected an object, found {type(fields).__name__}")
    _fixed(path, fields, "hidden_act", "gelu_pytorch_tanh")
    _fixed(path, fields, "num_channels", 3)
    return _validated(
        VisionTowerConfig, {key: fields[key] for key in VisionTowerConfig.model_fields if key in fields}, path
    )


def has_vision(folder: Path) -> bool:
    """Whether a decoder's folder also says the sizes of its vision tower: exported ones do, UniToken's do not."""
    return "vision_config" in _read_json(folder / CONFIG)


def _validated(model: type[ConfigT], fields: dict[str, Any], path: Path) -> ConfigT:
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None
