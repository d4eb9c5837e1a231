"""Write aside, then rename: a file that exists is whole."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def aside(path: Path) -> Path:
    """A name beside `path` that no other process uses; hidden, and recognised by its `.aside-` prefix."""
    return path.with_name(f".aside-{path.name}-{uuid.uuid4().hex[:12]}")


def write_aside(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees all of it or nothing."""
    temporary = aside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
