"""What helps a user whose path does not exist: a similar name, or where it was looked for."""

from __future__ import annotations

import difflib
import itertools
import os
import tempfile
from pathlib import Path

from unitoken.common.errors import ConfigError

MOST_NAMES = 10_000  # of a folder that are compared


def where_looked(name: str | Path) -> str:
    """Return the end of a message about a missing path, as `; did you mean data/cats?`.

    Args:
        name: the path, relative to the current folder or absolute.

    Returns:
        A path with a similar name, or the folder in which a relative path begins; "" where neither helps.
    """
    if "://" in str(name) or ":/" in str(name):  # a URL, also as Path writes it
        return ""
    try:
        path = Path(name).expanduser()
        existing = next((folder for folder in path.parents if folder.is_dir()), None)
        if existing is None or path.exists():
            return ""
        first, *rest = path.relative_to(existing).parts
        with os.scandir(existing) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
        for match in difflib.get_close_matches(first, names, n=3, cutoff=0.75):
            if existing.joinpath(match, *rest).exists():
                return f"; did you mean {existing.joinpath(match, *rest)}?"
        if not path.is_absolute():
            return f"; it was looked for in {Path.cwd()}"
        return "" if existing == path.parent else f"; there is no {existing / first}"
    except (OSError, ValueError, RuntimeError):  # unreadable folders, NUL in a name, ~nobody
        return ""


def check_writable(key: str, folder: Path, cure: str = "name another folder") -> None:
    """Check the first existing parent of a folder to write to; create nothing, as a later check may fail.

    Args:
        key: the setting or option that names the folder.
        folder: the folder.
        cure: what the user can do.

    Raises:
        ConfigError: it can not be written.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{key}: {folder}: cannot write there: {reason}; {cure}") from None
