"""`index.json`: the shards of a dataset, as mosaicml-streaming writes and reads them."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX, LEFT_OUT


def dump_index(shards: list[dict[str, Any]], turns_left_out: int = 0) -> bytes:
    """An index as streaming writes and reads it; beside that, of a chunk, how many turns were left out, if any were."""
    left_out = {LEFT_OUT: turns_left_out} if turns_left_out else {}
    return json.dumps({"version": 2, "shards": shards, **left_out}, sort_keys=True).encode()


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The shards' entries in `folder/index.json`. Raises ConfigError for what is no index, or not one we may follow."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        entries: list[dict[str, Any]] = index["shards"]
        for entry in entries:
            basename = entry["raw_data"]["basename"]
            parts = PurePosixPath(basename).parts
            if not parts or ".." in parts or basename.startswith("/") or "\\" in basename or "\0" in basename:
                raise ConfigError(f"{path}: the shard name {basename!r} leads out of the folder")
            if entry["format"] != "mds" or entry["zip_data"] or entry["version"] != 2:
                raise ConfigError(
                    f"{path}: {basename}: expected uncompressed MDS version 2, found {entry['format']}, {entry['compression']}"
                )
            _check_numbers(entry)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not an MDS index: {type(error).__name__}: {error}") from None
    return entries


def _check_numbers(entry: dict[str, Any]) -> None:
    """Raises ValueError or KeyError for what JSON can say and no shard can be."""
    for name, value in (("samples", entry["samples"]), ("bytes", entry["raw_data"]["bytes"])):
        if type(value) is not int or not 0 <= value < 1 << 32:  # as wide as a shard's own offsets
            raise ValueError(f"`{name}`: expected a number from 0 to 2^32, found {value!r}")
    hashes = entry["raw_data"]["hashes"]
    if not isinstance(hashes, dict) or not all(isinstance(one, str) for one in hashes.values()):
        raise ValueError(f"`hashes`: expected texts by the names of algorithms, found {hashes!r}")
