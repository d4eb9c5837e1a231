"""`index.json` and the layout of MDS shards, as mosaicml-streaming writes and reads them.

All numbers are little-endian uint32. A shard is

    the number of samples N, the N + 1 offsets where the samples begin and the last one ends, the samples

and a sample is

    the sizes of its columns, then the columns, both in the order of the columns' names

without the sizes of columns that have a fixed one (none of ours, see record.py).
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX, LEFT_OUT

SHARD_NAME = re.compile(r"shard\.\d{5,}\.mds")  # inside the folder of a chunk


def dump_index(shards: list[dict[str, Any]], turns_left_out: int = 0) -> bytes:
    """Return an index as streaming writes it.

    Args:
        shards: their entries.
        turns_left_out: of a chunk; added to the index if it is not 0.
    """
    left_out = {LEFT_OUT: turns_left_out} if turns_left_out else {}
    return json.dumps({"version": 2, "shards": shards, **left_out}, sort_keys=True).encode()


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the shards' entries in `folder/index.json`.

    Raises:
        ConfigError: the file is not an MDS index, or names a shard outside the folder.
    """
    path = folder / INDEX
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_bytes())["shards"]
        for entry in entries:
            basename = entry["raw_data"]["basename"]
            parts = PurePosixPath(basename).parts
            if not parts or ".." in parts or basename.startswith("/") or "\\" in basename or "\0" in basename:
                raise ConfigError(f"{path}: the shard name {basename!r} leads out of the folder")
            if entry["format"] != "mds" or entry["zip_data"] or entry["version"] != 2:
                raise ConfigError(
                    f"{path}: {basename}: expected uncompressed MDS version 2, "
                    f"found {entry['format']}, {entry['compression']}"
                )
            _check_numbers(entry)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not an MDS index: {type(error).__name__}: {error}") from None
    return entries


def _check_numbers(entry: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError for values that are valid JSON but not those of a shard."""
    for name, value in (("samples", entry["samples"]), ("bytes", entry["raw_data"]["bytes"])):
        if type(value) is not int or not 0 <= value < 1 << 32:  # as large as a shard's own offsets
            raise ValueError(f"`{name}`: expected a number from 0 to 2^32, found {value!r}")
    hashes = entry["raw_data"]["hashes"]
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise ValueError(f"`hashes`: expected texts by the names of algorithms, found {hashes!r}")


def shard_columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the names and encodings of a shard's columns, in their order on disk.

    Args:
        entry: of the shard, in the index.

    Raises:
        KeyError: the entry has no columns.
        ValueError: names, encodings and sizes do not match.
    """
    names, encodings, sizes = (entry[f"column_{part}"] for part in ("names", "encodings", "sizes"))
    lists = names, encodings, sizes
    are_texts = all(isinstance(values, list) for values in lists) and all(
        isinstance(value, str) for value in [*names, *encodings]
    )
    if not are_texts or not len(names) == len(encodings) == len(sizes) == len(set(names)):
        raise ValueError(
            "column_names, column_encodings and column_sizes: expected three lists of one length"
        )
    if not all(size is None or (type(size) is int and 0 <= size < 1 << 32) for size in sizes):
        raise ValueError(f"`column_sizes`: expected numbers or null, found {sizes!r}")
    return dict(zip(names, encodings, strict=True))


def shard_offsets(data: bytes | mmap.mmap, samples: int) -> npt.NDArray[np.uint32]:
    """Return where each sample of a shard begins and the last one ends, (samples + 1,), as a view of `data`.

    Args:
        data: the shard.
        samples: their number according to the index.

    Raises:
        ValueError: the shard is broken or has another number of samples.
    """
    size = len(data)
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a shard")
    count = int(np.frombuffer(data, "<u4", 1)[0])
    if count != samples:
        raise ValueError(f"it holds {count} samples, {INDEX} names {samples}")
    header = 4 * (count + 2)
    if header > size:
        raise ValueError(f"{size} bytes are too few for the offsets of {count} samples")
    offsets = np.frombuffer(data, "<u4", count + 1, 4)
    is_ascending = not (np.diff(offsets.astype(np.int64)) < 0).any()
    if int(offsets[0]) < header or int(offsets[-1]) != size or not is_ascending:
        raise ValueError("the offsets of its samples are not ascending up to its end")
    return offsets
