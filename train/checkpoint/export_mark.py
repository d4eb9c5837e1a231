"""The mark of an exported model in its config.json, so that an export replaces nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.common.hashing import sha256_of_file
from unitoken.train.checkpoint.locations import CONFIG

CARD = "README.md"


def check_export_target(out: Path) -> None:
    """Raise ConfigError if an export to `out` would replace anything but the files of an earlier export."""
    if not out.exists():
        if out.is_symlink():
            raise ConfigError(f"{out}: it is a link to {out.readlink()}, which does not exist")
        return
    mark = read_mark(out)
    if mark is None:
        raise ConfigError(f"{out}: it exists and is not an exported model, so it is not replaced")
    files = mark.get("files")
    if files is None:  # exported before files were listed, when an export had no folders in it
        foreign = [path.name for path in out.iterdir() if path.is_dir()]
    else:
        foreign = [path.name for path in out.iterdir() if path.name not in files]
    if CARD in foreign and sha256_of_file(out / CARD) == mark.get("card"):
        foreign.remove(CARD)  # as it was exported: nobody has worked on it
    if foreign:
        raise ConfigError(
            f"{out}: it holds {', '.join(sorted(foreign))} besides the exported model, so it is not replaced"
        )


def is_export(folder: Path) -> bool:
    """Return whether a folder is an exported model."""
    return read_mark(folder) is not None


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Return the mark in a folder's config.json, or None if the folder is not an exported model."""
    try:
        mark = json.loads((folder / CONFIG).read_bytes())["unitoken"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return mark if isinstance(mark, dict) else None
