"""Convert the reference's data file to the `data:` part of a stage.

META:
  - path: /data/llava/record.json
    ratio: 0.333
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import yaml
from pydantic import Field, NonNegativeFloat

from unitoken.common.config import Config, load_config
from unitoken.common.errors import ConfigError
from unitoken.storage.store import is_url

# Parts of paths that do not tell one dataset from another.
COMMON = {"record", "train", "data", "annotations", "json", "output", "tokens"}


class Meta(Config):
    """One source of the reference's data file."""

    path: str
    ratio: NonNegativeFloat = 1.0  # of the samples, drawn anew each epoch
    type: str = "default"  # groups batches by kind; packing needs no groups


class MetaFile(Config):
    """The reference's data file."""

    META: list[Meta] = Field(min_length=1)


def convert_config(path: Path, datasets: str) -> str:
    """Return YAML with a stream for each source of a file of the reference.

    Args:
        path: of the reference's file.
        datasets: folder or URL of the tokenized datasets.

    Raises:
        ConfigError: the file is not one of the reference's.
    """
    entries = load_config(MetaFile, path).META
    names = _names([entry.path for entry in entries])
    lines = [
        f"# From {path.name}. Each source becomes a dataset folder first, by `unitoken tokenize`:",
        "# `run` for conversations, `migrate` for what the reference has tokenized.",
        "data:",
        "  streams:",
    ]
    place = "remote" if is_url(datasets) else "local"
    for name, entry in zip(names, entries, strict=True):
        stream: dict[str, str | float] = {place: f"{datasets.rstrip('/')}/{name}"}
        if entry.ratio != 1:
            stream["repeat"] = entry.ratio
        comment = " ".join(entry.path.split())
        if entry.type != "default":
            comment += f"; its type {entry.type!r} has no equivalent"
        lines.append(f"    {name}: {_flow_mapping(stream)} # {comment}")
    lines += [
        "  packed_length: 4096 # positions in a pack, image features included",
        "  global_batch: 64 # packs in a step, over all ranks: the reference's 128 samples at two a pack",
    ]
    return "\n".join(lines) + "\n"


def _flow_mapping(stream: dict[str, str | float]) -> str:
    """Return `{local: data/llava, repeat: 0.333}`, with quotes where YAML needs them."""
    return yaml.safe_dump(
        stream, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
    ).strip()


def _names(paths: list[str]) -> list[str]:
    """Return a unique name for each path: its last part that is not a common word, numbered if necessary."""
    names: list[str] = []
    for path in paths:
        parts = [part for part in PurePosixPath(path).with_suffix("").parts if part not in ("/", "..", ".")]
        distinctive = [part for part in parts if part.lower() not in COMMON] or parts
        if not distinctive:
            raise ConfigError(f"META: the path {path!r} names no file")
        base = re.sub(r"\W+", "_", distinctive[-1]).strip("_") or "stream"
        base = base if base[0].isalpha() else f"d_{base}"
        name, number = base, 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names
