"""An image tokenizer's files on Hugging Face's hub: of a whole model, only those that hold it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from unitoken.codec.config import FOLDERS_BEGIN_WITH, how_to_get
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.missing_paths import where_looked

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TENSOR_PREFIXES = ("", "vqmodel.", "model.vqmodel.")
"""What the names of the image tokenizer's tensors begin with in transformers' files."""
CODEBOOK = "quantize.embedding.weight"


def download(name: str, patterns: list[str]) -> Path:
    """Return the folder of a hub id, in which the files that match are up to date.

    Raises:
        ConfigError: no hub id, or the hub does not give it.
    """
    if name.count("/") != 1 or name.startswith(FOLDERS_BEGIN_WITH):
        hint = f"{where_looked(name)}{how_to_get(name)}"
        raise ConfigError(f"vision.weights: {name}: no such file or folder{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # errors of the hub, the network and the cache have no common base
        raise ConfigError(
            f"vision.weights: {name}: no such folder here, and the hub says: {one_line(error, 200)}"
        ) from None


def tensor_prefix(names: Iterable[str]) -> str | None:
    """Return what the names of an image tokenizer's tensors begin with; None if it is not among them."""
    found = set(names)
    return next((prefix for prefix in reversed(TENSOR_PREFIXES) if prefix + CODEBOOK in found), None)


def files_to_download(index: Path) -> list[str]:
    """Return the names of the safetensors files that hold the image tokenizer's tensors.

    A whole model is up to a hundred times larger.

    Args:
        index: the index of a model in several files, which need not exist.

    Raises:
        ConfigError: the index can not be read, or there is no image tokenizer in it.
    """
    if not index.is_file():
        return ["*.safetensors"]
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        prefix = tensor_prefix(files)
        if prefix is None:
            raise ConfigError(f"{index}: it names no tensor that ends in {CODEBOOK}, an image tokenizer's")
        return sorted({Path(files[name]).name for name in files if name.startswith(prefix)})
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not readable as an index: {one_line(error, 200)}") from None
