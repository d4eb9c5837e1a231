"""Where an export may be written: it replaces nothing but an earlier export."""

from __future__ import annotations

from pathlib import Path

from unitoken.common.errors import ConfigError
from unitoken.common.hashing import sha256_of_file
from unitoken.train.checkpoint.locations import read_mark

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
