"""Read the `data:` section of a stage's YAML file, and the sizes of its vision tower."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from unitoken.common.cli import warn
from unitoken.common.config import Config, load_config
from unitoken.common.errors import ConfigError
from unitoken.streaming_data.settings import DataConfig

# Image and patch size in pixels, of the reference's SigLIP tower and of SigLIP's own configuration class.
SO400M = (384, 14)
SIGLIP_DEFAULTS = (224, 16)


class _AnyKeys(Config):
    model_config = pydantic.ConfigDict(extra="allow")


class _ModelSection(Config):
    model_config = pydantic.ConfigDict(extra="ignore")

    vision: dict[str, Any] | str | None = None


class _StageFile(Config):
    model_config = pydantic.ConfigDict(extra="ignore")

    data: DataConfig
    model: _ModelSection = _ModelSection()
    max_duration: str | None = None


class DataSection(NamedTuple):
    """What a stage's file says of its data."""

    data: DataConfig
    vision: dict[str, Any] | str | None = None  # `model.vision`
    max_duration: str | None = None  # as the stage writes it, 2ep or 1000ba


def read_data_section(path: Path, overrides: Sequence[str]) -> DataSection:
    """Read the data settings of a stage's YAML file, or of a file that holds these settings alone.

    Args:
        path: the YAML file.
        overrides: `key=value` settings; for a file with the section alone, `data.` may be left out.

    Raises:
        ConfigError: the file can not be read, or a setting is wrong.
    """
    keys = load_config(_AnyKeys, path, []).model_extra or {}
    if "streams" in keys:
        own = [override.removeprefix("data.") for override in overrides]
        return DataSection(load_config(DataConfig, path, own))
    stage = load_config(_StageFile, path, overrides)
    return DataSection(stage.data, stage.model.vision, stage.max_duration)


def tower_size(
    vision: dict[str, Any] | str | None, image_size: int | None = None, patch_size: int | None = None
) -> tuple[int, int]:
    """Return the pixels of a view and of a patch, each way.

    Args:
        vision: a stage's `model.vision`: sizes, a folder with a config.json, or None for SO400M.
        image_size: pixels of a view; replaces what `vision` says.
        patch_size: pixels of a patch; replaces what `vision` says.

    Raises:
        ConfigError: the sizes are no whole numbers from 1 to 16,384, or a patch is larger than a view.
    """
    found = vision if isinstance(vision, dict) else {}
    if isinstance(vision, str):
        path = Path(vision).expanduser() / "config.json"
        try:
            fields = json.loads(path.read_bytes())
            found = fields.get("vision_config", fields) if isinstance(fields, dict) else {}
        except (OSError, ValueError, RecursionError):
            if image_size is None or patch_size is None:
                warn(
                    f"model.vision: {vision} is not on this machine; assuming views of {SO400M[0]} pixels "
                    f"with patches of {SO400M[1]}"
                )
            found = {"image_size": SO400M[0], "patch_size": SO400M[1]}
    defaults = SO400M if vision is None else SIGLIP_DEFAULTS
    view = image_size or found.get("image_size", defaults[0])
    patch = patch_size or found.get("patch_size", defaults[1])
    if not all(isinstance(size, int) and 0 < size <= 1 << 14 for size in (view, patch)) or patch > view:
        raise ConfigError(
            f"model.vision: expected image_size and patch_size in pixels, found {view!r} and {patch!r}"
        )
    return view, patch
