"""Tar files made member by member."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar of (name, content) and return its path."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
