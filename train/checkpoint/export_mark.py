"""What marks a folder as an exported model, so that an export replaces nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.layouts import CONFIG


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
    more = sorted(
        path.name for path in out.iterdir() if (path.is_dir() if files is None else path.name not in files)
    )
    if more:
        raise ConfigError(
            f"{out}: it holds {', '.join(more)} besides the exported model, so it is not replaced"
        )


def is_export(folder: Path) -> bool:
    return mark_of(folder) is not None


def mark_of(folder: Path) -> dict[str, Any] | None:
    """What an exported model's config.json says of the export; None where it is another's, or none at all."""
    try:
        mark = json.loads((folder / CONFIG).read_bytes())["unitoken"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return mark if isinstance(mark, dict) else None
