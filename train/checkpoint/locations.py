"""Find checkpoints: a run's newest, a single one, a folder of Hugging Face's layout, or a hub id.

Neither torch nor Composer is needed.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from unitoken.codec.config import FOLDERS_BEGIN_WITH, how_to_get
from unitoken.common.errors import ConfigError
from unitoken.common.missing_paths import where_looked

STEP = re.compile(r"step-(\d{8,})(\.pt)?")  # a folder; a file if one rank wrote it whole, as once
INDEX = "checkpoint.json"  # in the folder of a checkpoint, written last
LOCK = ".lock"  # in a run's folder: held by the run that works in it
LATEST = "latest"  # in a run's folder: a link to its newest checkpoint
CONFIG = "config.json"  # in every folder of Hugging Face's layout
TOWER = "tower"  # in an exported folder: a folder of tower and adapter, which transformers' class has not


def find_origin(source: str) -> Path:
    """Find trained weights.

    Args:
        source: a checkpoint (step-*), a run's folder, a folder of Hugging Face's layout, or a hub id.

    Returns:
        The checkpoint, of a run's folder the newest; or the folder, of a hub id the download.

    Raises:
        ConfigError: nothing of that name exists, or it is none of these.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not zipfile.is_zipfile(path):  # the format of torch.save
            hint = "; name the folder that it is in" if path.suffix in (".safetensors", ".json") else ""
            raise ConfigError(f"{path}: not a checkpoint of a run (step-00000100), or a truncated one{hint}")
        return path.resolve()  # a link may be replaced while the file is read
    if path.is_dir():
        if is_checkpoint(path):
            return path.resolve()
        if STEP.fullmatch(path.name) and not (path / CONFIG).is_file():
            raise ConfigError(f"{path}: an incomplete checkpoint: it has no {INDEX}")
        checkpoint = latest_checkpoint(path)
        if checkpoint is not None:
            return checkpoint
        if not (path / CONFIG).is_file():
            raise ConfigError(
                f"{path}: no checkpoint in it, neither a run's step-* (did that stage run?) "
                f"nor a model's {CONFIG}"
            )
        return path
    # `runs/stage1` looks like a hub id; if the folder runs/ exists, it is a missing checkpoint.
    if path.parent.is_dir() and path.parent != Path():
        raise ConfigError(f"{source}: no such checkpoint{where_looked(source)}")
    return checkpoint_folder(source)


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a complete checkpoint of a run: a folder with an index, or a file."""
    return path.is_file() or (path / INDEX).is_file()


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name. Raises ConfigError for another name."""
    match = STEP.fullmatch(checkpoint.name)
    if match is None:
        raise ConfigError(f"{checkpoint}: not named like a checkpoint (step-00000100)")
    return int(match[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a run's folder, the oldest first."""
    named = (path for path in folder.glob("step-*") if STEP.fullmatch(path.name))
    return sorted((path for path in named if is_checkpoint(path)), key=lambda path: (step_of(path), path))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to resume a run from, or None if nothing was saved yet.

    Copies and object stores lose the link `latest`, and a run may be killed before it makes the first one.
    Then it falls back to the newest complete checkpoint.
    """
    link = folder / LATEST
    if not link.is_symlink():
        saved = complete_checkpoints(folder)
        if not saved and link.exists():
            raise ConfigError(f"{link}: it is not a link, and there is no step-* beside it to resume from")
        return saved[-1] if saved else None
    checkpoint = folder / link.readlink()
    if not is_checkpoint(checkpoint):
        what = f"has no {INDEX}" if checkpoint.is_dir() else "does not exist"
        raise ConfigError(f"{link}: it names {checkpoint.name}, which {what}")
    return checkpoint


def checkpoint_folder(source: str) -> Path:
    """Return a local folder of Hugging Face's layout, downloading it if `source` is a hub id.

    Raises:
        ConfigError: no such folder, and not a hub id or not to be had from the hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith(FOLDERS_BEGIN_WITH) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        hint = f"{where_looked(source)}{how_to_get(source)}"
        raise ConfigError(f"{source}: no such folder, and not a hub id (owner/name){hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub's client raises a dozen kinds: offline, unknown, gated, disk full
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{source}: no such folder, and the download from the hub failed: {first}{where_looked(source)}"
        ) from None


def is_export(folder: Path) -> bool:
    """Return whether a folder is an exported model."""
    return read_mark(folder) is not None


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Return the mark that an export has in its config.json, or None if the folder is not one."""
    try:
        mark = json.loads((folder / CONFIG).read_bytes())["unitoken"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return mark if isinstance(mark, dict) else None
