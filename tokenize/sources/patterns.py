"""Which files a name in the input stands for: a path or URL, a glob, a range of numbers, or a folder."""

from __future__ import annotations

import glob
import itertools
import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.common.missing_paths import where_looked
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, is_url, join
from unitoken.storage.web import is_web
from unitoken.tokenize.sources.base import store_errors_as_config_errors
from unitoken.tokenize.sources.picture_folders import has_pictures

MAX_FILES = 1_000_000
"""The most files that one {first..last} may stand for."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WILDCARDS = re.compile(r"[*?\[]")

log = logging.getLogger(__name__)


def expand(name: str) -> list[str]:
    """Return the files that `name` stands for, sorted within a glob. A folder of pictures stands for itself.

    Raises:
        ConfigError: no file matches, or a folder holds nothing that can be read.
    """
    matches = [match for plain in _expand_ranges(name) for match in _expand_glob(plain)]
    files = [file for match in _without_img2dataset_extras(matches) for file in _expand_folder(match)]
    if not files:
        hint = "" if is_url(name) else where_looked(_WILDCARDS.split(name)[0].rpartition("/")[0])
        raise ConfigError(f"{name}: no file matches{hint}")
    return files


def _expand_ranges(name: str) -> list[str]:
    """Return the 32 names of `shard-{00..31}.tar`, which is how WebDataset writes a range."""
    match = _RANGE.search(name)
    if not match:
        return [name]
    first, last = match.groups()
    width = max(len(first), len(last)) if first.startswith("0") else 0
    # Lengths are compared first: Python converts no more than 4300 digits.
    if width > 18 or len(last) > 18 or int(last) - int(first) >= MAX_FILES:
        raise ConfigError(f"{name[:200]}: stands for more than {MAX_FILES} files")
    before, after = name[: match.start()], name[match.end() :]
    numbered = [f"{before}{number:0{width}d}{after}" for number in range(int(first), int(last) + 1)]
    return list(itertools.chain.from_iterable(map(_expand_ranges, numbered)))  # there may be another range


def _expand_glob(name: str) -> list[str]:
    """Return the paths or URLs that match a glob; `*` does not match a slash."""
    if not _WILDCARDS.search(name) or is_web(name):
        return [name]
    if not is_url(name):
        return [name] if Path(name).exists() else sorted(glob.glob(name))  # noqa: PTH207 - keeps names as they were written
    folder = _WILDCARDS.split(name)[0].rpartition("/")[0]
    pattern = name[len(folder) + 1 :]
    with store_errors_as_config_errors(name):
        listed = open_store(folder).sizes(_WILDCARDS.split(pattern)[0])
    depth = pattern.count("/")
    matching = [file for file in listed if file.count("/") == depth and PurePosixPath(file).match(pattern)]
    return [join(folder, file) for file in sorted(matching)]


def _without_img2dataset_extras(names: list[str]) -> list[str]:
    """Leave out 00000.parquet, which lists the items of 00000.tar again, and 00000_stats.json."""
    tars = {name.removesuffix(".tar") for name in names if name.endswith(".tar")}
    extras = [
        name
        for name in names
        if not name.endswith(".tar")
        and (name.removesuffix(".parquet") in tars or name.removesuffix("_stats.json") in tars)
    ]
    if extras:
        log.warning(
            "passed over %d files that img2dataset writes beside its tars, such as %s", len(extras), extras[0]
        )
    left_out = set(extras)
    return [name for name in names if name not in left_out]


def _expand_folder(name: str) -> list[str]:
    """Return the .arrow files of a folder of Hugging Face's `datasets`; a file is returned as it is."""
    if is_web(name) or (PurePosixPath(name).suffix if is_url(name) else not Path(name).is_dir()):
        return [name]
    folder = open_store(name)
    with store_errors_as_config_errors(name):
        if splits := _read_json(folder, "dataset_dict.json"):
            choices = ", ".join(join(name, split) for split in splits.get("splits", []))
            raise ConfigError(f"{name}: holds several splits: choose from {choices}")
        if state := _read_json(folder, "state.json"):
            files = [str(entry["filename"]) for entry in state.get("_data_files", [])]
        elif is_url(name):
            return [name]
        else:
            files = sorted(path.name for path in Path(name).glob("*.arrow"))
    if not files and not is_url(name) and has_pictures(Path(name)):
        return [name]
    if not files or any("/" in file for file in files):
        raise ConfigError(
            f"{name}: expected a file, a folder that Hugging Face's `datasets` saved, or one of pictures; "
            "found another folder"
        )
    return [join(name, file) for file in files]


def _read_json(folder: Store, name: str) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is no such file or no object in it."""
    try:
        value = json.loads(folder.read(name))
    except MissingError:
        return None
    except ValueError as error:
        raise ConfigError(f"{folder.url}/{name}: not readable as JSON: {error}") from None
    return value if isinstance(value, dict) else None
